"""``tokenary tokenizer transfer``, on a toy folder."""

from __future__ import annotations

import json

import pytest

from tokenary.cli import main
from tokenary.embed.apply import save
from tokenary.embed.laws import toy, toy_target
from tokenary.models import load


@pytest.fixture
def here(tmp_path):
    save(toy(), tmp_path / "model")
    toy_target().save(str(tmp_path / "new.json"))
    text = "the theatre and another ant ate 1024 cats and so on, while others slept.\n"
    (tmp_path / "text.txt").write_text(40 * text)
    return tmp_path


def run(here, *more):
    paths = [str(here / "model"), "--to", str(here / "new.json"), "--out", str(here / "out")]
    return main(["tokenizer", "transfer", *paths, *more])


def test_a_folder_comes_out(here, capsys):
    assert run(here, "--method", "tokenadapt:encoder=characters", "--text", str(here / "text.txt"), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    lm = load(here / "out", dtype="float32")
    assert lm.vocab_size == facts["rows"] and lm.decode(lm.encode(["an ant"], raw=True)[0]) == "an ant"
    assert facts["new"] > 0 and facts["bits_a_byte"] > 0 and facts["tokens"] != facts["tokens_before"]


def test_it_says_what_it_did(here, capsys):
    assert run(here, "--method", "mean-of-pieces", "--multiple", "32", "--text", str(here / "text.txt")) == 0
    said = capsys.readouterr().out
    assert "bits a byte" in said and "mean-of-pieces" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--method", "keyformer"), "tokenadapt"),
        (("--method", "tokenadapt:weight=2"), "weight"),
        (("--method", "zett"), "another model"),
        (("--method", "focus", "--text", "no such file"), "cannot read"),
    ],
)
def test_what_is_wrong_is_one_line(here, capsys, more, said):
    assert run(here, *more) != 0
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (here / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(here, capsys):
    (here / "out").mkdir()
    (here / "out" / "mine").write_text("x")
    assert run(here, "--method", "focus") != 0
    assert "empty folder" in capsys.readouterr().err
