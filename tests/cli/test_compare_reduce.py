"""``tokenary compare --room reduce`` on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import tokenary.bench.reduce_arms as reduce_arms
import tokenary.bench.reduce_room as reduce_room
from tokenary.bench.reduce_room import ReduceComparison
from tokenary.cli.app import app
from tokenary.core.registry import card
from tokenary.models.bench_vlm import BenchVLM, save, sized
from tokenary.reduce.idpruner import IDPruner


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models of size tiny."""
    place = tmp_path_factory.mktemp("models")
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save(BenchVLM(sized("tiny")), place / f"tiny-{seed}")
    return place


@pytest.fixture
def few(monkeypatch):
    """A room of two methods, none of them trained, so that a run takes seconds."""
    monkeypatch.setattr(reduce_arms, "cards", lambda room: [card("hiprune"), card("reduce-grid")])
    monkeypatch.setattr(IDPruner, "learns", "")


def test_a_room_is_measured_written_and_printed(few, models, tmp_path):
    options = ["--prompts", 1, "--budget", 50, "--budget", 25, "--with", "reduce-pool:keep=3", "--out", tmp_path]
    found = run("--room", "reduce", "--model", models / "tiny-0", "--threads", 1, *options)
    assert found.exit_code == 0, found.output
    record = ReduceComparison.read(tmp_path / "results.json").record
    assert [point["recipe"] for point in record["parts"][0]["points"]] == [
        "plain", "reduce-pool:keep=3", "hiprune:keep=50%", "hiprune:keep=25%", "reduce-grid:keep=50%",
        "reduce-grid:keep=25%", "blind",
    ]  # fmt: skip
    assert "hiprune:keep=25%" in found.output and str(tmp_path / "report.html") in found.output
    assert len(record["parts"]) == 1 and record["settings"]["prompts"] == 1 and record["machine"]["threads"] == 1


def test_json_is_the_record_of_two_models_and_two_kinds_of_pictures(few, models, tmp_path):
    both = f"{models / 'tiny-0'},{models / 'tiny-1'}"
    found = run(
        "--room", "reduce", "--model", both, "--crops", "--prompts", 1, "--budget", 50, "--json", "--out", tmp_path
    )
    record = json.loads(found.stdout)
    assert record == json.loads((tmp_path / "results.json").read_text())
    assert record["settings"]["models"] == ["tiny-0", "tiny-1"]
    assert [part["name"] for part in record["parts"]] == ["pictures", "crops"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--room", "reduce", "--rounds", "3"], "--rounds"),
        (["--room", "reduce", "-n", "3"], "nothing is written"),
        (["--room", "reduce", "--context", "512"], "--room memory"),
        (["--room", "reduce", "--peers"], "--peers"),
        (["--room", "reduce", "--dtype", "bfloat16"], "--dtype"),
        (["--room", "reduce", "--prompts", "file.txt"], "how many questions"),
        (["--room", "memory", "--crops"], "--room reduce"),
        (["--with", "recent", "--crops"], "--room reduce"),
        (["--with", "recent", "--budget", "20"], "--room memory or --room reduce"),
    ],
)
def test_options_that_do_not_belong_are_refused(options, words, tmp_path):
    found = run(*options, "--out", tmp_path)
    assert found.exit_code == 2 and words in " ".join(found.output.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--with", "keyformer:keep=10%"], "no method of the room reduce"),
        (["--with", "hiprune:keep=0"], "keep"),
        (["--budget", "0"], "budgets"),
        (["--prompts", "0"], "prompts"),
        (["--model", "smollm2"], "unknown bench VLM 'smollm2'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, words, tmp_path):
    found = run("--room", "reduce", *options, "--out", tmp_path)
    assert found.exit_code != 0 and words in str(found.exception)


def test_ctrl_c_prints_and_writes_what_was_measured(few, models, tmp_path, monkeypatch):
    answer, passed = reduce_room.answer, []

    def stopping(*arguments):
        passed.append(1)
        if len(passed) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(reduce_room, "answer", stopping)
    found = run("--room", "reduce", "--model", models / "tiny-0", "--prompts", 9, "--budget", 50, "--out", tmp_path)
    assert found.exit_code == 130 and "Interrupted." in found.output
    record = ReduceComparison.read(tmp_path / "results.json").record
    assert not record["complete"] and record["parts"][0]["questions"] == 8
