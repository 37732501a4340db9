"""Which model a report card was made with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from tokenary.models.bench_vlm.model import BenchVLM


def weights_of(model: BenchVLM, name: str) -> dict[str, Any]:
    """Return name, size and a hash of a model's weights as they lie in memory."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "name": name,
        "size": model.config.name,
        "fingerprint": digest.hexdigest(),
        "source": "trained on drawn scenes by the package's own script",
        "dtype": str(model.newline.dtype).removeprefix("torch."),
    }
