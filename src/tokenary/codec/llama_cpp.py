"""llama.cpp as the reader: quantized weights as they are, in floating point, hence pinned to one machine and version.

Sums in floating point depend on how a processor orders them. The name of the backend, which an archive carries, holds
the version of llama.cpp and a checksum of the processor's name and instructions; one thread computes; encoder and
decoder read in the same pieces. Needs the package cyllama.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenary.core.claim import device_name
from tokenary.core.errors import InputError, TokenaryError, UnknownNameError
from tokenary.models.catalogue import find, local_source
from tokenary.models.lm import LM


class LlamaCpp:
    """The GGUF file of a model, opened by llama.cpp.

    Parameters
    ----------
    lm : LM
        A model that was made from a GGUF file.

    Raises
    ------
    InputError
        It was not.
    TokenaryError
        llama.cpp is not installed.
    """

    def __init__(self, lm: LM) -> None:
        try:
            self.lib: Any = importlib.import_module("cyllama.llama.llama_cpp")
        except ImportError as error:
            raise TokenaryError("the backend llama.cpp needs: pip install cyllama") from error
        self.lib.disable_logging()
        self.lib.ggml_backend_load_all()
        version = f"{self.lib.ggml_version()}.{self.lib.ggml_commit()}"
        processor = f"{device_name()} {sorted(torch.cpu.get_capabilities().items())}"
        self.name = f"llama.cpp/{version}-{zlib.crc32(processor.encode()):08x}"
        options = self.lib.LlamaModelParams()
        options.n_gpu_layers = 0
        # cyllama's contexts ask their model for its n_vocab, which its own class does not have
        sized = type("Sized", (self.lib.LlamaModel,), {"n_vocab": lm.vocab_size})
        self.model, self.vocab_size = sized(str(gguf_of(lm)), options), lm.vocab_size

    def open(self, lanes: int, window: int, drop: int, sinks: int = 0) -> LlamaCppLanes:
        """Start so many empty texts."""
        return LlamaCppLanes(self, lanes, window, drop, sinks)


class LlamaCppLanes:
    """Sequences in one context of llama.cpp; see `IntegerLanes`.

    The window slides natively: the oldest `drop` keys behind the sinks are removed, and the others turned to their new
    positions.
    """

    exact = False

    def __init__(self, model: LlamaCpp, lanes: int, window: int, drop: int, sinks: int = 0) -> None:
        self.model, self.window, self.drop, self.sinks, self.length = model, window, drop, sinks, [0] * lanes
        options = model.lib.LlamaContextParams()
        options.n_ctx, options.n_seq_max, options.kv_unified = lanes * -(-window // 256) * 256, lanes, False
        options.n_batch = options.n_ubatch = max(lanes * drop, 512)
        options.n_threads = options.n_threads_batch = 1
        self._context = model.lib.LlamaContext(model.model, options)
        self._batch = model.lib.LlamaBatch(n_tokens=lanes * drop, embd=0, n_seq_max=1)

    def read(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Read some tokens in each lane; return for each lane the logits after its last one, (1, V) or (0, V)."""
        self._batch.clear()
        count, last = 0, [-1] * len(tokens)
        for lane, ids in enumerate(tokens):
            if self.length[lane] + len(ids) > self.window:
                self._context.memory_seq_rm(lane, self.sinks, self.sinks + self.drop)
                self._context.memory_seq_add(lane, self.sinks + self.drop, -1, -self.drop)
                self.length[lane] -= self.drop
            for number, token in enumerate(ids, start=1):
                self._batch.add(int(token), self.length[lane], [lane], number == len(ids))
                self.length[lane] += 1
                last[lane], count = count, count + 1
        if count:
            self._context.decode(self._batch)
        return [self._row(at) for at in last]

    def logits(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return them: what `read` gives are logits already."""
        return states

    def _row(self, at: int) -> NDArray[np.float32]:
        if at < 0:
            return np.empty((0, self.model.vocab_size), np.float32)
        return np.array(self._context.get_logits_ith(at), np.float32)[None]


def gguf_of(lm: LM) -> Path:
    """Return the GGUF file that a model was made from.

    Raises
    ------
    InputError
        There is none on this machine.
    """
    named = Path(lm.source)
    if named.suffix == ".gguf" and named.is_file():
        return named
    try:
        found = local_source(find(lm.name))
    except UnknownNameError:
        found = None
    if found is None or found.suffix != ".gguf":
        raise InputError(f"{lm.name} was not made from a GGUF file that is here, as the backend llama.cpp needs")
    return found
