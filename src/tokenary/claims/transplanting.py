"""What the claims about new vocabularies share: tokenizers to move to, text to measure on, and the measuring."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, embedding

from tokenary.bench.bits import Bits, Window, bits_of, windows
from tokenary.core.claim import Figure
from tokenary.core.seeding import substream
from tokenary.data import enwik8, gsm8k, humaneval, prose, stdlib_code
from tokenary.embed.apply import transfer, vocabularies
from tokenary.embed.base import Transplant, copied, new_ids, pieces_of
from tokenary.models import LM
from tokenary.models.text_diffusion.corpus import clean_wikipedia
from tokenary.tokenize.supertoken import train_supertokens
from tokenary.tokenize.token_premium.superword import train_superwords
from tokenary.tokenize.training import train_bpe

Kind = Literal["supertoken", "superword of code", "unigram of code", "bpe"]
SIZE = 8192
TRAINED = (8, 64, 1e-3)  # texts a step, tokens of each, learning rate of the rows


def articles(megabytes: int = 5) -> list[str]:
    """Return Wikipedia prose from the middle of enwik8, which no hypernetwork was trained on."""
    return list(islice(clean_wikipedia(enwik8(40_000_000 + megabytes * 1_000_000)[40_000_000:]), 1000))


def new_tokenizer(kind: Kind, seed: int) -> Tokenizer:
    """Train a tokenizer of 8,192 tokens, on Wikipedia prose or on the sources of Python's library."""
    if kind == "supertoken":
        return train_supertokens([*articles(), stdlib_code(seed + 7, 500_000)], SIZE, seed=seed).tokenizer
    if kind == "superword of code":
        return train_superwords([stdlib_code(seed + 7, 1_500_000)], SIZE).tokenizer
    if kind == "unigram of code":
        return train_bpe([stdlib_code(seed + 7, 1_500_000)], SIZE, algorithm="unigram").tokenizer
    return train_bpe(articles(), SIZE).tokenizer


def domains(count: int) -> dict[str, list[Window]]:
    """Return windows of a novel, of code, and of worked sums; nothing was trained on them."""
    code = "\n\n".join(row["prompt"] + row["canonical_solution"] for row in humaneval())
    sums = "\n\n".join(row["answer"] for row in gsm8k())
    return {name: windows(text, count) for name, text in (("prose", prose()), ("code", code), ("digits", sums))}


@dataclass(frozen=True)
class Arm:
    """How one way to make rows fares.

    Attributes
    ----------
    name : str
        Of the way.
    found : dict of str to Bits
        By domain.
    """

    name: str
    found: Mapping[str, Bits]

    @property
    def per_byte(self) -> np.ndarray:
        """Bits a byte of every window, (W,)."""
        return np.concatenate([bits.per_byte for bits in self.found.values()])

    def figure(self, name: str = "") -> Figure:
        """Mean over windows, with its standard error."""
        return Figure.of(name or self.name, self.per_byte)

    def details(self) -> dict[str, Any]:
        """Bits a byte by domain, and of tokens that are new, stand behind a new one, or neither."""
        sorts = ("new", "after new", "other")
        totals = {
            sort: {key: sum(bits.parts[sort][key] for bits in self.found.values()) for key in ("bytes", "bits")}
            for sort in sorts
        }
        return {
            **{name: float(bits.per_byte.mean()) for name, bits in self.found.items()},
            **{sort: sums["bits"] / sums["bytes"] for sort, sums in totals.items() if sums["bytes"]},
        }


def measure(lm: LM, texts: Mapping[str, list[Window]], name: str, new: set[int] | None = None) -> Arm:
    """Measure a model on all domains."""
    return Arm(name, {domain: bits_of(lm, found, new or ()) for domain, found in texts.items()})


def moved(
    lm: LM,
    to: Tokenizer,
    methods: Mapping[str, Transplant],
    texts: Mapping[str, list[Window]],
    steps: int = 0,
    train: Collection[str] = (),
) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Move a model to a tokenizer in several ways, and measure each at once and after a short training of its rows.

    Parameters
    ----------
    lm : LM
        The model.
    to : Tokenizer
        The new tokenizer.
    methods : mapping of str to Transplant
        By name.
    texts : mapping
        Windows by domain.
    steps : int
        Of training, see `trained`; 0 for none.
    train : collection of str
        The methods whose rows are trained.

    Returns
    -------
    dict of str to Arm
        By name, and ``none``: the model with its own tokenizer.
    dict
        Facts about the tokenizer, and figures after training.
    """
    source, target, _ = vocabularies(lm, to)
    new = new_ids(target, copied(source, target))
    arms = {"none": measure(lm, texts, "none")}
    after = {}
    for name, method in methods.items():
        model = transfer(lm, to, method)
        arms[name] = measure(model, texts, name, set(new))
        if steps and name in train:
            after[name] = measure(trained(model, articles(), steps), texts, name, set(new)).details()
    first = next(arms[name] for name in methods)
    running = sum(bits.parts["new"]["tokens"] for bits in first.found.values())
    tokens = sum(bits.tokens for bits in first.found.values())
    facts = {
        "vocabulary": to.get_vocab_size(),
        "new": len(new),
        "unspelled": sum(not part for part in pieces_of(source, target, new)),
        "running_new": running / tokens,
        "tokens_over_before": tokens / sum(bits.tokens for bits in arms["none"].found.values()),
        "trained_steps": steps,
        "after_training": after,
    }
    return arms, facts


def trained(lm: LM, texts: list[str], steps: int) -> LM:
    """Train the rows of a moved, tied model for a few steps on text, everything else frozen; changes its table."""
    batch, length, rate = TRAINED
    weight: Any = lm.model.get_input_embeddings().weight
    table = weight.detach().float().requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=rate)
    assert lm.tokenizer is not None
    ids = np.array(lm.tokenizer("\n".join(texts[:200]), add_special_tokens=False, verbose=False)["input_ids"])
    for step in range(steps):
        starts = substream(0, "continued training", step).integers(0, len(ids) - length - 1, batch)
        rows = torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]))
        inputs = embedding(rows[:, :-1], table).to(lm.dtype)
        hidden = lm.model.base_model(inputs_embeds=inputs).last_hidden_state
        loss = cross_entropy((hidden.float() @ table.T).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        weight.copy_(table)
    return lm
