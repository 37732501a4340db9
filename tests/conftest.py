"""Models that the tests of several folders share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The model stories260k, converted in a cache folder of the tests' own."""
    from tokenary.models import load

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENARY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load("stories260k", dtype="float32")


@pytest.fixture(scope="module")
def tiny():
    """A random bench VLM of size tiny, whose weights are large enough for answers to differ."""
    import torch

    from tokenary.models.bench_vlm import BenchVLM, sized

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BenchVLM(sized("tiny")).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model
