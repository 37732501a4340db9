"""Weights: float16 safetensors, the blocks behind the reduction once for each way of reducing, and a config beside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenary.core.errors import InputError, UnknownNameError
from tokenary.core.files import one_line, write_json
from tokenary.models.catalogue import WEIGHTS
from tokenary.models.video_text.model import VideoText, VideoTextConfig

SHIPPED = WEIGHTS / "video-text"
NONE = "none"  # the arm without any reducing


def tail_names(config: VideoTextConfig, layer: int) -> tuple[str, ...]:
    """Return what the names of weights behind a block begin with."""
    blocks = tuple(f"vision.blocks.{number}." for number in range(layer + 1, config.layers))
    return (*blocks, "vision.norm.", "project.")


def load(arm: str = NONE, folder: str | os.PathLike[str] = SHIPPED) -> VideoText:
    """Load a network in float32, in eval mode and without gradients.

    Parameters
    ----------
    arm : str
        Way of reducing that the blocks behind the reduction were tuned to.
    folder : path
        By default the network that ships.

    Raises
    ------
    InputError
        The folder lacks the files, or they are broken.
    UnknownNameError
        Nothing was tuned to that way of reducing.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = VideoTextConfig(**{name: about[name] for name in VideoTextConfig.__dataclass_fields__})
        arms, stored = list(about["arms"]), load_file(folder / "model.safetensors")
        if arms and arm not in arms:
            raise UnknownNameError("arm", arm, arms)
        state = {name: tensor.float() for name, tensor in stored.items() if "/" not in name}
        for name, tensor in stored.items():
            if name.startswith(f"{arm}/"):
                state[name.removeprefix(f"{arm}/")] = tensor.float()
        with torch.random.fork_rng(devices=[]):
            model = VideoText(config)
        model.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder.name}: no video-text network can be read here: {one_line(error)}") from error
    return model.eval().requires_grad_(False)


def save(model: VideoText, folder: Path, arms: Mapping[str, Mapping[str, Tensor]] | None = None, **facts: Any) -> None:
    """Write float16 weights and ``config.json``.

    Parameters
    ----------
    model : VideoText
        Its weights.
    folder : Path
        Where to.
    arms : mapping of str to mapping of str to Tensor, optional
        By way of reducing, the weights that were tuned to it; the model's own of these names are left out.
    **facts
        What else the config is to say.
    """
    arms = arms or {}
    own = {name for parts in arms.values() for name in parts}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    state |= {f"{arm}/{name}": tensor for arm, parts in arms.items() for name, tensor in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().half().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    write_json(folder / "config.json", {**model.config.to_dict(), "arms": list(arms), **facts})
