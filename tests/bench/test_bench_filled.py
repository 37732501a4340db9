"""Comparing ways to fill masks: their own figures, beside one token a pass."""

from __future__ import annotations

import pytest
import torch

from tokenary.bench import compare
from tokenary.bench.filled import agreement, pseudo_nll
from tokenary.bench.report import cells, findings, render
from tokenary.core.errors import OptionError
from tokenary.decode.denoise_laws import MASK, NEW, RAGGED, net
from tokenary.models import LM

RECIPES = ["confidence:tokens=2", "local-leap:anchor=0.5,relaxed=0.2", "window-diffusion:window=8,active=3,refresh=4"]


@pytest.fixture(scope="module")
def lm():
    return LM("toy", net(), None, "0" * 64, "here")


@pytest.fixture(scope="module")
def found(lm):
    return compare(lm, RECIPES, prompts=RAGGED[:3], max_new_tokens=NEW, rounds=1)


def test_pseudo_nll_masks_every_filled_token_in_turn(lm):
    prompt, ids = [5, MASK, 7, 8], [5, 6, 7, 8, 9, 10]
    expected = []
    for at in (1, 4, 5):
        seen = list(ids)
        seen[at] = MASK
        with torch.no_grad():
            expected.append(-float(lm.model(torch.tensor([seen])).logits[0, at].log_softmax(-1)[ids[at]]))
    assert pseudo_nll(lm, prompt, ids) == pytest.approx(sum(expected) / 3, abs=1e-4)


def test_agreement_looks_at_what_was_filled():
    prompt = [5, MASK, 7]
    assert agreement(prompt, [5, 6, 7, 8], [5, 6, 7, 9], MASK) == 0.5
    assert agreement(prompt, [5, 6, 7, 8, 9], [5, 6, 7], MASK) == pytest.approx(1 / 3)  # one has ended


def test_each_row_stands_beside_one_token_a_pass(found):
    plain, two, leap, window = found.rows
    assert plain["tokens_per_pass"] == 1 and plain["filled"]["same"] == 1 and plain["filled"]["increase_nats"] == 0
    assert 1.5 < two["tokens_per_pass"] <= 2 and leap["tokens_per_pass"] > 1 == window["tokens_per_pass"]
    sizes = [len(prompt) + NEW for prompt in RAGGED[:3]]
    masks = [prompt.count(MASK) + NEW for prompt in RAGGED[:3]]
    expected = sum(size * count for size, count in zip(sizes, masks, strict=True)) / sum(masks)
    assert plain["rows_per_token"] == pytest.approx(expected)
    assert window["rows_per_token"] < 0.7 * expected and window["kv_bytes"] and not plain["kv_bytes"]
    assert all(row["acceptance"] is None for row in found.rows)
    assert two["filled"]["same"] < 1 and two["filled"]["nats"] - plain["filled"]["nats"] == pytest.approx(
        two["filled"]["increase_nats"]
    )


def test_table_headline_and_page_say_so(found):
    record = found.to_json()
    assert cells(found.rows[0], record)[-1] == "the baseline"
    row = found.rows[1]
    assert cells(row, record)[-1].endswith(f"the same, {row['rows_per_token']:.0f} rows/token")
    assert "as one token a pass" in findings(record)[0]
    assert "rows/token" in render(record)


def test_peers_cannot_fill_masks(lm):
    with pytest.raises(OptionError, match="no peer runs toy"):
        compare(lm, RECIPES, prompts=RAGGED[:1], peers=True)
