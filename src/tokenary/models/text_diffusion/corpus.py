"""From Wikipedia's markup to prose, from prose to a small byte-level BPE and token ids."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenary.core.errors import InputError
from tokenary.models.text_diffusion.net import EOS, SPECIAL

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
_SPACE = re.compile(r"(Wikipedia|Image|Category|Template|Talk|User|Help|MediaWiki|Portal)[ _a-z]*:", re.I)
_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|pre|code|gallery|table|nowiki|timeline)\b[^>]*>.*?</\1>|\{\|.*?\n\|\}",
    re.S | re.I,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NO_TEXT = re.compile(r"(image|file|media|category|[a-z]{2,3}|simple|zh-[a-z-]+)\s*:", re.I)
_OUTSIDE = re.compile(r"\[(?:https?|ftp|mailto)\S*\s*([^\]]*)\]|https?://\S+")
_REST = re.compile(r"<[^>]*>|'{2,}|__[A-Z]+__")
_PROSE = re.compile(r"""["'(]?[A-Z].{58,}[.!?:"')]""")


def clean_wikipedia(dump: bytes) -> Iterator[str]:
    """Yield the prose of each article of a Wikipedia XML dump such as enwik8.

    Kept are paragraphs of at least 60 characters that begin like a sentence, end in punctuation and are nearly all
    ASCII letters; headings, lists, tables, templates, references, pictures and redirects go.

    Parameters
    ----------
    dump : bytes
        XML in UTF-8; a last, broken page is ignored.

    Yields
    ------
    str
        One article, its paragraphs one a line; articles under 200 characters are left out.
    """
    for page in _PAGE.finditer(dump.decode("utf-8", "ignore")):
        title, markup = page.groups()
        if _SPACE.match(title) or markup.lstrip().upper().startswith("#REDIRECT"):
            continue
        article = "\n".join(_paragraphs(html.unescape(html.unescape(markup))))
        if len(article) >= 200:
            yield article


def _paragraphs(text: str) -> Iterator[str]:
    text = _DROPPED.sub("", text)
    for _ in range(3):  # templates and links nest, the inner ones go first
        text = _TEMPLATE.sub("", text)
        text = _LINK.sub(lambda link: "" if _NO_TEXT.match(link[1].lstrip(":")) else link[1].rpartition("|")[2], text)
    text = _REST.sub("", _OUTSIDE.sub(lambda link: link[1] or "", text))
    for line in text.split("\n"):
        line = " ".join(line.split())
        if _PROSE.fullmatch(line) and not set(line) & set("|{}[]<>"):
            plain = sum(char.isascii() and (char.isalpha() or char == " ") for char in line)
            if plain > 0.85 * len(line):
                yield line


def train_tokenizer(articles: Iterable[str], size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE of `size` pieces, [PAD], [MASK] and [EOS] being the first three; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(articles, trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each id stands for, (V,) int64; 0 for the special ones."""
    # byte-level BPE spells every byte as one character
    pieces = sorted(ids := tokenizer.get_vocab(), key=ids.__getitem__)
    return np.array([0 if piece in SPECIAL else len(piece) for piece in pieces], dtype=np.int64)


class Corpus(NamedTuple):
    """Token ids, (N,) uint16 each: `train`, and `held_out`, which comes after it in the corpus."""

    train: np.ndarray
    held_out: np.ndarray


def encode_corpus(articles: list[str], tokenizer: Tokenizer, held_out: float = 0.02) -> Corpus:
    """Encode articles, [EOS] after each, and split off the last ones.

    Parameters
    ----------
    articles : list of str
        In corpus order.
    tokenizer : tokenizers.Tokenizer
        At most 65,536 pieces.
    held_out : float
        Share of the articles that is kept from training.

    Raises
    ------
    InputError
        If either part would be empty.
    """
    split = round(len(articles) * (1 - held_out))
    if not 0 < split < len(articles):
        raise InputError(f"{len(articles)} articles cannot be split into training and held-out text")
    eos = tokenizer.token_to_id(EOS)

    def ids(part: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(part), 1000):
            for encoding in tokenizer.encode_batch_fast(part[start : start + 1000]):
                rows.append(np.array([*encoding.ids, eos], dtype=np.uint16))
        return np.concatenate(rows)

    return Corpus(ids(articles[:split]), ids(articles[split:]))
