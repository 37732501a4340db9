"""StochasTok: Improving Fine-Grained Subword Understanding in LLMs (2025, arXiv 2506.01687).

An LM never sees how its tokens are spelled. While training, some tokens of an already tokenized text are written as two
shorter tokens of the same vocabulary: the text stays the same, and so does the tokenizer at test time.

    cuts(t)       = {(l, r) in the vocabulary : bytes(l) + bytes(r) = bytes(t)}       every cut, not only the merge of t
    expand(x, p)  = floor(len(x) * p) attempts, each at a uniform position of the sequence as it has grown so far:
                    its token is replaced by one of its cuts, drawn uniformly; a token without cuts wastes the attempt

Pieces may be split again, so p = 1 does not spell everything out. The reference splices a list for every attempt,
quadratic in the length; here tokens are the nodes of a linked list and a position is drawn as a node, which is the same
distribution in linear time. The reference expands a corpus once; drawing anew every epoch (``set_epoch``) is the
stronger regularisation. Context is counted in expanded tokens: at one budget of tokens an LM sees less text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import InputError
from tokenary.core.method import Method
from tokenary.tokenize.stochastok.splits import Expanded, SplitTable, expand

__all__ = ["Expanded", "SplitTable", "StochasTok", "Transform", "expand"]

CARD = Card(
    slug="stochastok",
    cls="StochasTok",
    room="tokenize",
    slot="transform",
    title="StochasTok: Improving Fine-Grained Subword Understanding in LLMs",
    summary="splits random tokens of a training text into shorter ones, so that the model learns how words are spelled",
    paper="2506.01687",
    year=2025,
    code="anyasims/stochastok",
    training="minutes",
)

IGNORED = -100  # the label of a token without loss


class StochasTok(Method):
    """Splits random tokens of training texts.

    Parameters
    ----------
    p : float
        Attempts a token: 0.1 for text; the paper takes 1 for arithmetic. The sequence grows by less.
    limit : int
        Most splits a sequence; -1 for no limit.
    seed : int
        Of the splits.
    """

    def __init__(
        self,
        p: Annotated[float, Field(ge=0, le=10)] = 0.1,
        limit: Annotated[int, Field(ge=-1)] = -1,
        seed: int = 0,
    ) -> None:
        self.p, self.limit, self.seed = p, None if limit < 0 else limit, seed

    def expand(
        self,
        ids: Sequence[int] | np.ndarray,
        table: SplitTable,
        document: int | str = 0,
        protected: np.ndarray | None = None,
    ) -> Expanded:
        """Split random tokens of one sequence; `document` names its draws."""
        return expand(ids, table, self.p, self.seed, document, protected, self.limit)

    def transform(self, tokenizer: Any) -> Transform:
        """Return a callable for data loaders; it can be sent to worker processes."""
        return Transform(SplitTable.of(tokenizer), self.p, self.seed, self.limit)


class Transform:
    """Splits tokens of the examples that a data loader hands out.

    Call it with one example (``input_ids`` a list), with a batch of columns (``datasets.map(transform, batched=True)``)
    or with a list of examples (before a collator); it returns the same shape. Columns with an entry a token follow
    their token; ``labels`` are written anew: a token without loss stays without, any other label must be its token.
    Draws are named by the seed, the epoch and the *content* of a sequence, so that neither the order of the data nor
    the number of workers changes a split; equal texts are split alike within an epoch.
    """

    def __init__(self, table: SplitTable, p: float, seed: int = 0, limit: int | None = None) -> None:
        self.table, self.p, self.seed, self.limit, self.epoch = table, p, seed, limit, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the splits of another epoch; before workers start, as those that persist do not hear of it."""
        self.epoch = epoch

    def __call__(self, examples: Any) -> Any:
        """Expand one example, a batch of columns, or a list of examples."""
        if not isinstance(examples, Mapping):
            return [self._one(example) for example in examples]
        ids = examples["input_ids"]
        if not len(ids) or np.ndim(ids[0]) == 0:
            return self._one(examples)
        names = list(examples)
        rows = [self._one({name: examples[name][i] for name in names}) for i in range(len(ids))]
        return {name: [row[name] for row in rows] for name in names}

    def before(self, collate: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that expands examples and hands them on."""
        return _Chain(self, collate)

    def _one(self, example: Mapping[str, Any]) -> dict[str, Any]:
        ids = np.asarray(example["input_ids"], np.int64)
        name = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        mask = example.get("attention_mask")
        padding = None if mask is None else np.asarray(mask) == 0
        expanded = expand(ids, self.table, self.p, self.seed, f"{self.epoch}:{name}", padding, self.limit)
        made: dict[str, Any] = {}
        for column, value in example.items():
            if column == "input_ids":
                new: np.ndarray = expanded.ids.astype(np.int64)
            elif column == "position_ids":
                new = np.arange(len(expanded.ids))
            elif column == "labels":
                new = _labels(ids, np.asarray(value), expanded)
            elif hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and len(value) == len(ids):
                new = np.asarray(value)[expanded.origin]
            else:
                made[column] = value
                continue
            made[column] = torch.from_numpy(new) if isinstance(value, torch.Tensor) else new.tolist()
        return made


@dataclass(frozen=True)
class _Chain:
    transform: Transform
    collate: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self.collate(self.transform(examples))


def _labels(ids: np.ndarray, labels: np.ndarray, expanded: Expanded) -> np.ndarray:
    """Labels of the pieces: the pieces themselves, none where the whole token had none."""
    if len(labels) != len(ids) or ((labels != IGNORED) & (labels != ids)).any():
        raise InputError("labels must be the tokens themselves, or -100: others cannot be told after a split")
    return np.where(labels[expanded.origin] == IGNORED, IGNORED, expanded.ids.astype(np.int64))
