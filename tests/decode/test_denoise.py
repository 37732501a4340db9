from __future__ import annotations

from typing import Annotated

import pytest
import torch
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.laws import check_class
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.decode import denoise_laws as laws
from tokenary.decode.confidence import Confidence, fill
from tokenary.decode.denoise import Denoise, Pass, Unmasker, Window, WindowState, most_confident
from tokenary.decode.denoise_laws import MASK, RAGGED, net, run, texts
from tokenary.decode.local_leap import LocalLeap
from tokenary.decode.window_diffusion import WindowDiffusion
from tokenary.hf.strategy import Task
from tokenary.models.tiny import tiny_lm

CARD = Card(slug="here", cls="Here", room="decode", title="", summary="", slot="unmask")


def slow(model, prompt, new, block, threshold=1.0, seed=None, end_tokens=()):
    """The obvious formulation: whole logits, Python loops, one text, no templates."""
    ids, passes = [*prompt, *[MASK] * new], 0
    for start in range(len(prompt), len(ids), block or new):
        end = min(start + (block or new), len(ids))
        while MASK in ids[start:end]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            logits[:, MASK] = float("-inf")
            found = {}
            for i in range(start, end):
                if ids[i] == MASK:
                    p = logits[i].softmax(-1)
                    token = int(p.argmax())
                    if seed is not None:
                        number = substream(seed, "denoise", 0, passes).random(i + 1)[i]
                        token = int((p.cumsum(0) > number).int().argmax())
                    found[i] = (float(p[token]), token)
            best = max(found, key=lambda i: (found[i][0], -i))
            for i, (confidence, token) in found.items():
                if i == best or (threshold < 1 and confidence >= threshold):
                    ids[i] = token
            passes += 1
    for i in range(len(prompt), len(ids)):
        if ids[i] in end_tokens:
            return ids[: i + 1], passes
    return ids, passes


@pytest.mark.parametrize("block", [0, 8, 32])
@pytest.mark.parametrize("threshold", [1.0, 0.8])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_loop_is_the_obvious_one(block, threshold, seed):
    model, prompt = net(), RAGGED[1]
    sampler = Sampler() if seed is None else Sampler(temperature=1.0, seed=seed)
    loop = run(model, Confidence(threshold=threshold, block=block), [prompt], sampler=sampler)
    ids, passes = slow(model, prompt, laws.NEW, block, threshold, seed)
    assert texts(loop) == [ids]
    assert loop.sequences[0].trace.passes == passes
    if threshold < 1 and seed is None:
        assert passes < laws.NEW  # else the threshold is not tried


@pytest.mark.parametrize("law", laws.UNMASK_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Confidence, {}),
        (Confidence, {"threshold": 0.8, "tokens": 3, "block": 5}),
        (Confidence, {"order": "random", "block": 0}),
        (LocalLeap, {"anchor": 0.9, "relaxed": 0.7, "block": 8}),
    ],
)
def test_laws_of_unmasking(method, options, law):
    report = check_class(method, (law,), **options)
    assert report.ok, str(report)


@pytest.mark.parametrize("law", laws.WINDOW_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 8, "active": 3, "refresh": 4},
        {"window": 8, "active": 3, "refresh": 5, "buffer": False, "transient": False, "early_stop": True},
    ],
)
def test_laws_of_windows(options, law):
    report = check_class(WindowDiffusion, (law,), **options)
    assert report.ok, str(report)


def test_tokens_a_pass():
    """A fixed number a pass needs the fewest passes that blocks allow."""
    loop = run(net(), Confidence(tokens=5, block=12), RAGGED[:1], new=24)
    assert [committed for _, committed in loop.sequences[0].trace.per_pass] == [5, 5, 2, 5, 5, 2]


def test_left_to_right_is_left_to_right():
    loop = laws.loop_of(net(), Confidence(order="left"), RAGGED[:2])
    placed = [emission.at for emissions in loop for emission in emissions if emission.row == 0]
    assert placed == [[i] for i in range(laws.NEW)]


def test_a_template_is_filled_and_nothing_is_appended():
    prompt = [5, 6, MASK, MASK, 9, MASK, 11]
    sequence = run(net(), None, [prompt], new=0).sequences[0]
    assert (sequence.n_prompt, len(sequence.ids)) == (2, 7)
    assert [sequence.ids[i] for i in (0, 1, 4, 6)] == [5, 6, 9, 11] and MASK not in sequence.ids
    assert run(net(), None, [[5, 6]], new=0).sequences[0].new_ids == []


