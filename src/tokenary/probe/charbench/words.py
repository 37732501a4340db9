"""Words to ask about: real ones with their case, and strings that are no words."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from typing import Literal, get_args

import regex

from tokenary.core.errors import OptionError
from tokenary.core.seeding import substream
from tokenary.data import enwik8, prose, udhr
from tokenary.models.text_diffusion.corpus import clean_wikipedia

Source = Literal["prose", "wikipedia", "german", "strings"]

#: Lengths in characters that are asked about.
LENGTHS = range(4, 11)
_WORD = regex.compile(rf"\b\p{{L}}{{{LENGTHS[0]},{LENGTHS[-1]}}}\b")


def word_pool(texts: Iterable[str]) -> list[str]:
    """Return the different words of 4 to 10 letters of some texts, as they are written there, sorted."""
    return sorted({word for text in texts for word in _WORD.findall(unicodedata.normalize("NFC", text))})


def shuffled_letters(words: Collection[str], seed: int) -> list[str]:
    """Return each word's letters in a random order, without those that come out as a word; sorted."""
    known, made = set(words), set()
    stream = substream(seed, "charbench", "strings")
    for word in sorted(known):
        made.add("".join(word[i] for i in stream.permutation(len(word))))
    return sorted(made - known)


def words_of(source: Source, seed: int = 0, megabytes: int = 10) -> list[str]:
    """Return the word pool of a source.

    Parameters
    ----------
    source : {"prose", "wikipedia", "german", "strings"}
        The novel that ships with the package; prose of English Wikipedia (enwik8); the Universal Declaration of Human
        Rights in German; words of the novel with their letters shuffled.
    seed : int
        Of the shuffling.
    megabytes : int
        Of enwik8, from its beginning.
    """
    if source == "prose":
        return word_pool([prose()])
    if source == "wikipedia":
        return word_pool(clean_wikipedia(enwik8(megabytes * 1_000_000)))
    if source == "german":
        return word_pool(text for code in ("deu_1901", "deu_1996") for text in udhr(code).values())
    if source == "strings":
        return shuffled_letters(word_pool([prose()]), seed)
    raise OptionError("text", source, f"one of {', '.join(get_args(Source))}")
