"""Which model and machine a report card was made with."""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

import psutil
import torch

from tokenary.core.claim import device_name
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


def machine_of(load: float | None) -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "device": device_name(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "load_average": load,
    }
