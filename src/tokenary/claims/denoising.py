"""What the claims about masked diffusion share: real works with gaps, decoding them, judging what was filled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tokenary.bench.filled import agreement, pseudo_nll
from tokenary.core.claim import standard_error
from tokenary.core.decoding import Decoding
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.data import bach_chorales, enwik8, prose
from tokenary.decode.denoise import Denoise, Unmasker, Window
from tokenary.hf.strategy import Task
from tokenary.models import LM
from tokenary.models.midisim import note_tokens
from tokenary.models.text_diffusion.corpus import clean_wikipedia

MUSIC = "midisim"
TAIL = 1_200_000  # last bytes of enwik8, all of it behind the 98% of articles that the model was trained on


@dataclass(frozen=True)
class Denoised:
    """What one way of decoding did with some templates, one sequence each."""

    sequences: list[Decoding]

    @property
    def passes(self) -> np.ndarray:
        """Passes of each text (NFE)."""
        return np.array([sequence.trace.passes for sequence in self.sequences], dtype=float)

    @property
    def rows(self) -> np.ndarray:
        """Positions computed for each committed token."""
        return np.array([s.trace.drafted / max(1, s.trace.accepted) for s in self.sequences])


def denoise(
    lm: LM,
    templates: Sequence[Sequence[int]],
    unmasker: Unmasker | None = None,
    window: Window | None = None,
    new: int = 0,
) -> Denoised:
    """Fill every template greedily, alone; end tokens are text, so that all arms write equally much."""
    done = []
    for template in templates:
        loop = Denoise(Task(lm.model, None, [template], Sampler(), new), unmasker, window)
        for _ in loop:
            pass
        done += loop.sequences
    return Denoised(done)


def timed(ways: Mapping[str, Callable[[int], object]], count: int, rounds: int = 3) -> dict[str, float]:
    """Time several ways of decoding in turns.

    Parameters
    ----------
    ways : mapping of str to callable
        Each decodes the text of a number; the first is the baseline.
    count, rounds : int
        Texts, and how often each is decoded; one turn before them warms up.

    Returns
    -------
    dict
        Milliseconds a text of the baseline, and of the others the median of their speed over it, text by text, with the
        standard error of the mean.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds * count):
        for name, decode in ways.items():
            began = time.perf_counter()
            decode(turn % count)
            took[name].append(time.perf_counter() - began)
    seconds = {name: np.array(values[1:]) for name, values in took.items()}
    base, *others = ways
    found = {f"{base}, milliseconds a text": float(np.median(seconds[base]) * 1000)}
    for name in others:
        ratios = seconds[base] / seconds[name]
        found |= {f"{name}, speed": float(np.median(ratios)), f"{name}, its error": standard_error(ratios)}
    return found


def works(lm: LM, text: str = "enwik8") -> list[list[int]]:
    """Token ids of real works: chorales for a model of music, else Wikipedia (held out) or ``prose``, which ships."""
    if lm.name == MUSIC:
        return [note_tokens(notes) for notes in bach_chorales(120)]
    if text == "prose":
        return [encode_all(lm, prose())]
    return [encode_all(lm, "\n".join(clean_wikipedia(enwik8()[-TAIL:])))]


def encode_all(lm: LM, text: str) -> list[int]:
    """Token ids of a text of any length, past the model's context too."""
    assert lm.tokenizer is not None
    return list(lm.tokenizer(text, verbose=False)["input_ids"])


class Piece(NamedTuple):
    """A piece of a real work, with masks and without."""

    template: list[int]
    original: list[int]


def gapped(lm: LM, text: str, count: int, length: int, share: float, seed: int) -> list[Piece]:
    """Cut `count` evenly spaced pieces of `length` tokens out of real works and mask a random share of each."""
    pieces = [work[at : at + length] for work in works(lm, text) for at in range(0, len(work) - length + 1, length)]
    made = []
    for number in range(count):
        original = pieces[number * len(pieces) // count]
        template = list(original)
        for position in substream(seed, "gaps", number).permutation(length)[: round(share * length)]:
            template[position] = lm.model.config.mask_token_id
        made.append(Piece(template, original))
    return made


@torch.inference_mode()
def judged(judge: LM, lm: LM, sequences: Sequence[Decoding], skip: int = 0) -> np.ndarray:
    """Nats a token that a causal model gives each decoded text, the first `skip` tokens of `lm` taken as given."""
    losses = []
    for sequence in sequences:
        given = encode_all(judge, lm.decode(sequence.ids[:skip])) if skip else []
        ids = torch.tensor([encode_all(judge, lm.decode(sequence.ids))], device=judge.device)
        logits = judge.model(ids).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(float(nll[max(0, len(given) - 1) :].mean()))
    return np.array(losses)


def own_loss(lm: LM, sequences: Sequence[Decoding], templates: Sequence[Sequence[int]]) -> np.ndarray:
    """Nats a filled token of each text, each masked anew and predicted by the model itself; see `pseudo_nll`."""
    rows = zip(sequences, templates, strict=True)
    return np.array([pseudo_nll(lm, template, sequence.ids) for sequence, template in rows])


def wrong(sequences: Sequence[Decoding], pieces: Sequence[Piece], mask: int) -> np.ndarray:
    """Share of the filled positions of each text that are not as in the original."""
    rows = zip(sequences, pieces, strict=True)
    return np.array([1 - agreement(piece.template, s.ids, piece.original, mask) for s, piece in rows])


def same(
    sequences: Sequence[Decoding], others: Sequence[Decoding], templates: Sequence[Sequence[int]], mask: int
) -> float:
    """Share of the filled positions at which two ways of decoding wrote the same token, mean over texts."""
    rows = zip(sequences, others, templates, strict=True)
    return float(np.mean([agreement(template, one.ids, other.ids, mask) for one, other, template in rows]))
