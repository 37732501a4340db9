"""Retention, its bootstrap, FLOPs and bytes: against counts made by hand and by torch itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenary.bench.reduction import (
    Interval,
    block_flops,
    kv_bytes,
    measure_times,
    retained,
    retention,
    run_arm,
    summary,
    vlm_flops,
)
from tokenary.core.errors import InputError
from tokenary.models.bench_vlm import VOCABULARY
from tokenary.models.bench_vlm.batches import Batch, Questions
from tokenary.models.bench_vlm.scenes import Turn
from tokenary.reduce.blind import Blind
from tokenary.reduce.law_tools import pictures, toy_vlm
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom


def answers(*rates: float, n: int = 400) -> list[np.ndarray]:
    """Nested right answers: who answers less answers right a part of what the other does."""
    drawn = np.random.default_rng(0).random(n)
    return [drawn < rate for rate in rates]


def test_retention_is_what_the_picture_adds():
    assert retention(0.6, 0.9, 0.3) == pytest.approx(0.5)
    assert math.isnan(retention(0.5, 0.4, 0.4))
    reduced, full, blind = answers(0.6, 0.9, 0.3)
    found = retained(reduced, full, blind)
    by_hand = (reduced.mean() - blind.mean()) / (full.mean() - blind.mean())
    assert found.value == pytest.approx(by_hand) and found.low < found.value < found.high
    assert retained(full, full, blind) == Interval(1.0, 1.0, 1.0)
    assert retained(blind, full, blind) == Interval(0.0, 0.0, 0.0)
    # seeds are averaged before anything else
    assert retained(np.stack([reduced, full]), full, blind).value == pytest.approx((by_hand + 1) / 2)


def test_the_interval_is_that_of_resampled_questions():
    reduced, full, blind = answers(0.6, 0.9, 0.3, n=200)
    found = retained(reduced, full, blind, resamples=4000)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(4000):
        rows = rng.integers(0, 200, 200)
        drawn.append(retention(reduced[rows].mean(), full[rows].mean(), blind[rows].mean()))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02) and found.high == pytest.approx(high, abs=0.02)


def test_families_count_alike_and_differences_are_paired():
    reduced, full, blind = answers(0.6, 0.9, 0.3, n=300)
    families = ["a"] * 60 + ["b"] * 240
    found = retained(reduced, full, blind, families)
    parts = [retained(reduced[s], full[s], blind[s]).value for s in (slice(60), slice(60, 300))]
    assert found.value == pytest.approx(np.mean(parts))
    same = retained(reduced, full, blind, families, minus=reduced)
    assert same == Interval(0.0, 0.0, 0.0)
    other = reduced.copy()
    other[:30] = ~other[:30]
    apart = retained(reduced, full, blind, families, minus=other)
    assert apart.value == pytest.approx(found.value - retained(other, full, blind, families).value)


def test_where_seeing_does_not_help_there_is_no_figure():
    reduced, full, blind = answers(0.5, 0.5, 0.5, n=50)
    found = retained(reduced, full, blind)
    assert math.isnan(found.value) and found.to_json() == {"value": None, "low": None, "high": None}
    with pytest.raises(InputError):
        retained(reduced, full[:-1], blind)


@pytest.mark.parametrize(("at", "keep"), [("encoder", "25%"), ("vision:0", 16), ("decoder:2", 16)])
def test_flops_are_those_that_torch_counts(at, keep):
    model, pixels = toy_vlm(), pictures(1)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")])
    with ReducePool(keep=keep).attach(model, at) as reduced:
        seen = reduced.image_tokens(pixels)
        reduced(seen, ids)  # for the counts
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            reduced(reduced.image_tokens(pixels), ids)
    ours = vlm_flops(model.config, reduced.vision_tokens, reduced.language_tokens, reduced.views)
    head = 2 * ids.shape[1] * model.config.width * model.config.vocab_size
    assert counter.get_total_flops() == pytest.approx(ours + head, rel=0.01)


def test_gated_blocks_and_shared_keys():
    assert block_flops(10, 8, inner=32) == 2 * 10 * (4 * 64 + 2 * 8 * 32) + 4 * 100 * 8
    assert block_flops(1, 8, inner=16, matrices=3, kv_width=2) == 2 * (2 * 64 + 2 * 16 + 3 * 128) + 4 * 8
    assert kv_bytes(toy_vlm().config, [10, 10, 4, 4]) == 2 * 2 * 32 * 28


def held_out() -> Questions:
    said = [VOCABULARY.turn("is there a red star ?", "yes"), VOCABULARY.turn("is there a red star ?", "no")] * 3
    batch = Batch(
        pictures(6), torch.tensor([ids for ids, _ in said]), torch.tensor([p for _, p in said]), torch.zeros(6, 8, 8)
    )
    return Questions(batch, [], [Turn("", "", "existence", "random")] * 6)


def test_arms_are_answered_and_counted():
    model, data = toy_vlm(), held_out()
    full = run_arm(model, "all", [None], data)
    blind = run_arm(model, "blind", [Blind()], data)
    without = run_arm(model, "none", [None], data, blind=True)
    seeds = run_arm(model, "random", [ReduceRandom(keep=16, seed=seed) for seed in range(3)], data, batch=4)
    assert (full.kept, blind.kept, seeds.kept) == (64, 0, 16)
    assert seeds.right.shape == (3, 6) and np.array_equal(blind.right, without.right)
    assert full.flops > seeds.flops > blind.flops > without.flops > 0
    assert full.kv_bytes - seeds.kv_bytes == 4 * 2 * 2 * 32 * 48
    rows = summary([seeds], full, blind, [turn.family for turn in data.turns], resamples=50)
    assert rows[0]["name"] == "random" and set(rows[0]["families"]) == {"existence"}


def test_times_are_parts_of_each_other_and_leave_nothing():
    model, reducer = toy_vlm(), ReducePool(keep=16)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")])
    found = measure_times(model, reducer, pictures(1), ids, repeats=2)
    assert 0 < found.plan < found.prefill and found.encode > 0
    assert "plan" not in vars(reducer)
    assert measure_times(model, None, pictures(1), ids, repeats=1).plan == 0