def test_gaps_of_a_template_come_first_in_blocks_from_its_start():
    prompt = RAGGED[2]  # gaps at 2, 3, 4 and 27 of 30
    loop = laws.loop_of(net(), Confidence(block=4, tokens=4), [prompt], new=6)
    placed = [emission.at for emissions in loop for emission in emissions]
    first = loop.sequences[0].n_prompt
    assert [[at + first for at in pass_] for pass_ in placed] == [[2, 3], [4], [27], [30, 31, 32, 33], [34, 35]]


def test_an_end_token_saves_the_passes_behind_it():
    model, prompt = net(), RAGGED[0]
    full = run(model, Confidence(block=4), [prompt]).sequences[0]
    end = full.new_ids[5]
    first = full.new_ids.index(end)
    cut = run(model, Confidence(block=4), [prompt], end_tokens=[end]).sequences[0]
    assert cut.finish == "stop" and cut.new_ids == full.new_ids[: first + 1]
    assert cut.trace.passes <= (first // 4 + 1) * 4 < full.trace.passes


def test_an_end_token_inside_a_template_is_text():
    model = net()
    prompt = [5, 6, MASK, 7, 8]
    filled = run(model, None, [prompt], new=3).sequences[0].ids
    again = run(model, None, [prompt], new=3, end_tokens=[filled[2]]).sequences[0].ids
    assert again[:5] == filled[:5]


def test_stop_texts_end_where_they_are_complete():
    model, prompt = net(), RAGGED[0]
    full = run(model, None, [prompt]).sequences[0].ids
    want = full[len(prompt) + 3 : len(prompt) + 5]
    task = Task(model, None, [prompt], Sampler(), laws.NEW, (), lambda row, ids: list(ids[-2:]) == want)
    loop = Denoise(task)
    for _ in loop:
        pass
    size = next(n for n in range(len(prompt) + 1, len(full) + 1) if full[n - 2 : n] == want)
    assert loop.sequences[0].ids == full[:size] and loop.sequences[0].finish == "stop"


def test_models_that_do_not_fit_are_refused_before_any_work():
    causal = tiny_lm().model
    with pytest.raises(UnsupportedModelError, match="no mask token"):
        Denoise(Task(causal, None, [[1]], Sampler(), 4))
    causal.config.mask_token_id = 1
    with pytest.raises(UnsupportedModelError, match="looks only backwards"):
        Denoise(Task(causal, None, [[1]], Sampler(), 4), None, WindowDiffusion())


@pytest.mark.parametrize("options", [{"threshold": 0}, {"tokens": 0}, {"block": -1}, {"order": "up"}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        Confidence(**options)


def test_a_probability_rounded_to_one_is_no_reason_to_hurry():
    confidence = torch.tensor([[1.0, 1.0, 0.5]], dtype=torch.float64)
    assert fill(confidence, confidence, 1.0, 1).sum() == 1
    assert fill(confidence, confidence, 0.999, 1).tolist() == [[True, True, False]]
    assert most_confident(confidence).tolist() == [[True, False, False]]


# --------------------------------------------------------------------------------------------- wrong ones are caught


class Right(Unmasker):
    def __init__(self, block: Annotated[int, Field(ge=0)] = 8) -> None:
        self.block = block

    def unmask(self, candidates):
        return most_confident(candidates.confidence)


class Nothing(Right):
    def unmask(self, candidates):
        return super().unmask(candidates) & (candidates.step < 3)


class Beyond(Right):
    def unmask(self, candidates):
        return super().unmask(candidates) | ~candidates.eligible


class ByPlace(Right):
    """Ranks by its place in the batch."""

    def unmask(self, candidates):
        chosen = super().unmask(candidates)
        return torch.cat([chosen[:1], candidates.eligible[1:]])


class Remembers(Right):
    seen = 0

    def unmask(self, candidates):
        self.seen += 1
        return candidates.eligible if self.seen > 40 else super().unmask(candidates)


class Skips(Window):
    """Attends to what was never computed."""

    def __init__(self, width: int = 4) -> None:
        self.width = width

    def begin(self):
        return SkipsState(self.width)


class SkipsState(WindowState):
    def __init__(self, width):
        self.width = width

    def plan(self, masked, fresh):
        return Pass(masked.nonzero()[: self.width, 0], None)


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Nothing, "every_mask_is_filled_once"),
        (Beyond, "every_mask_is_filled_once"),
        (ByPlace, "a_batch_is_its_sequences"),
        (Remembers, "nothing_of_earlier_texts_shows"),
        (Skips, "every_mask_is_filled_once"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_method_is_caught(method, law):
    chosen = tuple(found for found in laws.WINDOW_LAWS if found.__name__ == law)
    assert check_class(method, chosen).broken
    if issubclass(method, Right):
        assert check_class(Right, chosen).ok
