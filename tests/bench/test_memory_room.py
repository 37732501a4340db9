"""Memories compared on a really trained small model: the record, the table, the files, the page, other programs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from html_page import Page

import tokenary.bench.memory_peers as peers_module
from tokenary.bench import Comparison, MemoryComparison, compare_memory
from tokenary.bench.haystack import TASKS
from tokenary.bench.memory_report import cells, columns, findings, plots, render
from tokenary.core.errors import InputError, OptionError, RecipeError
from tokenary.models import tiny_lm

RECIPES = ["keyformer:keep=25%", "random:keep=25%", "read-oracle:read=10%"]


@pytest.fixture(scope="module")
def small(stories):
    return compare_memory(stories, RECIPES, context=640, prompts=2, room=None, seed=3)


def test_the_record_is_whole_and_adds_up(small, stories):
    record = small.to_json()
    assert small.complete and record["model"]["context"] == stories.context_length
    assert [point["recipe"] for point in small.points] == ["plain", *RECIPES]
    full, *others = small.points
    assert full["kv_share"] == full["read_share"] == full["share"] == 1.0
    for point in small.points:
        assert set(point["tasks"]) == set(TASKS) and point["texts"] == 2
        assert point["share"] == min(point["kv_share"], point["read_share"])
        for task in point["tasks"].values():
            assert (task["right"] is None) or 0 <= task["right"] <= 1
    assert full["tasks"]["needle"]["questions"] == 6 and full["tasks"]["copy"]["questions"] == 2
    assert all(task["increase"] == 0 for task in full["tasks"].values())
    for point in others:
        for name, task in point["tasks"].items():
            assert task["increase"] == pytest.approx(task["loss"] - full["tasks"][name]["loss"])
    assert others[0]["kv_share"] < 0.3 and others[2]["read_share"] == pytest.approx(0.1, abs=0.01)
    assert any("past the 512" in line for line in small.warnings)
    assert json.loads(json.dumps(record)) == record


def test_what_does_not_fit_is_listed_with_the_reason(stories):
    found = compare_memory(stories, ["hisa:weights=/nowhere"], context=640, room=None)
    assert [point["recipe"] for point in found.points] == ["plain"]
    assert any(line.startswith("not measured: hisa:weights=/nowhere: ") for line in found.warnings)


def test_files_go_there_and_back(small, tmp_path):
    results, report = small.write(tmp_path)
    assert MemoryComparison.read(results).record == small.record and report.read_text().startswith("<!doctype html>")
    with pytest.raises(InputError, match="no record of tokenary compare "):
        Comparison.read(results)


def test_everything_is_checked_before_any_work(stories):
    with pytest.raises(OptionError, match="context"):
        compare_memory("nowhere", context=100)
    with pytest.raises(OptionError, match="prompts"):
        compare_memory("nowhere", prompts=0)
    with pytest.raises(OptionError, match="budgets"):
        compare_memory("nowhere", budgets=[0.0])
    with pytest.raises(OptionError, match="keep"):
        compare_memory("nowhere", ["random:keep=120%"])
    with pytest.raises(RecipeError, match="neither keeps"):
        compare_memory(stories, ["prompt-lookup"], context=640, room=None)
    with pytest.raises(InputError, match="no tokenizer"):
        compare_memory(tiny_lm(), context=640)


def test_ctrl_c_keeps_what_was_asked_by_then(stories):
    def stop(step):
        if step.stage == "text 2" and step.detail == "random:keep=25%":
            raise KeyboardInterrupt

    found = compare_memory(stories, RECIPES, context=640, prompts=2, room=None, seed=3, progress=stop)
    texts = {point["recipe"]: point["texts"] for point in found.points}
    assert not found.complete and texts == {"plain": 2, RECIPES[0]: 2, RECIPES[1]: 1, RECIPES[2]: 1}
    assert findings(found.record)[0].startswith("Interrupted.")
    assert any("interrupted" in line for line in found.warnings)


def test_ctrl_c_before_any_answer_goes_on_up(stories):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_memory(stories, RECIPES, context=640, room=None, progress=stop)


def test_progress_counts_every_memory_and_prompt(stories):
    steps = []
    compare_memory(stories, RECIPES[:1], context=640, prompts=2, room=None, progress=steps.append)
    assert [step.detail for step in steps[:3]] == ["prompt", "plain", RECIPES[0]]
    assert steps[-1].stage == "done" and steps[-1].done == steps[-1].total == 6


def test_the_table_holds_every_point(small):
    from rich.console import Console

    console = Console(record=True, width=200, file=io.StringIO())
    console.print(small.table())
    text = console.export_text()
    for point in small.points:
        assert point["recipe"] in text and cells(point)[1] in text
    assert all(len(cells(point)) == len(columns(small.record)) for point in small.points)


def test_the_headline_follows_the_figures(small):
    record = json.loads(json.dumps(small.record))
    first, best = record["points"][0], record["points"][1]
    for task in first["tasks"].values():
        task["right"] = None if task["right"] is None else 0.75
    for task in best["tasks"].values():
        task["increase"] = -9.0
    said = findings(record)
    assert "75% of what was hidden is found with the full cache" in said[0]
    assert best["recipe"] in said[1] and "9.00 nats a token less than with all" in said[1]
    best["share"] = 0.6
    assert not any(best["recipe"] in sentence for sentence in findings(record))


def test_the_page_has_a_plot_for_each_workload_and_asks_for_nothing_from_outside(small):
    record = json.loads(json.dumps(small.record))
    record["left_out"] = ["<script>alert(1)</script>"]
    page = Page(render(record))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id", "").startswith("plot-")]
    assert ids == [f"plot-{task}" for task in TASKS]
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe") and "src" not in attributes
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert all(plot["label"] and len(plot["body"]) == len(small.points) for plot in plots(record))


def test_every_figure_is_one_that_plotly_knows(small):
    import plotly.graph_objects as go

    for plot in plots(small.record):
        go.Figure(plot["figure"])


FAKE = """
import json, sys
request = json.load(sys.stdin)
for number, haystack in enumerate(request["haystacks"]):
    for keep in request["keep"]:
        print(json.dumps({
            "name": f"Press:keep={keep:g}%", "haystack": number, "kv_bytes": 1000, "read_tokens": 9.0, "seconds": 1.0,
            "losses": [[0.5] * len(q["answer"]) for q in haystack["questions"]],
            "likely": [q["answer"] for q in haystack["questions"]],
        }), flush=True)
    print(json.dumps({"failed": "Other: it failed"}), flush=True)
    print(json.dumps({"done": number}), flush=True)
"""


def test_presses_are_rows_of_their_own(stories, tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(peers_module, "SCRIPT", script)
    monkeypatch.setattr(peers_module, "python_of", lambda folder: Path(sys.executable))
    steps = []
    found = compare_memory(stories, [], context=640, budgets=[10, 20], room=None, peers=True, progress=steps.append)
    peers = [point for point in found.points if point["peer"]]
    assert [point["recipe"] for point in peers] == ["kvpress Press:keep=10%", "kvpress Press:keep=20%"]
    assert {point["curve"] for point in peers} == {"kvpress Press"}
    assert peers[0]["tasks"]["needle"]["right"] == 1.0 and peers[0]["tasks"]["copy"]["loss"] == 0.5
    assert "not measured: kvpress Other: it failed" in found.warnings
    assert steps[-1].done == steps[-1].total

    script.write_text("import sys; sys.exit('no such press')")
    found = compare_memory(stories, [], context=640, room=None, peers=True)
    assert any("kvpress" in line and "no such press" in line for line in found.warnings)


def test_without_its_environment_kvpress_is_left_out(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(peers_module, "environment", lambda: tmp_path)
    found = compare_memory(stories, [], context=640, room=None, peers=True)
    assert any("install_kvpress" in line for line in found.warnings)
