"""The laws of probes catch probes that are wrong on purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenary.core.card import Card
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.laws import check_class
from tokenary.probe import laws
from tokenary.probe.base import Probe, Report, Table, watched

CARD = Card(slug="here", cls="Length", room="probe", title="", summary="", slot="probe")
HERE = tuple(law for law in laws.LAWS["probe"] if law is not laws.the_recipe_survives_json)  # needs the registry


class Length(Probe):
    """Counts the tokens of a few words, drawn by the seed; right, and the base of the wrong ones."""

    def __init__(self, words: int = 3) -> None:
        self.words = words

    def draw(self, seed):
        return np.random.default_rng(seed).choice(laws.WORDS, self.words).tolist()

    def run(self, lm, seed=0, progress=None):
        if lm.tokenizer is None:
            raise UnsupportedModelError("no tokenizer")
        rows = [[word, len(lm.encode([word], raw=True)[0])] for word in watched(self.draw(seed), progress)]
        return self.report(lm, rows)

    def report(self, lm, rows):
        return Report("here", lm.name, {"words": len(rows)}, [Table("Words", ["word", "tokens"], rows)])


def test_a_right_probe_breaks_nothing():
    report = check_class(Length, HERE)
    assert report.ok, str(report)


class NotPlain(Length):
    def report(self, lm, rows):
        return Report("here", lm.name, {"words": np.int64(3)}, [Table("Words", ["word"], [["a"]])])


class NotFinite(Length):
    def report(self, lm, rows):
        return Report("here", lm.name, {"words": float("nan")}, [Table("Words", ["word"], [["a"]])])


class Ragged(Length):
    def report(self, lm, rows):
        return Report("here", lm.name, {"words": 3}, [Table("Words", ["word", "tokens"], [["a"]])])


class Moody(Length):
    def draw(self, seed):
        return np.random.choice(laws.WORDS, self.words).tolist()


class Remembers(Length):
    def draw(self, seed):
        self.calls = getattr(self, "calls", 0) + 1
        return super().draw(seed + self.calls)


class Trains(Length):
    def run(self, lm, seed=0, progress=None):
        found = super().run(lm, seed, progress)
        lm.model.train()
        return found


class Writes(Length):
    def run(self, lm, seed=0, progress=None):
        found = super().run(lm, seed, progress)
        with torch.no_grad():
            next(lm.model.parameters())[0, 0] += 1
        return found


class Draws(Length):
    def run(self, lm, seed=0, progress=None):
        found = super().run(lm, seed, progress)
        torch.rand(1)
        return found


class Silent(Length):
    def run(self, lm, seed=0, progress=None):
        return super().run(lm, seed)


class StopsShort(Length):
    def run(self, lm, seed=0, progress=None):
        return super().run(lm, seed, progress and (lambda done, total: progress(done, total + 1)))


class TakesAll(Length):
    def run(self, lm, seed=0, progress=None):
        return self.report(lm, [["a", 1]]) if lm.tokenizer is None else super().run(lm, seed, progress)


@pytest.mark.parametrize(
    ("probe", "law"),
    [
        (NotPlain, laws.a_report_is_plain_and_complete),
        (NotFinite, laws.a_report_is_plain_and_complete),
        (Ragged, laws.a_report_is_plain_and_complete),
        (Moody, laws.the_seed_decides),
        (Remembers, laws.no_state_between_runs),
        (Trains, laws.the_model_stays_as_it_was),
        (Writes, laws.the_model_stays_as_it_was),
        (Draws, laws.the_model_stays_as_it_was),
        (Silent, laws.progress_goes_up_to_the_total),
        (StopsShort, laws.progress_goes_up_to_the_total),
        (TakesAll, laws.a_model_without_tokenizer_is_refused),
    ],
    ids=lambda value: value.__name__,
)
def test_a_wrong_probe_is_caught(probe, law):
    assert check_class(probe, (law,)).broken
