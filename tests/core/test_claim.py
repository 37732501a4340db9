"""Verdicts are computed; one can come out any way."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.claim import Claim, Figure, Outcome

NUMBER = st.floats(0.01, 100)


def claim(direction="higher", threshold=1.25, effect="ratio", **more):
    return Claim("m", "m is better", "things", direction, threshold, run, "other things", {"which": 1}, effect, **more)


def run(seed=0, which=0):
    return Outcome(Figure("m", 2.0 - which + seed), Figure("old", 1.0), (Figure("none", 0.5), Figure("random", 0.9)))


def outcome(method, baseline, random=None, spread=0.0):
    controls = () if random is None else (Figure("random", random),)
    return Outcome(Figure("m", method, spread), Figure("old", baseline), controls)


@pytest.mark.parametrize(
    ("direction", "method", "baseline", "random", "spread", "verdict"),
    [
        ("higher", 2.0, 1.0, 0.5, 0.0, "shown"),
        ("higher", 1.25, 1.0, None, 0.0, "shown"),
        ("higher", 1.2, 1.0, 0.5, 0.0, "direction only"),
        ("higher", 1.0, 1.0, 0.5, 0.0, "not shown"),
        ("higher", 0.9, 1.0, 0.5, 0.0, "not shown"),
        ("higher", 2.0, 1.0, 2.0, 0.0, "not shown"),  # no better than chance
        ("higher", 2.0, 1.0, 0.5, 0.5, "not shown"),  # within twice the error
        ("higher", 2.0, 1.0, 0.5, 0.49, "shown"),
        ("higher", math.nan, 1.0, 0.5, 0.0, "not shown"),
        ("higher", 2.0, math.inf, 0.5, 0.0, "not shown"),
        ("lower", 0.5, 1.0, 0.9, 0.0, "shown"),
        ("lower", 0.9, 1.0, 0.95, 0.0, "direction only"),
        ("lower", 0.5, 1.0, 0.4, 0.0, "not shown"),
        ("lower", 1.5, 1.0, 2.0, 0.0, "not shown"),
    ],
)
def test_verdicts_of_ratios(direction, method, baseline, random, spread, verdict):
    assert claim(direction).judge(outcome(method, baseline, random, spread)) == verdict


@pytest.mark.parametrize(
    ("direction", "method", "baseline", "verdict"),
    [
        ("higher", 2.3, 1.0, "shown"),
        ("higher", 2.0, 1.0, "direction only"),
        ("lower", 1.0, 2.3, "shown"),
        ("lower", 2.0, 1.0, "not shown"),
    ],
)
def test_verdicts_of_differences(direction, method, baseline, verdict):
    assert claim(direction, 1.2, "difference").judge(outcome(method, baseline)) == verdict


@given(NUMBER, NUMBER, st.sampled_from(["higher", "lower"]))
def test_worse_is_never_shown(method, baseline, direction):
    verdict = claim(direction).judge(outcome(method, baseline))
    better = method > baseline if direction == "higher" else method < baseline
    assert (verdict == "not shown") == (not better)
    if better:
        assert (verdict == "shown") == (claim(direction).size(outcome(method, baseline)) >= 1.25)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_without_an_error_nothing_is_shown(error):
    assert claim().judge(Outcome(Figure("m", 2.0), Figure("old", 1.0), paired_spread=error)) == "not shown"


def test_a_record_is_complete_json_and_holds_both_runs():
    record = claim().record(seed=3, model={"name": "toy", "sha256": "00"})
    assert json.loads(json.dumps(record)) == record
    wanted = "slug claim metric value baseline controls direction threshold verdict held_out n runs spread seed "
    wanted += "minutes model versions device threads started_at"
    assert set(wanted.split()) <= set(record)
    assert record["value"] == 5.0 and record["verdict"] == "shown" and record["seed"] == 3
    assert record["held_out"]["value"] == 5.0  # another seed, the other things
    assert record["held_out"]["varied"] == "other things"
    assert record["model"] == {"name": "toy", "sha256": "00"}
    assert {"python", "torch", "transformers"} <= set(record["versions"])


def test_a_held_out_run_has_a_verdict_of_its_own():
    record = claim(threshold=1.5).record(seed=0)
    assert (record["verdict"], record["held_out"]["verdict"]) == ("shown", "shown")
    record = claim(threshold=2.0).record(seed=-1)
    assert (record["verdict"], record["held_out"]["verdict"]) == ("not shown", "not shown")


def test_without_a_gpu_nothing_is_run(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = claim(gpu=True).record()
    assert record["verdict"] == "needs a GPU" and "value" not in record
