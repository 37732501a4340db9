"""Weights: float16 safetensors and a config beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokenary.core.errors import InputError
from tokenary.core.files import one_line, write_json
from tokenary.models.catalogue import WEIGHTS
from tokenary.models.cifar_vit.model import CifarViT, ViTConfig

SHIPPED = WEIGHTS / "cifar-vit"


def load(folder: str | os.PathLike[str] = SHIPPED, device: str | torch.device = "cpu") -> CifarViT:
    """Load a classifier in float32, in eval mode and without gradients.

    Parameters
    ----------
    folder : path
        By default the network that ships.
    device : str or torch.device
        Where it goes.

    Raises
    ------
    InputError
        The folder lacks the files, or they are broken.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = ViTConfig(**{name: about[name] for name in ViTConfig.__dataclass_fields__})
        with torch.random.fork_rng(devices=[]):
            model = CifarViT(config)
        model.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder.name}: no CIFAR classifier can be read here: {one_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def save(model: CifarViT, folder: Path, **facts: Any) -> None:
    """Write float16 weights and ``config.json`` with the sizes and any facts."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", {**model.config.to_dict(), **facts})
