"""``tokenary compare --room memory`` on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tokenary.bench.memory_curves as memory_curves
from tokenary.bench import Comparison, MemoryComparison
from tokenary.cli.app import app
from tokenary.core.registry import card

STORIES = ["--model", "stories260k", "--dtype", "float32", "--threads", "1"]


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def few(monkeypatch):
    """A room of two methods, so that a run takes seconds."""
    monkeypatch.setattr(memory_curves, "cards", lambda room: [card("keyformer"), card("random")])


def test_a_room_is_measured_written_and_printed(few, tmp_path):
    options = ["--context", 640, "--budget", 25, "--with", "read-recent:read=10%", "--out", tmp_path]
    found = run("--room", "memory", *STORIES, *options)
    assert found.exit_code == 0, found.output
    record = MemoryComparison.read(tmp_path / "results.json").record
    assert [point["recipe"] for point in record["points"]] == [
        "plain", "read-recent:read=10%", "keyformer:keep=25%", "random:keep=25%",
    ]  # fmt: skip
    assert "keyformer:keep=25%" in found.output and str(tmp_path / "report.html") in found.output
    assert record["settings"]["context"] == 640 and record["settings"]["prompts"] == 1


def test_json_is_the_record(few, tmp_path):
    found = run(
        "--room", "memory", *STORIES, "--context", 640, "--prompts", 2, "--budget", 25, "--json", "--out", tmp_path
    )
    record = json.loads(found.stdout)
    assert record == json.loads((tmp_path / "results.json").read_text()) and record["settings"]["prompts"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--room", "memory", "--rounds", "3"], "--rounds"),
        (["--room", "memory", "-n", "3"], "--max-new-tokens"),
        (["--room", "memory", "--prompts", "file.txt"], "how many texts"),
        (["--room", "decode", "--context", "4096"], "--room memory"),
        (["--with", "recent", "--budget", "20"], "--room memory"),
    ],
)
def test_options_that_do_not_belong_are_refused(options, words, tmp_path):
    found = run(*options, "--out", tmp_path)
    assert found.exit_code == 2 and words in found.output


def test_a_number_of_prompts_takes_some_of_ours(tmp_path):
    found = run(*STORIES, "--prompts", 2, "-n", 2, "--rounds", 1, "--out", tmp_path)
    assert found.exit_code == 0, found.output
    assert len(Comparison.read(tmp_path / "results.json").record["prompts"]) == 2
