"""``tokenary tokenizer``: what it prints and writes, and that wrong input is one line."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tokenary.data import prose
from tokenary.tokenize.base import load_tokenizer
from tokenary.tokenize.laws import toy_tokenizer
from tokenary.tokenize.supertoken import MIXTURE
from tokenary.tokenize.training import train_bpe

ENGLISH = prose()[:30_000].split("\n")


@pytest.fixture
def cli(cli):
    return functools.partial(cli, "tokenizer")


@pytest.fixture
def files(tmp_path):
    """Two tokenizers and two parallel texts."""
    toy_tokenizer().save(tmp_path / "toy.json")
    train_bpe(["\n".join(ENGLISH)], 500).save(tmp_path / "own.json")
    (tmp_path / "eng.txt").write_text("\n".join(ENGLISH))
    (tmp_path / "up.txt").write_text("\n".join(ENGLISH).upper())
    return tmp_path


def one_line(text):
    return text.startswith("tokenary: ") and text.count("\n") == 1 and "Traceback" not in text


def test_list(cli):
    code, out, _ = cli("list")
    assert code == 0 and "gpt4o" in out and "Apache-2.0" in out
    code, out, _ = cli("list", "--json")
    assert {"qwen3", "gemma3"} <= {row["name"] for row in json.loads(out)}


def test_audit_prints_and_writes(cli, files):
    texts = ("--text", f"eng={files / 'eng.txt'}", "--text", f"up={files / 'up.txt'}")
    code, out, error = cli("audit", files / "toy.json", files / "own.json", *texts, "--parallel", "--out", files / "o")
    assert code == 0 and "UTF-8" not in error
    record = json.loads((files / "o" / "audit.json").read_text())
    rows = {row["name"]: row for row in record["tokenizers"]}
    premium = rows["own"]["measures"]["token-premium"]["languages"]["up"]["premium"]
    assert premium > 1.3 and f"{premium:.2f}" in out and str(files / "o" / "audit.html") in out
    assert f"takes {premium:.2f} times as many tokens in up" in out
    page = (files / "o" / "audit.html").read_text()
    assert "toy and own on up" in page and record["differences"][0]["first"] == "toy"
    own = load_tokenizer(files / "own.json")
    assert rows["own"]["languages"]["eng"]["tokens"] == sum(map(len, own.encode_batch(ENGLISH)))


def test_audit_for_a_program_is_the_file(cli, files):
    code, out, _ = cli("audit", files / "toy.json", "-t", files / "eng.txt", "--json", "--out", files / "o")
    assert code == 0 and json.loads(out) == json.loads((files / "o" / "audit.json").read_text())
    assert json.loads(out)["tokenizers"][0]["measures"]["token-premium"]["why"] == "no parallel text"


def test_files_that_the_shell_lists(cli, files):
    code, out, _ = cli(
        "audit", files / "toy.json", "--text", files / "eng.txt", files / "up.txt", "--json", "--out", files / "o"
    )
    assert code == 0 and set(json.loads(out)["corpus"]) == {"eng", "up"} and len(json.loads(out)["tokenizers"]) == 1


def test_what_is_left_out_is_said(cli, files):
    (files / "bad.txt").write_bytes(b"good line\n\xff bad\n")
    (files / "empty.txt").write_bytes(b"")
    code, _, error = cli(
        "audit", files / "toy.json", "--text", files / "bad.txt", files / "empty.txt", "--out", files / "o"
    )
    assert code == 0 and "bad: 1 lines are not UTF-8" in error and "empty: holds no text" in error


def test_two_tokenizers_of_one_name_are_told_apart(cli, files):
    for folder in ("a", "b"):
        (files / folder / "tok").mkdir(parents=True)
        toy_tokenizer().save(files / folder / "tok" / "tokenizer.json")
    names = [str(files / folder / "tok") for folder in ("a", "b")]
    code, out, _ = cli("audit", *names, "-t", files / "eng.txt", "--json", "--out", files / "o")
    assert code == 0 and [row["name"] for row in json.loads(out)["tokenizers"]] == names


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["audit", "toy.json"], "--builtin multilingual"),
        (["audit", "toy.json", "-t", "eng.txt", "--builtin", "multilingual"], "--builtin multilingual"),
        (["audit", "toy.json", "--builtin", "nonsense"], "expected multilingual"),
        (["audit", "none.json", "-t", "eng.txt"], "no such file"),
        (["audit", "gpt4oo", "-t", "eng.txt"], "did you mean gpt4o"),
        (["audit", "toy.json", "toy.json", "-t", "eng.txt"], "named twice"),
        (["audit", "broken.json", "-t", "eng.txt"], "not a tokenizer.json"),
        (["audit", "toy.json", "-t", "none.txt"], "No such file"),
        (["audit", "toy.json", "-t", "empty.txt"], "holds no text"),
        (["audit", "toy.json", "-t", "eng.txt", "-t", "short.txt", "--parallel"], "as many lines"),
        (["audit", "toy.json", "-t", "eng.txt", "--parallel", "--reference", "fra"], "'fra' is none of"),
        (["audit", "toy.json", "-t", "eng.txt", "--language", "fra"], "--builtin"),
        (["audit", "toy.json", "-t", "eng.txt", "--compress", "bzip2"], "'gzip', 'xz'"),
        (["audit", "toy.json", "-t", "eng.txt", "--order", "9"], "order"),
        (["audit", "toy.json", "-t", "eng.txt", "--engine", "spark"], "local or ray"),
        (["audit", "toy.json", "-t", "eng.txt", "--address", "auto"], "--engine ray"),
        (["audit", "-t", "eng.txt"], "Missing argument"),
        (["train"], "--text"),
        (["train", "-a", "bpee", "-t", "eng.txt"], "did you mean bpe"),
        (["train", "-t", "none.txt"], "No such file"),
        (["train", "-t", "empty.txt"], "empty"),
        (["train", "-t", "eng.txt", "-v", "256"], "257"),
        (["train", "-t", "eng.txt", "-v", "257", "--special", "<s>"], "special"),
        (["train", "-t", "eng.txt", "--stop"], "an option of lz"),
        (["train", "-t", "eng.txt", "-a", "superword", "--transition", "2"], "transition"),
        (["train", "-t", "eng.txt", "-a", "lz", "--score", "best"], "gzip or lz78 or gain"),
        (["train", "-t", "eng.txt", "-a", "lz", "--validation", "empty.txt"], "to judge merges by"),
        (["train", "-a", "even", "-t", "eng.txt"], "--parallel"),
        (["train", "-a", "even", "-t", "eng.txt", "--parallel", "up.txt"], "same languages"),
        (["train", "-a", "even", "-t", "eng.txt", "--builtin", "messages"], "brings its own text"),
        (["train", "-a", "even", "--builtin", "messages", "--law", "linear"], "saturating"),
    ],
)
def test_wrong_input_is_one_line(cli, files, monkeypatch, arguments, why):
    monkeypatch.chdir(files)
    (files / "broken.json").write_text('{"model": 1}')
    (files / "empty.txt").write_bytes(b"")
    (files / "short.txt").write_text("one line\n")
    code, out, error = cli(*arguments)
    assert code == 2 and out == "" and one_line(error) and why in error
    assert not (files / "out" / "audit.json").exists() and not (files / "out" / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize(
    "algorithm",
    [
        ("bpe",),
        ("unigram",),
        ("superword", "--transition", 0.7, "--most-words", 3),
        ("supertoken", "--whole", "--seed", 3),
        ("lz", "--candidates", 2, "--serial", "ranked"),
    ],
    ids=lambda words: words[0],
)
def test_train_writes_what_transformers_reads(cli, files, algorithm):
    from transformers import AutoTokenizer

    arguments = ("--text", files / "eng.txt", "-v", 320, "--special", "<|end|>", "--out", files / "o")
    code, out, _ = cli("train", "-a", *algorithm, *arguments, "--held-out", files / "up.txt", "--json")
    about = json.loads(out)
    assert code == 0 and about == json.loads((files / "o" / "training.json").read_text())
    own, theirs = load_tokenizer(files / "o"), AutoTokenizer.from_pretrained(files / "o")
    text = "Call me Ishmael.\n Some <years> ago"
    assert own.encode(text).tolist() == theirs(text)["input_ids"] and theirs.decode(own.encode(text)) == text
    assert theirs.eos_token == "<|end|>" and theirs.eos_token_id == about["vocabulary"] - 1
    assert about["vocabulary"] == own.vocab_size == 320 and about["digest"] == own.digest
    nbytes = (files / "up.txt").stat().st_size
    assert about["held_out"]["bytes_per_token"] == nbytes / about["held_out"]["tokens"] and about["bytes"] == nbytes
    if algorithm[0] == "supertoken":
        assert about["mixture"] == [list(part) for part in MIXTURE]
    if algorithm[0] == "lz":
        whole = "\n".join(ENGLISH)
        assert about["validation_bytes"] == len(whole[len(whole) - len(whole) // 4 :].encode())


def test_train_says_what_came_of_it(cli, files):
    (files / "tiny.txt").write_bytes(b"a b\n\xff\n")
    code, out, error = cli("train", files / "tiny.txt", "-v", 400, "--held-out", files / "up.txt", "--out", files / "o")
    assert code == 0 and "1 lines are not UTF-8" in error and "not 400" in error
    assert "bytes and" in out and "characters a token" in out


def test_even_trains_a_tokenizer_for_each_language(cli, files):
    doubled = ["".join(char * 2 if char.isalpha() else char for char in line) for line in ENGLISH]
    for name, lines in (("one", ENGLISH), ("two", doubled)):
        (files / f"{name}.txt").write_text("\n".join(lines[:-60]))
        (files / f"{name}.lines").write_text("\n".join(lines[-60:]))
    arguments = [
        *(f"--text={name}={files / name}.txt" for name in ("one", "two")),
        *(f"--parallel={name}={files / name}.lines" for name in ("one", "two")),
        *("-v", "300", "--law", "local", "--out", str(files / "o")),
    ]
    code, out, _ = cli("train", "-a", "even", *arguments)
    about = json.loads((files / "o" / "training.json").read_text())
    assert code == 0 and f"coefficient of variation {about['own']['cv']:.3f} instead of" in out
    assert about["own"]["cv"] < about["equal"]["cv"]
    for name, row in about["languages"].items():
        assert load_tokenizer(files / "o" / name).vocab_size == row["size"]
    assert about["sentences"]["fitted"] >= about["sentences"]["verified"] > 10
    code, out, _ = cli("train", "-a", "even", *arguments, "--json")
    assert code == 0 and json.loads(out) == about


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_ctrl_c_ends_a_training_at_once(files, seconds):
    (files / "long.txt").write_text(prose() * 400)
    command = [sys.executable, "-m", "tokenary", "tokenizer", "train", "-t", str(files / "long.txt"), "-v", "60000"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, "--out", str(files / "o")], stderr=subprocess.PIPE, text=True, env=env)
    while not (files / "o").is_dir():  # it is made just before training
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == "tokenary: cancelled\n" and not list((files / "o").iterdir())
