"""A small sibling of SmolLM2-135M: some of its layers, healed by low-rank updates; all else is the large model's own.

Fourteen of the 30 layers are dropped, and each linear layer W of those that stay is corrected by a product of low rank,
``W + B A``, learnt by distillation (``scripts/distil_small.py``). Embedding, head and tokenizer are shared, so only the
updates and the norms are stored (``weights/smollm2-small``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.hf.packing import PackedLinear
from tokenary.models.catalogue import WEIGHTS
from tokenary.models.lm import LM

FOLDER = WEIGHTS / "smollm2-small"


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Return a model of only these layers of `model`, all weights shared with it, nothing copied.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model; its linear layers may be packed.
    kept : sequence of int
        Layers that stay, ascending.

    Raises
    ------
    UnsupportedModelError
        If the model's layers do not stand in one list, or one of `kept` is not there.
    """
    name, blocks = _layers(model)
    if list(kept) != sorted(set(kept)) or not kept or not 0 <= min(kept) <= max(kept) < len(blocks):
        raise UnsupportedModelError(f"layers {list(kept)}: the model has layers 0 to {len(blocks) - 1}")
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    with torch.device("meta"):
        small = type(model)(config)
    twins = dict(model.named_modules())
    for own, module in list(small.named_modules()):
        twin = twins[_renamed(own, name, kept)]
        if own and not any(True for _ in twin.children()):
            parent, _, leaf = own.rpartition(".")
            setattr(small.get_submodule(parent), leaf, twin)
        else:  # a block of its own, since it knows its place; what it holds directly is shared
            module._parameters.update(twin._parameters)
            module._buffers.update(twin._buffers)
    small.generation_config = model.generation_config
    return small.eval()


def small_sibling(lm: LM | PreTrainedModel, tokenizer: Any | None = None, folder: Path = FOLDER) -> PreTrainedModel:
    """Build the small sibling of a loaded SmolLM2-135M-Instruct; embedding and head are those of the large model.

    Parameters
    ----------
    lm : LM or PreTrainedModel
        The large model, of any dtype, packed or not.
    tokenizer : PreTrainedTokenizerBase, optional
        That of the model, where it is not an `LM`; its length is checked.
    folder : Path
        Holds ``config.json`` and ``model.safetensors``.

    Raises
    ------
    UnsupportedModelError
        If this is another model than the one that the updates were learnt for.
    InputError
        If the folder lacks its files.
    """
    model = lm.model if isinstance(lm, LM) else lm
    tokenizer = lm.tokenizer if isinstance(lm, LM) else tokenizer
    config = read_config(folder)
    _check(model, tokenizer, config, lm.fingerprint if isinstance(lm, LM) else None)
    small = keep_layers(model, config["layers"])
    weights = load_file(folder / "model.safetensors")
    dtype, device = model.dtype, model.device
    with torch.no_grad():
        for name, module in list(small.named_modules()):
            if f"{name}.A" in weights:
                update = weights[f"{name}.B"].float() @ weights[f"{name}.A"].float()
                _set(small, name, _updated(module, update.to(device), dtype))
            elif f"{name}.weight" in weights:
                norm = copy.deepcopy(module)
                norm.weight = nn.Parameter(weights[f"{name}.weight"].to(device, dtype), requires_grad=False)
                _set(small, name, norm)
    return small


def read_config(folder: Path = FOLDER) -> dict[str, Any]:
    """Read what ``scripts/distil_small.py`` says of the sibling: layers, rank, source."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"no small sibling: {file} is not there")
    return json.loads(file.read_text(encoding="utf-8"))


def probe(model: PreTrainedModel) -> list[float]:
    """Give a few weights of a model that are the same whatever its dtype and packing: those of embedding and norms."""
    rows = torch.linspace(0, model.config.vocab_size - 1, 9, device=model.device).long()
    embedding: Any = model.get_input_embeddings()
    values = [embedding.weight[rows, :2].flatten()]
    values += [p[3:4] for name, p in model.named_parameters() if p.dim() == 1 and "input_layernorm" in name]
    return [round(value, 5) for value in torch.cat(values).float().tolist()]


def _check(model: PreTrainedModel, tokenizer: Any | None, config: dict[str, Any], fingerprint: str | None) -> None:
    """Refuse another large model."""
    what = f"the small sibling belongs to {config['source']['name']}"
    for key, value in config["source"]["shape"].items():
        if getattr(model.config, key, None) != value:
            raise UnsupportedModelError(f"{what}; this model has {key}={getattr(model.config, key, None)}")
    if fingerprint not in (None, config["source"]["fingerprint"]):
        raise UnsupportedModelError(f"{what}; the weights of this one differ")
    if tokenizer is not None and len(tokenizer) > config["source"]["shape"]["vocab_size"]:
        raise UnsupportedModelError(f"{what}; the tokenizer has {len(tokenizer)} tokens")
    ours, theirs = torch.tensor(probe(model)), torch.tensor(config["source"]["probe"])
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=2**-7, atol=1e-4):
        raise UnsupportedModelError(f"{what}; the weights of this one differ")


def _updated(module: nn.Module, update: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer with the update added, packed where the given one is."""
    packed = isinstance(module, PackedLinear)
    weight = module.packed.to_dense() if isinstance(module, PackedLinear) else module.weight
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter((weight.float() + update).to(dtype), requires_grad=False)
    return PackedLinear(linear) if packed else linear


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of layers, and its name."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} layers")


def _renamed(own: str, name: str, kept: Sequence[int]) -> str:
    """Name, in the large model, of a module of the small one."""
    if not own.startswith(name + "."):
        return own
    number, _, rest = own[len(name) + 1 :].partition(".")
    return ".".join(filter(None, (name, str(kept[int(number)]), rest)))


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
