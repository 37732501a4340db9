"""Where the agreement of a model's chunks comes from: a file, or its own writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.memory.fasa.chunks import Agreement, Pairs, measure_agreement, pairs_of

#: What is written for models that no file knows: so many texts, of so many tokens, of which one in so many is measured.
TEXTS, TOKENS, EVERY = 8, 384, 4


def agreement_of(model: PreTrainedModel, pairs: Pairs, path: str) -> Agreement:
    """Read the agreement of a model from a file; without one, from those that ship, or measure it on its own writing.

    Raises
    ------
    InputError
        If the file cannot be read.
    UnsupportedModelError
        If it was made for another model.
    """
    if path:
        return read(model, pairs, path)
    for file in sorted(Path(__file__).parent.glob("*.json")):
        if _same(json.loads(file.read_text(encoding="utf-8"))["about"], _about(model, pairs)):
            return read(model, pairs, file)
    text = model.config.get_text_config(decoder=True)
    tokens = min(TOKENS, text.max_position_embeddings // 2)
    start = text.bos_token_id if isinstance(text.bos_token_id, int) else 0
    budgets = [2**n for n in range(2, 11)]
    return measure_agreement(model, [[start]] * TEXTS, tokens, pairs_of(model, pairs), budgets, seed=0, every=EVERY)


def read(model: PreTrainedModel, pairs: Pairs, path: str | os.PathLike[str]) -> Agreement:
    """Read what `write` wrote; see `agreement_of`."""
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        table = found["agreement"]
        rows = [[[list(bytes.fromhex(head)) for head in layer] for layer in layers] for layers in table.values()]
        agreement = Agreement(tuple(map(int, table)), torch.tensor(rows).float() / 255)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of agreements: {error}") from None
    if not _same(found["about"], _about(model, pairs)):
        raise UnsupportedModelError(f"{path} was made for another model, or other pairs")
    return agreement


def write(path: str | os.PathLike[str], model: PreTrainedModel, pairs: Pairs, agreement: Agreement) -> None:
    """Write agreements as JSON, a byte each: a string of hex digits a head."""
    rounded = (agreement.mean * 255).round().to(torch.uint8)
    table = {
        str(k): [[bytes(head.tolist()).hex() for head in layer] for layer in values]
        for k, values in zip(agreement.budgets, rounded, strict=True)
    }
    made = {"about": _about(model, pairs), "agreement": table}
    Path(path).write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")


def _about(model: PreTrainedModel, pairs: Pairs) -> dict[str, Any]:
    """Say which model it is: its shape, and a few of its weights."""
    text = model.config.get_text_config(decoder=True)
    norm = getattr(getattr(model.base_model, "norm", None), "weight", None)
    marks = [] if not isinstance(norm, Tensor) else [round(weight, 4) for weight in norm[:8].tolist()]
    return {
        "pairs": pairs,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "norm": marks,
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are the same model, in whatever precision."""
    shapes = [{name: value for name, value in about.items() if name != "norm"} for about in (one, other)]
    marks = torch.tensor(one["norm"]), torch.tensor(other["norm"])
    return shapes[0] == shapes[1] and marks[0].shape == marks[1].shape and torch.allclose(*marks, rtol=0.02, atol=1e-4)
