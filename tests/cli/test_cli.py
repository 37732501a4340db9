"""The command line: what it prints, and that every wrong input is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tokenary.cli import app as module
from tokenary.cli import main
from tokenary.core.errors import InputError
from tokenary.core.registry import cards

HEAVY = {"torch", "transformers", "numba", "numpy", "plotly"}  # typer itself imports pydantic
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
ENV.pop("TOKENARY_DEBUG", None)


def command(*arguments, **options):
    """Run the command line in a process of its own."""
    options = {"capture_output": True, "env": ENV, "timeout": 240} | options
    return subprocess.run([sys.executable, "-m", "tokenary", *arguments], **options)


def one_line(text):
    return text.startswith("tokenary: ") and text.count("\n") == 1 and "Traceback" not in text


# ------------------------------------------------------------------------------------------------- light ones


@pytest.mark.parametrize(
    "arguments", [["methods"], ["methods", "--json"], ["--help"], ["--version"], ["claims", "--help"]]
)
def test_listing_and_help_import_nothing_heavy(arguments):
    code = f"import sys; from tokenary.cli import main; main({arguments!r}); print(*sys.modules, file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV)
    assert not HEAVY & set(found.stderr.split())
    assert found.stdout


def test_importing_tokenary_imports_nothing():
    code = "import sys; before = set(sys.modules); import tokenary; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV)
    assert not {name.split(".")[0] for name in found.stdout.split()} - {"tokenary"} & (HEAVY | {"typer", "rich"})
    assert {name for name in found.stdout.split() if name.startswith("tokenary")} == {"tokenary"}


def every_command(app=module.app, path=()):
    """Names of all commands, as words."""
    for info in app.registered_commands:
        yield (*path, info.name or info.callback.__name__)
    for group in app.registered_groups:
        yield from every_command(group.typer_instance, (*path, group.name))


@pytest.mark.parametrize("words", list(every_command()), ids=" ".join)
def test_the_help_of_every_command_has_an_example(words):
    found = CliRunner().invoke(module.app, [*words, "--help"], env={"COLUMNS": "200"})
    assert found.exit_code == 0
    assert f"Example: tokenary {' '.join(words)}" in found.stdout


def test_the_commands_of_the_design_are_there():
    names = {" ".join(words) for words in every_command()}
    assert names >= {
        "methods", "show", "models list", "models get", "generate", "compare", "claims run", "claims list",
        "claims report", "check", "doctor", "store build",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- catalogue


def test_methods_lists_every_card(cli):
    code, out, _ = cli("methods")
    assert code == 0 and all(card.slug in out for card in cards())


def test_methods_for_a_program(cli):
    code, out, _ = cli("methods", "--room", "decode", "--lossless", "--json")
    found = json.loads(out)
    assert code == 0 and {card["slug"] for card in found} == {card.slug for card in cards(room="decode", lossless=True)}
    code, out, _ = cli("methods", "--lossy", "--json")
    assert {card["lossless"] for card in json.loads(out)} == {False}


def test_show(cli):
    code, out, _ = cli("show", "keyformer", "--json")
    found = json.loads(out)
    options = {option["name"]: option for option in found["options"]}
    assert code == 0 and found["paper"] == "2403.09054"
    assert options["keep"]["type"] == "budget" and options["keep"]["default"] == "60%"
    assert options["recent"] == {"name": "recent", "type": "number", "range": ">= 0, <= 1", "default": 0.3}
    assert options["noise"]["range"] == "gumbel, none, constant, gaussian"
    assert "token-recycling" in found["composes_with"] and "random" not in found["composes_with"]
    code, out, _ = cli("show", "token-recycling")
    assert code == 0 and "arXiv 2408.08696" in out and ">= 1, <= 80 or auto" in out


@pytest.mark.parametrize("arguments", [["models"], ["models", "list"]])
def test_models(cli, arguments):
    code, out, _ = cli(*arguments)
    assert code == 0 and "smollm2" in out and "Apache-2.0" in out


def test_models_for_a_program(cli):
    code, out, _ = cli("models", "list", "--json")
    assert code == 0 and {"name", "licence", "download_mb", "on_disk"} <= set(json.loads(out)[0])


def test_doctor(cli):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["machine"]["cores"] >= 1 and found["versions"]["torch"] and found["can"]
    assert isinstance(found["machine"]["cpu_bf16"], bool) and found["tested"]["transformers"] == "5.23"
    code, out, _ = cli("doctor")
    assert code == 0 and "can:" in out and "bfloat16" in out


def test_doctor_says_what_is_not_tested(cli, monkeypatch):
    from tokenary.cli import doctor

    monkeypatch.setattr(doctor, "TESTED", {"python": "2.7", "torch": "2.13", "transformers": "5.2"})
    cannot = " ".join(doctor.examine()["cannot"])
    assert "vouch for python" in cannot and "vouch for transformers" in cannot and "vouch for torch" not in cannot


def test_check(cli):
    code, out, _ = cli("check", "recent:keep=30%", "--json")
    (report,) = json.loads(out)
    assert code == 0 and report["ok"] and report["options"] == {"keep": "30%"}
    assert all(finding["verdict"] == "holds" and finding["statement"] for finding in report["findings"])


def test_check_of_a_broken_law_is_exit_code_1(cli, monkeypatch):
    from tokenary.memory import laws

    def never(make):
        """Nothing keeps this law."""
        raise laws.LawBroken("3 is not 4")

    monkeypatch.setitem(laws.LAWS, "keep", (never,))
    code, out, _ = cli("check", "recent")
    assert code == 1 and "broken" in out and "3 is not 4" in out


# ---------------------------------------------------------------------------------------------------- generate

STORY = ("generate", "Once upon a time", "--raw", "--model", "stories260k", "--dtype", "float32", "-n", "24")


def test_generate_streams_text_to_stdout_and_cost_to_stderr(cli):
    code, plain, err = cli(*STORY)
    assert code == 0 and plain.count("\n") == 1 and len(plain) > 20
    assert "plain: 24 tokens" in err and "tokens/s" in err and "1.00 tokens a pass" in err and "kB of keys" in err
    code, drafted, err = cli(*STORY, "--with", "token-recycling")
    assert code == 0 and drafted == plain and "token-recycling: 24 tokens" in err
    code, kept, err = cli(*STORY, "--with", "token-recycling", "--with", "keyformer:keep=4,interval=2")
    assert code == 0 and kept != plain and "keyformer:interval=2,keep=4 + token-recycling" in err


def test_generate_shows_the_answer_and_not_what_it_was_made_of(cli):
    constrained = ("--with", "awrs:regex=[a-z]{3,8},particles=4", "--temperature", "1")
    code, out, err = cli(*STORY, *constrained)
    assert code == 0 and re.fullmatch(r"[a-z]{3,8}\n", out) and "particles=4" in err
    code, out, _ = cli(*STORY, *constrained, "--json")
    assert code == 0 and len(json.loads(out)["branches"]) == 4
    code, out, err = cli(*STORY, "--with", "awrs:json=no-such-file.json")
    assert code == 2 and out == "" and err.count("\n") == 1 and "no-such-file.json" in err


def test_generate_shows_several_texts_of_a_prompt(cli):
    code, out, err = cli(*STORY, "--with", "group-think:thinkers=2")
    assert code == 0 and "Thinker 1:" in out and "Thinker 2:" in out and out.startswith("Thinker 1:")
    assert "[text" not in err  # the answer is both
    branches = json.loads(cli(*STORY, "--with", "group-think:thinkers=2", "--json")[1])["branches"]
    chosen = sum(len(branch["token_ids"]) - branch["given"] for branch in branches)
    assert f"{chosen} tokens in 2 texts" in err and chosen < 48  # without their headers
    code, out, err = cli(*STORY, "--with", "latr:group=3,tau_abs=0.1,tau_rel=0.5,ages=4")
    texts = re.findall(r"\[text \d of 3: length, log-weight (-\d+\.\d+)\]\n(.+)", err)
    assert code == 0 and len(texts) == 3 and len({text for _, text in texts}) > 1
    assert out.split("\n")[0] in {text for _, text in texts}


def test_generate_for_a_program(cli):
    code, out, err = cli(*STORY, "--json", "--temperature", "0.8", "--seed", "3")
    found = json.loads(out)
    assert code == 0 and err == "" and len(found["token_ids"]) == 24
    assert found["stats"]["recipe"] == "plain" and found["stats"]["finish"] == "length" and found["seed"] == 3
    again = json.loads(cli(*STORY, "--json", "--temperature", "0.8", "--seed", "3")[1])
    other = json.loads(cli(*STORY, "--json", "--temperature", "0.8", "--seed", "4")[1])
    assert again["text"] == found["text"] != other["text"]


def test_generate_reads_stdin_and_stops_at_a_text():
    arguments = list(STORY)
    arguments[1] = "-"
    found = command(*arguments, "--stop", ".", input=b"Once upon a time")
    assert found.returncode == 0 and found.stdout.strip().endswith(b".") and found.stdout.count(b".") == 1
    assert b"stop]" in found.stderr


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command"),
        (["methods", "--bogus"], "No such option"),
        (["generate"], "Missing argument"),
        (["generate", "hi", "--temperature", "-1"], "--temperature"),
        (["generate", "hi", "-n", "0"], "-n"),
        (["generate", "hi", "-n", "many"], "-n"),
        (["methods", "--room", "memry"], "did you mean memory"),
        (["show", "keyfomer"], "did you mean keyformer"),
        (["check", "keyfomer"], "did you mean keyformer"),
        (["check"], "--all"),
        (["check", "keyformer:keep=0%"], "option keep='0%'"),
        (["check", "keyformer:kep=5"], "did you mean keep"),
        (["claims", "run", "nothing"], "unknown claim 'nothing'"),
        (["claims", "run"], "--all"),
        (["models", "get", "smollm3"], "did you mean smollm2"),
        (["generate", "hi", "--model", "smollm3"], "did you mean smollm2"),
        (["generate", "hi", "--model", "/no/such/folder"], "no such file or folder"),
        (["generate", "hi", "--with", "aded2"], "did you mean aded"),
        (["generate", "hi", "--with", "token-recycling:nodes=500"], "option nodes='500'"),
        (["generate", "hi", "--with", "token-recycling:node=5"], "did you mean nodes"),
        (["generate", "hi", "--with", "keyformer:keep"], "options are name=value"),
        (["generate", "hi", "--with", "keyformer", "--with", "random"], "do not compose: both are the 'keep'"),
        (["generate", "hi", "--top-p", "3"], "option top_p=3.0"),
        (["generate", "  \n"], "the prompt is empty"),
        (["generate", "hi", "--model", "stories260k", "-n", "99999"], "past"),
        (["generate", "hi", "--model", "stories260k", "--dtype", "int3"], "option dtype='int3'"),
        (["compare", "--with", "keyformer + recent"], "do not compose"),
        (["compare", "--with", "recent:keep=120%"], "option keep='120%'"),
        (["compare", "--prompts", "/no/such/file"], "cannot read /no/such/file"),
        (["compare", "--rounds", "0"], "--rounds"),
        (["store", "build", "x.safetensors"], "no text files"),
        (["store", "build", "x.txt", "--text", __file__], "a .safetensors file"),
        (["store", "build", "/no/such/x.safetensors", "--text", __file__], "no such folder"),
        (["store", "build", "x.safetensors", "/no/such/file"], "cannot read"),
    ],
    ids=lambda value: " ".join(value).strip() if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line_and_exit_code_2(cli, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments)
    assert code == 2 and one_line(err) and words in err, err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_files_that_are_wrong(cli, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff\n")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    record = tmp_path / "claims"
    record.mkdir()
    (record / "aded.json").write_text("{")
    for arguments, words in (
        (["compare", "--prompts", str(bad), "--out", str(tmp_path / "o")], "not UTF-8"),
        (["compare", "--prompts", str(empty), "--out", str(tmp_path / "o")], "no prompt in the file"),
        (["compare", "--out", str(bad)], str(bad)),
        (["store", "build", str(tmp_path / "x.safetensors"), str(bad)], "not UTF-8"),
        (["generate", "hi", "--model", str(broken)], "broken"),
        (["generate", "hi", "--model", str(bad)], "not a GGUF"),
        (["generate", "hi", "--with", f"aded:store={bad}"], "option store="),
        (["claims", "list", "--results", str(tmp_path)], "no record of a claim"),
    ):
        code, out, err = cli(*arguments)
        assert code == 2 and one_line(err) and words in err and out == "", (arguments, err)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(("arguments", "given"), [([b"\xff\xfe"], b""), ([b"-"], b"ab\xff")])
def test_bytes_that_are_no_utf8(arguments, given):
    found = command("generate", *arguments, input=given)
    assert found.returncode == 2 and found.stderr == b"tokenary: the prompt is not UTF-8\n" and found.stdout == b""


# --------------------------------------------------------------------------------- what else can go wrong


def broken_by(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("tokenary.core.registry.cards", fail)


def test_a_defect_is_one_line_and_says_how_to_see_more(cli, monkeypatch):
    broken_by(monkeypatch, ZeroDivisionError("a\nb"))
    code, out, err = cli("methods")
    assert (code, out) == (1, "")
    assert err == "tokenary: ZeroDivisionError: a b (this is a bug; run with TOKENARY_DEBUG=1 for the traceback)\n"
    monkeypatch.setenv("TOKENARY_DEBUG", "1")
    assert main(["methods"]) == 1


def test_with_debug_there_is_a_traceback(capfd, monkeypatch):
    broken_by(monkeypatch, ZeroDivisionError("a"))
    monkeypatch.setenv("TOKENARY_DEBUG", "1")
    assert main(["methods"]) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("two\nlines"), 2, "tokenary: two lines\n"),
        (OSError(28, "No space left on device", "/x"), 2, "tokenary: No space left on device: /x\n"),
        (KeyboardInterrupt(), 130, "tokenary: cancelled\n"),
    ],
    ids=["input", "disk", "ctrl-c"],
)
def test_exit_codes(cli, monkeypatch, error, code, line):
    broken_by(monkeypatch, error)
    assert cli("methods") == (code, "", line)


def test_a_closed_pipe_is_silent():
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "tokenary", "methods"], stdout=writing, stderr=subprocess.PIPE, env=ENV, check=False
    )
    os.close(writing)
    assert found.stderr == b"" and found.returncode == 1


def test_ctrl_c_while_generating():
    for _ in range(5):  # a busy machine may deliver the signal after the last token
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenary", *STORY[:-1], "400"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENV,
        )
        first = process.stdout.read(5)  # it has begun to write
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert first and process.returncode == 130
    assert err == b"tokenary: cancelled\n" and b"Traceback" not in out


def test_no_command_shows_the_help():
    found = command()
    assert found.returncode == 2 and b"Usage: tokenary" in found.stdout + found.stderr


# ------------------------------------------------------------------------------------------------ claims, store


def record(**more):
    rival = {"name": "old", "value": 1.0, "spread": 0.0}
    part = {"value": 2.0, "spread": 0.1, "baseline": rival, "controls": [{**rival, "name": "random"}], "size": 2.0}
    part["verdict"] = "shown"
    about = {"slug": "aded", "claim": "It is better", "metric": "things", "direction": "higher", "effect": "ratio"}
    about |= {"threshold": 1.5, "held_out": {"varied": "the weather", **part, "details": {}}, "n": 3, "runs": 1}
    about |= {"seed": 0, "minutes": 0.5, "model": {"name": "toy", "sha256": "ab" * 32}, "versions": {"python": "3.11"}}
    about |= {"device": "a box", "threads": 2, "started_at": "2026-01-01T00:00:00+00:00"}
    return {**part, **about, **more}


def test_claims_list_and_report_come_from_the_records(cli, tmp_path):
    code, out, _ = cli("claims", "list", "--results", str(tmp_path), "--json")
    assert code == 0 and {row["verdict"] for row in json.loads(out)} == {"not measured yet"}
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "aded.json").write_text(json.dumps(record(verdict="not shown")))
    rows = {
        row["slug"]: row["verdict"]
        for row in json.loads(cli("claims", "list", "--results", str(tmp_path), "--json")[1])
    }
    assert rows["aded"] == "not shown" and rows["token-recycling"] == "not measured yet"
    page = tmp_path / "docs" / "ledger.md"
    assert cli("claims", "report", "--results", str(tmp_path), "--out", str(page))[0] == 0
    text = page.read_text()
    assert "**not shown**" in text and "shown (2x; the weather)" in text and "2 ± 0.1 things" in text
    assert "not measured yet" in text and "a box with 2 threads" in text


def test_a_claim_is_run_and_its_record_written(cli, tmp_path, monkeypatch):
    from tokenary.cli import claims
    from tokenary.core.claim import Claim, Figure, Outcome

    def run(seed=0, more=0.0):
        return Outcome(Figure("aded", 2.0 + seed), Figure("old", 1.0))

    made = Claim("aded", "It is better", "things", "higher", 1.5, run, "more of it", {"more": 1.0})
    monkeypatch.setattr(claims, "find", lambda slug: made)
    code, out, _ = cli("claims", "run", "aded", "--seed", "5", "--results", str(tmp_path))
    found = json.loads((tmp_path / "claims" / "aded.json").read_text())
    assert code == 0 and "aded: shown; held out: shown" in out
    assert (found["value"], found["held_out"]["value"], found["seed"]) == (7.0, 8.0, 5)
    assert found["model"]["name"] == "smollm2" and len(found["model"]["sha256"]) == 64 and found["timing"] is None


def test_wall_clock_figures_are_measured_again_alone(cli, tmp_path, monkeypatch):
    from tokenary.cli import claims
    from tokenary.core.claim import Claim

    def run(seed=0):
        raise AssertionError("the experiment itself is not run again")

    def made(timing):
        return Claim("aded", "It is better", "things", "higher", 1.5, run, "more", {}, timing=timing)

    monkeypatch.setattr(claims, "find", lambda slug: made(lambda seed: {"this over that": 3.25}))
    arguments = ("claims", "run", "aded", "--timing", "--results", str(tmp_path))
    code, _, err = cli(*arguments)
    assert code == 2 and "aded was not run yet" in err
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims" / "aded.json"
    path.write_text(json.dumps(record()))
    assert cli(*arguments)[0] == 0
    found = json.loads(path.read_text())
    assert found.pop("timing")["figures"] == {"this over that": 3.25} and found == record()
    page = tmp_path / "ledger.md"
    assert cli("claims", "report", "--results", str(tmp_path), "--out", str(page))[0] == 0
    assert "this over that 3.25" in page.read_text()
    monkeypatch.setattr(claims, "find", lambda slug: made(None))
    code, _, err = cli(*arguments)
    assert code == 2 and "no wall-clock figures" in err


def test_every_claim_says_what_it_claims_without_being_imported():
    from tokenary.cli.claims import describe, slugs

    known = {card.slug for card in cards()}
    for slug in slugs():
        about = describe(slug)
        assert slug in known and about["slug"] == slug
        assert about["statement"] and about["metric"] and about["variation"]
        assert isinstance(about["threshold"], float | int)
        assert about["direction"] in ("higher", "lower")


def test_a_store_is_built_and_used(cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 20)
    store = tmp_path / "s.safetensors"
    code, out, _ = cli("store", "build", str(store), "--text", str(text), "--model", "stories260k", "--json")
    assert code == 0 and json.loads(out)["pairs"] > 5 and store.is_file()
    assert [path.name for path in tmp_path.iterdir()].sort() == ["s.safetensors", "text.txt"].sort()
    plain, drafted = cli(*STORY)[1], cli(*STORY, "--with", f"aded:store={store}")[1]
    assert drafted == plain


# -------------------------------------------------------------------------------------------------- compare


def test_compare_writes_table_record_and_report(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("Once upon a time\nLily and Tom\n")
    arguments = ["--model", "stories260k", "--prompts", str(prompts), "-n", "8", "--rounds", "1", "--dtype", "float32"]
    found = command("compare", *arguments, "--with", "token-recycling:nodes=4", "--out", str(tmp_path / "out"))
    assert found.returncode == 0, found.stderr
    assert b"token-recycling:nodes=4" in found.stdout and b"report.html" in found.stdout
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["plain", "token-recycling:nodes=4"]
    assert record["rows"][1]["identical"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "results.json"]


def test_ctrl_c_keeps_what_was_measured(cli, tmp_path, monkeypatch):
    """Ctrl-C in the third of five hundred rounds, where the progress bar is told of a run."""
    from rich.progress import Progress

    def update(self, task, *, description="", **options):
        if description.startswith("round 3"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", update)
    prompts = tmp_path / "p.txt"
    prompts.write_text("Once upon a time\n")
    arguments = [
        "--model",
        "stories260k",
        "--prompts",
        str(prompts),
        "-n",
        "8",
        "--rounds",
        "500",
        "--dtype",
        "float32",
    ]
    code, out, err = cli("compare", *arguments, "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 130 and "Interrupted" in out and "plain" in out and "interrupted" in err
    assert record["complete"] is False and record["rows"][0]["tokens"] == 8
