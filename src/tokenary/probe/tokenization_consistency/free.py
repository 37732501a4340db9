"""Free writing: how many words a model writes in tokens that its tokenizer would not choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.models.lm import LM
from tokenary.probe.tokenization_consistency.codec import Codec
from tokenary.probe.tokenization_consistency.outcomes import share
from tokenary.probe.tokenization_consistency.writing import Request, write

TEMPERATURES = (0.0, 1.0, 1.5)
BATCH = 16
READ, NEW = 120, 48  # characters that are read, tokens that are written


def free_text(
    lm: LM, codec: Codec, source: str, texts: int, seed: int, step: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Continue pieces of a text; return the share of words in odd tokens at each temperature."""
    places = [i for i in range(READ, len(source)) if source[i].isspace() and not source[i - 1].isspace()]
    starts = substream(seed, "free texts").choice(places, texts, replace=texts > len(places)).tolist()
    prompts = [codec.own(source[i - READ : i].lstrip()).ids for i in starts]
    counts = {temperature: [0, 0] for temperature in TEMPERATURES}
    for at in range(0, texts, BATCH):
        batch = prompts[at : at + BATCH]
        requests = [Request(n, Sampler(t, 0, 1.0, seed, at + n), NEW) for t in TEMPERATURES for n in range(len(batch))]
        written = iter(write(lm, batch, requests))
        for temperature in TEMPERATURES:
            for prompt in batch:
                odd, words = _count(codec, prompt, next(written))
                counts[temperature][0] += odd
                counts[temperature][1] += words
        step(len(batch))
    return [{"temperature": temperature, **share(*counts[temperature])} for temperature in TEMPERATURES]


def _count(codec: Codec, prompt: list[int], written: list[int]) -> tuple[int, int]:
    """Count odd words and all words that begin behind the prompt and are whole."""
    start = len(codec.text(prompt).data)
    text = codec.text([*prompt, *written])
    again = codec.own(text.data.decode(errors="replace"))
    words = [word for word in text.words if word[0] > start and word[1] < len(text.data)]
    if text.data != again.data:
        return 0, 0
    return sum(text.span(*word) != again.span(*word) for word in words), len(words)
