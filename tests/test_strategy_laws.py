"""The laws of strategies hold for right strategies, and catch wrong ones."""

from __future__ import annotations

import inspect
from typing import Annotated

import numpy as np
import pytest
import torch
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.decoding import Decoding, Emission
from tokenary.core.laws import check_class, the_recipe_survives_json
from tokenary.core.sampling import invert
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.strategy import Strategy
from tokenary.strategy_laws import STRATEGY_LAWS

CARD = Card(slug="here", cls="Samples", room="decode", title="", summary="", slot="strategy")
HERE = tuple(law for law in STRATEGY_LAWS if law is not the_recipe_survives_json)  # that one needs the registry


class Samples(Strategy):
    """Independent samples; the answer is the likeliest. Its parts are methods, so that wrong ones can replace them."""

    def __init__(self, count: Annotated[int, Field(ge=1)] = 3) -> None:
        self.count = count

    def loop(self, task):
        return SamplesLoop(task, self)

    def number(self, task, text, branch):
        return substream(task.sampler.seed, "x", task.sampler.first_row + text.index, branch, len(text.ids)).random()

    def ends(self, task, text):
        if text.ids[-1] in task.end_tokens or (task.stops and task.stops(text.index, text.ids)):
            return "stop"
        return "length" if len(text.new_ids) >= task.max_new_tokens else None

    def copied(self, prompt):
        return list(prompt)

    def after_pass(self, rows):
        pass

    def emitted(self, emissions):
        return emissions


class SamplesLoop:
    def __init__(self, task, method):
        self.task, self.method, self.peak_bytes = task, method, 0
        self.sequences = [Decoding(row, method.copied(ids), len(ids)) for row, ids in enumerate(task.prompts)]
        self.branches = [[] for _ in task.prompts]

    @torch.inference_mode()
    def __iter__(self):
        task, method, target = self.task, self.method, self.task.target()
        for row, ids in enumerate(task.prompts):
            self.branches[row] = [Decoding(row, list(ids), len(ids)) for _ in range(method.count)]
        live = [(row, branch) for row in range(len(task.prompts)) for branch in range(method.count)]
        source = [row for row, _ in live]
        logits = target.prefill(task.prompts)[source]
        target.select_rows(source)
        while True:
            rows = [self.branches[row][branch] for row, branch in live]
            if task.sampler.greedy:
                tokens = logits.argmax(-1).tolist()
            else:
                numbers = [method.number(task, text, branch) for text, (_, branch) in zip(rows, live, strict=True)]
                tokens = invert(task.sampler.probabilities(logits), numbers)
            log_probs = logits.log_softmax(-1)
            emissions = []
            for at, ((row, branch), text, token) in enumerate(zip(live, rows, tokens, strict=True)):
                text.ids.append(token)
                text.log_weight += float(log_probs[at, token])
                text.finish = method.ends(task, text)
                emissions.append(Emission(row, [token], [False], text.finish, branch=branch))
            method.after_pass(rows)
            keep = [at for at, text in enumerate(rows) if text.finish is None]
            live = [live[at] for at in keep]
            for row, answer in enumerate(self.sequences):
                if answer.finish is None and not any(row == other for other, _ in live):
                    best = max(self.branches[row], key=lambda text: text.log_weight)
                    answer.ids += best.new_ids
                    answer.finish, answer.log_weight = best.finish, best.log_weight
                    emissions.append(Emission(row, best.new_ids, [False] * len(best.new_ids), best.finish))
            yield method.emitted(emissions)
            if not live:
                return
            target.select_rows(keep)
            logits = target.score(TokenTree.roots([self.branches[row][branch].ids[-1] for row, branch in live]))[:, 0]
            target.commit([[0]] * len(live))


class Single(Strategy):
    """Leaves the loop alone and chooses as the sampler does."""

    owns_loop = False

    def __init__(self) -> None:
        pass

    def chooser(self, task):
        return task.sampler


