"""Every method of the registry keeps the laws of its room, and the laws catch methods that do not."""

from __future__ import annotations

import inspect
from typing import Annotated

import numpy as np
import pytest
import torch
from pydantic import Field

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.laws import check, check_class, laws_of
from tokenary.core.registry import cards
from tokenary.core.sampling import Sampler
from tokenary.core.token_map import Segment, Select
from tokenary.core.tree import TokenTree
from tokenary.decode import laws as drafting
from tokenary.decode.base import Proposer
from tokenary.decode.width import DraftWidth
from tokenary.memory import laws as keeping
from tokenary.memory.base import KeepLayer, KeepPolicy

SLUGS = [card.slug for card in cards()]
#: Laws that a method cannot be held to: PBS-Attn thins whole prompts, and what comes behind them reads everything.
#: STILL's memory follows from the length of a text, and it attends to prompts in its own way.
DO_NOT_FIT = {
    "pbs-attn": {"a query reads no more than it may", "pieces of a prompt change nothing"},
    "still": {"the budget is kept", "memory really falls", "keys stay those of their tokens"},
}
CARD = Card(slug="here", cls="Here", room="decode", title="", summary="", slot="draft", lossless=True)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_method_keeps_the_laws_of_its_room(slug):
    report = check(slug)
    assert len(report.findings) == len(laws_of(slug))
    assert report.ok, str(report)
    skipped = {finding.law for finding in report.findings if finding.verdict == "skipped"}
    assert skipped == DO_NOT_FIT.get(slug, set())


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("token-recycling", {"nodes": 80, "prompt": True}),
        ("token-recycling", {"nodes": 5, "k": 2, "recycle": "accepted"}),
        ("aded", {"search": "beam", "drift": "shared"}),
        ("keyformer", {"keep": "25%", "interval": 4, "layers": "pyramid"}),
        ("keyformer", {"keep": 20, "noise": "none", "recent": 0.5}),
        ("random", {"keep": "30%", "recent": 0, "layers": "pyramid", "interval": 5}),
        ("recent", {"keep": 12, "sinks": 0, "interval": 1}),
        ("token-select", {"reuse": 0.7}),
        ("fasa", {"sets": "group", "pairs": "adjacent", "dense": 0}),
    ],
)
def test_they_hold_for_other_options_too(slug, options):
    report = check(slug, **options)
    assert report.ok, str(report)


def test_every_law_says_what_it_demands():
    for law in {law for slug in SLUGS for law in laws_of(slug)}:
        statement = inspect.getdoc(law).partition("\n")[0]
        assert statement.endswith("."), law.__name__


# ----------------------------------------------------------------------------------- proposers that are wrong


class Guess(Proposer):
    """Drafts a chain of the tokens that stood a few places back: right now and then, as toy nets repeat themselves."""

    def __init__(self, nodes: Annotated[int, Field(ge=1)] = 4) -> None:
        self.width = DraftWidth(nodes, fixed=nodes)

    def draft(self, context, nodes):
        return [context[-1], *context[-7:][:nodes]]

    def propose(self, contexts, nodes):
        return TokenTree.chains([self.draft(context, nodes) for context in contexts])


def breaks(method, laws, name):
    """Whether a method breaks the law of that name."""
    law = next(law for law in laws if law.__name__ == name.replace(" ", "_"))
    return bool(check_class(method, (law,)).broken)


DRAFT = drafting.LAWS["draft"]
RECIPE = drafting.the_recipe_survives_json  # needs the registry
DRAFT_HERE = tuple(law for law in DRAFT if law is not RECIPE)


def test_a_right_proposer_breaks_nothing():
    report = check_class(Guess, DRAFT_HERE)
    assert report.ok, str(report)


class WrongRoot(Guess):
    def draft(self, context, nodes):
        return [context[0], *context[-7:][:nodes]]


class TooMany(Guess):
    def draft(self, context, nodes):
        return [context[-1], *(context * 3)[: nodes + 1]]


class ChildrenFirst(Guess):
    def propose(self, contexts, nodes):
        tree = super().propose(contexts, nodes)
        if tree.width > 2:
            tree.parents[:, 1] = 2
        return tree


class WritesContext(Guess):
    def propose(self, contexts, nodes):
        tree = super().propose(contexts, nodes)
        contexts[0][0] = (contexts[0][0] + 1) % 5
        return tree


class Moody(Guess):
    """Drafts at random, from no seed."""

    def draft(self, context, nodes):
        return [context[-1], *np.random.default_rng().integers(0, 5, nodes)]


class Stale(Guess):
    """Keeps a state for each row, and forgets to drop rows that ended."""

    def start(self, contexts):
        self.rows = [list(context) for context in contexts]

    def propose(self, contexts, nodes):
        first = [row[0] for row in self.rows[: len(contexts)]]
        ended = len(contexts) < len(self.rows)
        return TokenTree.chains([[f if ended else c[-1], 1] for f, c in zip(first, contexts, strict=True)])


