"""Teacher forcing: the likelihood of a full cache is the model's own, and keeping everything changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenary.bench.quality import Quality, at_budget, evaluate, memory_only, sliding_texts, sweep, teacher_forced
from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe
from tokenary.models import tiny_lm

RNG = np.random.default_rng(3)
TEXTS = RNG.integers(1, 97, (3, 90)).tolist()
P = 50


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(seed=2, layers=3)


def log_likelihood(lm, texts, prompt_tokens):
    """The reference: one full pass, no cache; negative log-likelihoods (B, T)."""
    ids = torch.tensor(texts)
    with torch.no_grad():
        logits = lm.model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[:, prompt_tokens - 1 :]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("piece", [1, 7, 16, 64])
def test_a_full_cache_gives_the_models_own_likelihood(family, piece):
    lm = tiny_lm(seed=2, family=family)
    losses, prompt_bytes, end_bytes = teacher_forced(lm, None, TEXTS, P, piece)
    assert losses.shape == (3, 40)
    torch.testing.assert_close(losses, log_likelihood(lm, TEXTS, P), rtol=0, atol=1e-4)
    assert 0 < prompt_bytes <= end_bytes


@pytest.mark.parametrize("slug", ["keyformer", "random", "recent"])
def test_keeping_everything_changes_nothing(lm, slug):
    full, _, full_bytes = teacher_forced(lm, None, TEXTS, P)
    kept, _, kept_bytes = teacher_forced(lm, f"{slug}:keep=100%", TEXTS, P)
    assert torch.equal(full, kept) and kept_bytes == full_bytes


@pytest.mark.parametrize("slug", ["keyformer", "random", "recent"])
def test_keeping_less_changes_the_likelihood_and_frees_bytes(lm, slug):
    full, _, full_bytes = teacher_forced(lm, None, TEXTS, P)
    kept, _, kept_bytes = teacher_forced(lm, f"{slug}:keep=30%", TEXTS, P)
    assert torch.equal(full[:, 0], kept[:, 0])  # the prompt itself is read in full
    assert (full[:, 1:] - kept[:, 1:]).abs().max() > 1e-3
    assert kept_bytes < 0.75 * full_bytes


def test_pieces_never_skip_a_reduction(lm):
    """However long a piece may be, tokens meet the same reductions as when they come one at a time."""
    one, _, _ = teacher_forced(lm, "recent:keep=40%,interval=5", TEXTS, P, piece=1)
    many, _, _ = teacher_forced(lm, "recent:keep=40%,interval=5", TEXTS, P, piece=64)
    torch.testing.assert_close(one, many, rtol=0, atol=1e-4)


def test_batches_do_not_mix(lm):
    whole = evaluate(lm, "random:keep=40%", TEXTS, P, batch_size=3)
    single = evaluate(lm, "random:keep=40%", TEXTS, P, batch_size=1)
    assert whole.nll == pytest.approx(single.nll, abs=1e-5)
    assert whole.nll[0] != pytest.approx(whole.nll[1], abs=1e-3)


def test_drafts_are_no_matter_of_quality(lm):
    assert (
        evaluate(lm, "token-recycling + recent:keep=40%", TEXTS, P).nll == evaluate(lm, "recent:keep=40%", TEXTS, P).nll
    )
    assert memory_only(Recipe.parse("token-recycling")) is None


def test_statistics():
    full = Quality("plain", (1.0, 2.0, 3.0), 10, 5, 100, 90)
    other = Quality("x", (1.1, 2.3, 3.2), 10, 5, 40, 45)
    assert (
        full.mean == 2 and full.bits == pytest.approx(2 / math.log(2)) and full.perplexity == pytest.approx(math.exp(2))
    )
    assert full.stderr == pytest.approx(1 / math.sqrt(3))
    nats, error = other.increase(full)
    assert nats == pytest.approx(0.2) and error == pytest.approx(0.1 / math.sqrt(3))
    record = other.to_json(full)
    assert record["increase_percent"] == pytest.approx(100 * (math.exp(0.2) - 1))
    assert record["kv_share"] == 0.4 and record["prompt_kv_share"] == 0.5 and record["texts"] == 3


def test_a_sweep_has_the_controls_and_computes_the_full_cache_once(lm):
    steps = []
    found = list(sweep(lm, ["keyformer:keep=40%", "prompt-lookup"], TEXTS, P, (30, 60), steps.append))
    assert [policy for policy, _ in found].count("plain") == 1
    assert {policy for policy, _ in found} == {"plain", "keyformer", "random", "recent"}
    assert [point.recipe for policy, point in found if policy == "keyformer"] == [
        "keyformer:keep=30%", "keyformer:keep=60%", "keyformer:keep=40%",
    ]  # fmt: skip
    assert [point.recipe for policy, point in found if policy == "recent"] == ["recent:keep=30%", "recent:keep=60%"]
    assert steps[-1].done == steps[-1].total == len(found) == 8
    assert next(sweep(lm, ["prompt-lookup"], TEXTS, P))[1].recipe == "plain"


def test_budgets_replace_each_other_and_leave_other_options():
    assert str(at_budget(Recipe.parse("keyformer:bytes=2MB,recent=0.5"), "25%")) == "keyformer:keep=25%,recent=0.5"
    for wrong in (0, 101):
        with pytest.raises(OptionError, match="budgets"):
            sweep(None, [], [], 0, (wrong,))


def test_bad_texts_are_refused(lm):
    for texts, prompt, words in (
        ([], 5, "one length"),
        ([[1, 2, 3]], 3, "one length"),
        ([[1, 2, 3], [1, 2]], 1, "one length"),
        ([[1] * 600], 500, "past"),
    ):
        with pytest.raises(InputError, match=words):
            teacher_forced(lm, None, texts, prompt)


def test_sliding_texts_are_spaced_evenly_and_apart(stories):
    text = "Once upon a time there was a little girl named Lily. " * 60
    body = stories.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = sliding_texts(stories, text, 4, 100)
    lead = stories.encode(["x"], raw=True)[0][:1]
    for number, piece in enumerate(pieces):
        start = number * (len(body) // 4)
        assert piece == [*lead, *body[start : start + 99]]
    moved = sliding_texts(stories, text, 4, 100, shift=0.5)
    slack = (len(body) // 4 - 99) // 2
    assert moved[1] == [*lead, *body[len(body) // 4 + slack : len(body) // 4 + slack + 99]]
    with pytest.raises(InputError, match="too few"):
        sliding_texts(stories, text, 4, 10_000)
    with pytest.raises(OptionError):
        sliding_texts(stories, text, 4, 100, shift=1.0)


def test_a_model_without_tokenizer_cannot_cut_texts(lm):
    with pytest.raises(InputError, match="no tokenizer"):
        sliding_texts(lm, "text", 1, 2)


def test_a_trained_model_predicts_its_own_kind_of_text_and_suffers_from_forgetting(stories):
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 12
    (ids,) = sliding_texts(stories, text, 1, 300)
    full = evaluate(stories, None, [ids], 220)
    assert full.nll[0] < 1.0 < math.log(512)  # it has read the story before
    assert evaluate(stories, "recent:keep=4,sinks=0", [ids], 220).nll[0] > full.nll[0]