@pytest.mark.parametrize("method", [Samples, Single])
def test_a_right_strategy_breaks_nothing(method):
    report = check_class(method, HERE)
    assert report.ok, str(report)
    assert not [finding for finding in report.findings if finding.verdict == "skipped"]


def test_every_law_says_what_it_demands():
    for law in STRATEGY_LAWS:
        assert inspect.getdoc(law).partition("\n")[0].endswith("."), law.__name__


class Diffusion(Samples):
    @classmethod
    def card_of(cls):
        return Card(**{**CARD.to_dict(), "requires": ("diffusion",)})

    @property
    def card(self):
        return self.card_of()


def test_a_strategy_for_another_kind_of_model_is_skipped():
    report = check_class(Diffusion, HERE)
    assert report.ok
    assert {f.verdict for f in report.findings if f.law != "options are checked and fixed"} == {"skipped"}


# ------------------------------------------------------------------------------------- strategies that are wrong


class FromAStream(Samples):
    """Draws from a stream that it keeps."""

    def __init__(self, count: Annotated[int, Field(ge=1)] = 3) -> None:
        self.count, self.stream = count, np.random.default_rng(0)

    def number(self, task, text, branch):
        return self.stream.random()


class ByPlaceInBatch(Samples):
    """Names its numbers by the place in the batch, not in the call."""

    def number(self, task, text, branch):
        return substream(task.sampler.seed, "x", text.index, branch, len(text.ids)).random()


class EndsTogether(Samples):
    """Ends all texts of a batch with the first one."""

    def after_pass(self, rows):
        if any(text.finish for text in rows):
            for text in rows:
                text.finish = text.finish or "length"


class Counts(Samples):
    """Remembers how much it wrote."""

    def __init__(self, count: Annotated[int, Field(ge=1)] = 3) -> None:
        self.count, self.written = count, 0

    def number(self, task, text, branch):
        self.written += 1
        return (super().number(task, text, branch) + (0.5 if self.written > 400 else 0)) % 1


class KeepsQuiet(Samples):
    """Does not emit its answers."""

    def emitted(self, emissions):
        return [emission for emission in emissions if emission.branch is not None]


class Misplaces(Samples):
    """Emits the tokens of two branches as each other's."""

    def emitted(self, emissions):
        return [
            Emission(
                e.row, e.token_ids, e.from_draft, e.finish, None if e.branch is None else self.count - 1 - e.branch
            )
            for e in emissions
        ]


class TooLong(Samples):
    def ends(self, task, text):
        finish = super().ends(task, text)
        return None if finish == "length" and len(text.new_ids) == task.max_new_tokens else finish


class PastTheEnd(Samples):
    def ends(self, task, text):
        finish = super().ends(task, text)
        return None if finish == "stop" and text.ids[-1] in task.end_tokens else finish


class DeafToStops(Samples):
    def ends(self, task, text):
        if text.ids[-1] in task.end_tokens:
            return "stop"
        return "length" if len(text.new_ids) == task.max_new_tokens else None


class WritesThePrompt(Samples):
    def copied(self, prompt):
        return prompt


class Loose(Samples):
    def __setattr__(self, name, value):
        super().__setattr__(name, dict(value) if name == "options" else value)


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (FromAStream, "the same seed gives the same text"),
        (ByPlaceInBatch, "a batch is its prompts"),
        (EndsTogether, "a batch is its prompts"),
        (Counts, "nothing of earlier texts shows"),
        (KeepsQuiet, "emissions make every text"),
        (Misplaces, "emissions make every text"),
        (TooLong, "texts end where they should"),
        (PastTheEnd, "texts end where they should"),
        (DeafToStops, "stops are honoured"),
        (WritesThePrompt, "prompts are left alone"),
        (Loose, "options are checked and fixed"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_strategy_is_caught(method, law):
    function = next(one for one in STRATEGY_LAWS if one.__name__ == law.replace(" ", "_"))
    (finding,) = check_class(method, (function,)).findings
    assert finding.verdict == "broken"
    assert not finding.detail.startswith(("AttributeError", "TypeError")), finding.detail
