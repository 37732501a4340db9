"""Embedding rows for merged tokens: predicted from the rows of their parts, kept in a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.tokenize.base import TextTokenizer

#: Predicts rows (K, D) of K tokens from their parts: the door for a hypernetwork. Called for tokens not seen lately.
Predictor = Callable[[Sequence[tuple[int, ...]]], Tensor]

PARTS = 4  # a ridge map reads so many parts, the last of a longer token at the last place


def mean_of_parts(rows: Tensor) -> Predictor:
    """Predict the mean of the parts' rows (FVT); `rows` is (V, D)."""

    def predict(parts: Sequence[tuple[int, ...]]) -> Tensor:
        flat = torch.tensor([id for token in parts for id in token])
        sizes = torch.tensor([len(token) for token in parts])
        owner = torch.repeat_interleave(torch.arange(len(parts)), sizes)
        total = torch.zeros(len(parts), rows.shape[1], device=rows.device)
        total.index_add_(0, owner.to(rows.device), rows[flat.to(rows.device)].float())
        return (total / sizes[:, None].to(rows.device)).to(rows.dtype)

    return predict


def last_part(rows: Tensor) -> Predictor:
    """Predict the row of the last part: what a causal model would see at that place; `rows` is (V, D)."""
    return lambda parts: rows[torch.tensor([token[-1] for token in parts], device=rows.device)]


def ridge_of_parts(rows: Tensor, tokenizer: TextTokenizer, strength: float = 1.0, most: int = 30_000) -> Predictor:
    """Predict the mean of the parts plus a linear map of each, fitted on the vocabulary itself.

    Every token that a merge of the vocabulary makes is an example: its parts are those of its merge, of which some are
    undone in turn, so that there are examples of two to four parts.

    Parameters
    ----------
    rows : Tensor
        (V, D) float.
    tokenizer : TextTokenizer
        A BPE with its merges.
    strength : float
        Of the penalty, over the mean diagonal of the normal equations.
    most : int
        Examples, evenly taken.

    Raises
    ------
    UnsupportedModelError
        The tokenizer states no merges.
    """
    splits = merge_parents(tokenizer)
    if not splits:
        raise UnsupportedModelError(f"{tokenizer.name} states no merges to fit a map on")
    examples = []
    chosen = [id for id in splits if id < len(rows)]
    for number, id in enumerate(chosen[:: max(1, len(chosen) // most)]):
        parts = splits[id]
        for _ in range(number % 3):  # two, three or four parts
            at = max(range(len(parts)), key=lambda i: parts[i] in splits)
            if parts[at] in splits and len(parts) < PARTS:
                parts = (*parts[:at], *splits[parts[at]], *parts[at + 1 :])
        examples.append((id, parts))
    table, mean = rows.float(), mean_of_parts(rows.float())
    inputs = _features(table, [parts for _, parts in examples])
    wanted = table[torch.tensor([id for id, _ in examples])] - mean([parts for _, parts in examples])
    gram = inputs.T @ inputs
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    weight = torch.linalg.solve(gram, inputs.T @ wanted)
    return lambda parts: (mean(parts) + _features(table, parts) @ weight).to(rows.dtype)


def _features(rows: Tensor, parts: Sequence[tuple[int, ...]]) -> Tensor:
    """Rows of the first parts side by side, zeros where there is none, and a one: (K, PARTS * D + 1)."""
    made = torch.zeros(len(parts), PARTS, rows.shape[1], device=rows.device)
    for place in range(PARTS):
        have = [n for n, token in enumerate(parts) if len(token) > place]
        if have:
            last = place == PARTS - 1
            made[have, place] = rows[torch.tensor([parts[n][-1 if last else place] for n in have])]
    return torch.cat([made.flatten(1), made.new_ones(len(parts), 1)], dim=1)


def merge_parents(tokenizer: TextTokenizer) -> dict[int, tuple[int, ...]]:
    """Map every token that a merge of the vocabulary makes to the two tokens that it is made of."""
    vocab = tokenizer.config["model"].get("vocab")
    found: dict[int, tuple[int, ...]] = {}
    if not isinstance(vocab, dict):
        return found
    for merge in tokenizer.config["model"].get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made, pair = vocab.get(left + right), (vocab.get(left), vocab.get(right))
        if made is not None and None not in pair:
            found.setdefault(made, pair)  # type: ignore[arg-type]
    return found


class RowCache:
    """Predicted rows by parts; of more than fit, those not used for longest go.

    Parameters
    ----------
    predict : Predictor
        Asked for rows that are not there.
    slots : int
        Rows kept. A batch with more distinct tokens is served, but not kept whole.
    """

    def __init__(self, predict: Predictor, slots: int) -> None:
        self.predict, self.slots = predict, slots
        self.hits = self.misses = 0
        self._rows: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def look_up(self, parts: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the rows (K, D) of K tokens, predicting each missing one once."""
        wanted = list(dict.fromkeys(parts))
        missing = [token for token in wanted if token not in self._rows]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        if missing:
            predicted = self.predict(missing)
            if predicted.ndim != 2 or len(predicted) != len(missing):
                raise InputError(f"the predictor gave {tuple(predicted.shape)} for {len(missing)} tokens")
            self._rows.update(zip(missing, predicted, strict=True))
        for token in wanted:
            self._rows.move_to_end(token)
        found = torch.stack([self._rows[token] for token in parts])
        while len(self._rows) > self.slots:
            self._rows.popitem(last=False)
        return found
