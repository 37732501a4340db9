"""The range coder of `constriction`: words of 32 bits, probabilities of 24.

Of the weights w[0..V-1] the coder makes the cumulative counts ``c[i] = floor((w[0] + ... + w[i-1]) s) + i`` with
``s = (2^24 - V) / sum(w)`` in float64: every symbol keeps a count of at least 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenary.core.errors import InputError, TokenaryError


class Encoder:
    """Codes symbols, each under weights of its own."""

    def __init__(self) -> None:
        self._stream = _constriction().stream
        self._coder = self._stream.queue.RangeEncoder()

    def put(self, symbol: int, weights: NDArray[np.float64]) -> None:
        """Code one symbol under weights (V,)."""
        self._coder.encode(symbol, self._stream.model.Categorical(weights, perfect=False, lazy=True))

    def __len__(self) -> int:
        """Bytes so far."""
        return 4 * self._coder.num_words()

    def finish(self) -> bytes:
        """Return what was coded, little-endian words."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Reads back what an `Encoder` wrote, given the same weights.

    Raises
    ------
    InputError
        If the data cannot have come from an `Encoder`.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise InputError("a coded lane is not a whole number of 32-bit words")
        self._stream = _constriction().stream
        self._coder = self._stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def get(self, weights: NDArray[np.float64]) -> int:
        """Decode one symbol under weights (V,)."""
        try:
            return int(self._coder.decode(self._stream.model.Categorical(weights, perfect=False, lazy=True)))
        except (AssertionError, ValueError) as error:
            raise InputError("a coded lane cannot be decoded") from error


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise TokenaryError("compression needs constriction: pip install 'tokenary[codec]'") from error
    return constriction
