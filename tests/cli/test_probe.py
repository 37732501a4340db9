"""``tokenary probe``, on a toy folder."""

from __future__ import annotations

import json

import pytest

from tokenary.cli import main, probe
from tokenary.probe.laws import toy
from tokenary.probe.tokenization_consistency import TokenizationConsistency

SMALL = "tokenization-consistency:trials=2,words=12,likelihood=1,free=1,cuts=20"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, lm = tmp_path_factory.mktemp("model"), toy()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, capsys):
    def command(*arguments):
        code = main(["probe", *arguments, "--model", model])
        return code, *capsys.readouterr()

    return command


def test_tables_and_notes(run):
    code, out, _ = run(SMALL)
    assert code == 0
    assert "Targets" in out and "sampled" in out and "Put into clean copies" in out


def test_json_and_a_file_say_the_same(run, tmp_path):
    code, out, err = run(SMALL, "--seed", "3", "--json", "--out", str(tmp_path / "new" / "report.json"))
    assert code == 0 and err == ""
    found = json.loads(out)
    assert found == json.loads((tmp_path / "new" / "report.json").read_text())
    assert found["slug"] == "tokenization-consistency" and found["seed"] == 3 and found["options"]["trials"] == 2
    assert json.loads(run(SMALL, "--seed", "3", "--json")[1]) == found
    assert json.loads(run(SMALL, "--seed", "4", "--json")[1])["figures"] != found["figures"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("keyformer",), "unknown probe"),
        (("tokenisation-consistency",), "tokenization-consistency"),
        (("tokenization-consistency:trials=0",), "trials"),
        (("tokenization-consistency:trails=5",), "trials"),
        (("tokenization-consistency:trials=2000,words=9",), "passages"),
        ((SMALL, "--out", "."), "folder"),
    ],
)
def test_what_is_wrong_is_one_line(run, arguments, said):
    code, _, err = run(*arguments)
    assert code == 2 and said in err and err.startswith("tokenary: ") and err.count("\n") == 1


def test_ctrl_c_leaves_no_file(run, tmp_path, monkeypatch):
    def interrupted(self, lm, seed=0, progress=None):
        progress(1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenizationConsistency, "run", interrupted)
    code, out, err = run(SMALL, "--out", str(tmp_path / "report.json"))
    assert code == 130 and "cancelled" in err and out == ""
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1234567, "1,234,567"), (0.123456, "0.123"), (2e-5, "2e-05"), ("a", "a"), (True, "True")],
)
def test_cells(value, text):
    assert probe._cell(value) == text
