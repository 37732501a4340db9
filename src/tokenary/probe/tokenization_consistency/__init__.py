"""Tokenization consistency (arXiv 2601.14658): edits that change the tokens of a word and leave the word.

Several sequences of tokens read alike. Asked to replace marked words and to leave the rest, a model may write a target
in other tokens: the ids say that something was edited, the text says that nothing was. Such a *phantom edit* is

    unchanged:  ids(out) = ids(in)      replaced:  text(out) != text(in)      phantom:  ids differ, text is the same

where the white space before the word does not count (the paper's definition) or does (strict). The ids that the model
chose are judged, never a text encoded anew. Eight classes say what differs.

Beside the paper's trials: how many encodings words have and what a tokenizer loses, the likelihood of a target's
encodings where the passage was copied up to it, the same trials with targets in odd tokens in the input (a model that
repeats the word in its own tokens edits text, not ids), words in odd tokens in free text, phantoms put into clean
copies to see that they are found, and masking with a random mask beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.data import prose, stdlib_code
from tokenary.models.lm import LM
from tokenary.probe.base import Probe, Progress, Report
from tokenary.probe.tokenization_consistency.codec import Codec
from tokenary.probe.tokenization_consistency.free import free_text
from tokenary.probe.tokenization_consistency.injection import sensitivity
from tokenary.probe.tokenization_consistency.likelihood import mean_mass
from tokenary.probe.tokenization_consistency.masking import What
from tokenary.probe.tokenization_consistency.outcomes import Tally, share
from tokenary.probe.tokenization_consistency.passages import WORD, code_lines, draw, packed
from tokenary.probe.tokenization_consistency.report import notes, tables
from tokenary.probe.tokenization_consistency.static import WORDS, lossy, missing_bytes, stability, word_counts
from tokenary.probe.tokenization_consistency.trials import (
    GREEDY,
    MASKED,
    ODD,
    RANDOM,
    SAMPLED,
    Trial,
    answer_all,
    make,
    over_banned,
    place_of,
)

CARD = Card(
    slug="tokenization-consistency",
    cls="TokenizationConsistency",
    room="probe",
    title="Say Anything but This: When Tokenizer Betrays Reasoning in LLMs",
    summary="finds edits that change a word's tokens and not the word, sorts them into eight classes, and masks them",
    slot="probe",
    paper="2601.14658",
    year=2026,
)

LEAST = 8  # words of a passage


class TokenizationConsistency(Probe):
    """Asks a model to replace marked words, and looks at the tokens of those that it wrote again.

    Parameters
    ----------
    trials : int
        Passages.
    targets : int
        Most words to replace in one; in long passages 5% of the words that are no stop words, as in the paper.
    words : int
        Most words of a passage: sentences are packed up to there. The paper's have 100 to 600.
    text : {"prose", "code"}
        Moby-Dick, or lines of Python.
    temperature, top_p, top_k : float, float, int
        Of sampling; the defaults are the paper's.
    mask : {"surface", "phantoms", "none"}
        What is masked in two more arms: every encoding of a target, as in the paper; only those that are not its own;
        nothing, which leaves the arms out.
    odd_input : bool
        Whether the trials are repeated with targets in odd tokens.
    likelihood : int
        Targets whose encodings are priced.
    free : int
        Texts that are continued freely, at temperatures 0, 1 and 1.5.
    cuts : int
        Cuts of a text, each kind, at which encodings are compared.
    """

    toy_options: ClassVar[dict[str, Any]] = {"trials": 3, "words": 12, "likelihood": 2, "free": 2, "cuts": 50}

    def __init__(
        self,
        trials: Annotated[int, Field(ge=1, le=2000)] = 100,
        targets: Annotated[int, Field(ge=1, le=3)] = 3,
        words: Annotated[int, Field(ge=LEAST, le=600)] = 28,
        text: Literal["prose", "code"] = "prose",
        temperature: Annotated[float, Field(gt=0, le=2)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 0.9,
        top_k: Annotated[int, Field(ge=0)] = 50,
        mask: Literal["surface", "phantoms", "none"] = "surface",
        odd_input: bool = True,
        likelihood: Annotated[int, Field(ge=0, le=1000)] = 32,
        free: Annotated[int, Field(ge=0, le=1000)] = 16,
        cuts: Annotated[int, Field(ge=1, le=100_000)] = 2000,
    ) -> None:
        self.trials, self.targets, self.words, self.text = trials, targets, words, text
        self.sampling = (temperature, top_k, top_p)
        self.mask, self.odd_input, self.likelihood, self.free, self.cuts = mask, odd_input, likelihood, free, cuts

    def run(self, lm: LM, seed: int = 0, progress: Progress | None = None) -> Report:
        """Run all parts; the trials take most of the time."""
        if lm.kind != "causal" or lm.tokenizer is None:
            raise UnsupportedModelError(f"{lm.name}: needs a causal language model with a tokenizer")
        codec, source = Codec(lm), self.source(seed)
        asked = self.draw(lm, codec, source, seed)
        step = _steps(len(asked) + min(self.likelihood, len(asked)) + self.free, progress)
        arms: dict[str, What | None] = {GREEDY: None, SAMPLED: None}
        if self.mask != "none":
            arms |= {MASKED: self.mask, RANDOM: self.mask}
        if self.odd_input:
            arms[ODD] = None
        judged = answer_all(lm, codec, asked, arms, self.sampler(seed), step)
        places = [place for trial in asked if (place := place_of(codec, trial)) is not None][: self.likelihood]
        figures: dict[str, Any] = {
            "static": self._static(lm, codec, source, seed),
            "sensitivity": sensitivity(codec, [trial.plain for trial in asked], seed),
            "arms": {arm: Tally(found).figures() for arm, found in judged.items()},
            "over_banned": None if self.mask == "none" else over_banned(codec, asked, source),
            "likelihood": mean_mass(lm, places, step),
            "free": free_text(lm, codec, source, self.free, seed, step) if self.free else None,
        }
        return Report(self.card.slug, lm.name, figures, tables(figures), notes(figures))

    def source(self, seed: int) -> str:
        """Return the text that passages are drawn from."""
        return prose() if self.text == "prose" else stdlib_code(seed, 200_000)

    def sampler(self, seed: int) -> Sampler:
        """Return how all arms but the greedy one choose tokens."""
        temperature, top_k, top_p = self.sampling
        return Sampler(temperature, top_k, top_p, seed)

    def draw(self, lm: LM, codec: Codec, source: str, seed: int) -> list[Trial]:
        """Draw the trials."""
        cut, unit = (packed, "sentence") if self.text == "prose" else (code_lines, "line of code")
        passages = draw(cut(source, LEAST, self.words), self.trials, self.targets, seed)
        return [make(lm, codec, passage, unit, (seed, n)) for n, passage in enumerate(passages)]

    def _static(self, lm: LM, codec: Codec, source: str, seed: int) -> dict[str, Any]:
        vocabulary = codec.vocabulary.id_of
        rows = [
            word_counts(vocabulary, word, codec.own(word).pieces)
            for word in sorted({f" {word}" for word in WORD.findall(source)})
        ]
        logs = [row["log10"] for row in rows if row["log10"] is not None]
        cut = {name: share(*stability(codec.encode, source, self.cuts, seed, name == "before a space"))
               for name in ("at any character", "before a space")}  # fmt: skip
        return {
            "words": [word_counts(vocabulary, word, codec.own(word).pieces) for word in WORDS],
            "types": len(rows),
            "log10_encodings": sum(logs) / len(logs) if logs else None,
            "not_shortest": share(sum(row["tokens"] > (row["shortest"] or 0) for row in rows), len(rows)),
            "stable_cuts": cut,
            "missing_bytes": missing_bytes(vocabulary),
            "lossy": lossy(lm.tokenizer, codec.encode),
        }


def _steps(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that is told how much more was done."""
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return step