class Closed(Guess):
    """Keeps a state for each row, and takes no sequence that joins."""

    def start(self, contexts):
        self.rows = list(contexts)

    def select_rows(self, rows):
        self.rows = [self.rows[row] for row in rows]

    def propose(self, contexts, nodes):
        return TokenTree.chains([[context[-1], row[0]] for context, row in zip(contexts, self.rows, strict=True)])


class Cheats(Guess):
    """Ends its own generation early where it should hand over to the loop."""

    def __call__(self, model, input_ids, **kwargs):
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)


class Crashes(Guess):
    def observe(self, tree, scores, paths):
        if len(tree.ids) == 2:
            raise ZeroDivisionError("two rows")


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (WrongRoot, "drafts are trees"),
        (TooMany, "drafts are trees"),
        (ChildrenFirst, "drafts are trees"),
        (WritesContext, "drafts are trees"),
        (Moody, "the same seed gives the same text"),
        (Stale, "a batch is its sequences"),
        (Closed, "sequences may join"),
        (Cheats, "left padding changes nothing"),
        (Crashes, "a batch is its sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_proposer_is_caught(method, law):
    assert breaks(method, DRAFT_HERE, law)


def test_samples_from_another_distribution_are_caught(monkeypatch):
    """The loop keeps drafts from changing samples; here it draws at another temperature than it says."""

    def cooler(temperature, seed):
        return Sampler(temperature=0.7 * temperature, seed=seed)

    monkeypatch.setattr(drafting, "Sampler", cooler)
    report = check_class(Guess, (drafting.samples_follow_the_model,))
    assert report.broken[0].detail.startswith("chi-square")


# ------------------------------------------------------------------------------------ policies that are wrong


class Newest(KeepPolicy):
    """A plain window: right, and the base of the wrong ones."""

    state: type[KeepLayer]

    def __init__(self, keep: Budget = Budget(ratio=0.5), interval: int = 8) -> None:  # noqa: B008
        super().__init__(keep, "uniform", interval)

    def layer(self, index):
        return self.state(self)


class NewestLayer(KeepLayer):
    def choose(self, row, held, kept):
        return Select(torch.arange(held - kept, held), num_tokens=held)


Newest.state = NewestLayer
KEEP_HERE = tuple(law for law in keeping.LAWS["keep"] if law is not keeping.the_recipe_survives_json)


def test_a_right_policy_breaks_nothing():
    report = check_class(Newest, KEEP_HERE)
    assert report.ok, str(report)


class Greedy(NewestLayer):
    """Keeps more than it may."""

    def choose(self, row, held, kept):
        return super().choose(row, held, min(held, kept + 1))


class ByRow(NewestLayer):
    """Chooses by the place in the batch."""

    def choose(self, row, held, kept):
        return Select(torch.arange(kept) if row else torch.arange(held - kept, held), num_tokens=held)


class ByPass(NewestLayer):
    """Reduces whenever a pass brought several tokens, so that drafting changes what is kept."""

    def keep(self, row, held, n_new, prompt):
        if not prompt and n_new > 1 and held > 20:
            return self.choose(row, held, held - 4)
        return super().keep(row, held, n_new, prompt)


class Unbounded(NewestLayer):
    """Lets a pass commit past the next reduction."""

    def room(self, row, held):
        return None


class Twice(NewestLayer):
    """Keeps one token twice."""

    def choose(self, row, held, kept):
        index = torch.arange(held - kept, held)
        index[0] = index[1]
        return Select(index, num_tokens=held)


class Forgets(NewestLayer):
    """Knows nothing of the budget of those who join."""

    def join(self, other, rows):
        pass


class Masks(NewestLayer):
    """Keeps everything and says that it does not."""

    def keep(self, row, held, n_new, prompt):
        return None


class Merges(NewestLayer):
    """Averages all tokens into equal groups."""

    def choose(self, row, held, kept):
        return Segment(torch.arange(held) * kept // held, kept)


class Remembers(NewestLayer):
    """Counts its choices over all texts, and chooses by the count."""

    def choose(self, row, held, kept):
        self.policy.count = getattr(self.policy, "count", 0) + 1
        start = (held - kept) if self.policy.count % 3 else 0
        return Select(torch.arange(start, start + kept), num_tokens=held)


@pytest.mark.parametrize(
    ("state", "law"),
    [
        (Greedy, "the budget is kept"),
        (ByRow, "a batch is its sequences"),
        (ByPass, "drafts change nothing"),
        (Unbounded, "drafts change nothing"),
        (Twice, "what was dropped stays dropped"),
        (Forgets, "sequences may join"),
        (Masks, "memory really falls"),
        (Merges, "keys stay those of their tokens"),
        (Remembers, "the same options give the same text"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_policy_is_caught(state, law, monkeypatch):
    monkeypatch.setattr(Newest, "state", state)
    assert breaks(Newest, KEEP_HERE, law)


class Loose(Newest):
    """Its options can be changed after construction."""

    def __setattr__(self, name, value):
        super().__setattr__(name, dict(value) if name == "options" else value)


def test_options_that_can_be_changed_are_caught():
    assert breaks(Loose, KEEP_HERE, "options are checked and fixed")
