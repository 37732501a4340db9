"""One meaning of "how much is kept", for every method: a share, a number of tokens, or bytes."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_UNITS = {"B": 1, "KB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FORM = "a share (50% or 0.5), a number of tokens (256) or a size (64MB)"


@dataclass(frozen=True)
class Budget:
    """How many tokens may be kept.

    Exactly one field is set.

    Parameters
    ----------
    ratio : float, optional
        Share of the tokens, in (0, 1].
    tokens : int, optional
        Number of tokens, at least 1.
    bytes : int, optional
        Size that the kept keys and values may take over all layers, per sequence.
    """

    ratio: float | None = None
    tokens: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.ratio, self.tokens, self.bytes)) != 1:
            raise ValueError(_FORM)
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError("a share above 0% and at most 100%")
        if (self.tokens is not None and self.tokens < 1) or (self.bytes is not None and self.bytes < 1):
            raise ValueError("a budget above zero")

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read ``50%``, ``0.5``, ``256`` or ``64MB``.

        Raises
        ------
        ValueError
            If `value` is none of these.
        """
        if isinstance(value, cls):
            return value
        text = str(value).strip().upper()
        try:
            if text.endswith("%"):
                return cls(ratio=float(text[:-1]) / 100)
            sized = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B)", text)
            if sized:
                return cls(bytes=int(float(sized[1]) * _UNITS[sized[2]]))
            return cls(tokens=int(text)) if text.isdigit() and not isinstance(value, float) else cls(ratio=float(text))
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith("a ") else _FORM) from None

    def resolve(self, n_tokens: int, bytes_per_token: int) -> int | None:
        """Return how many tokens may be kept, at least 1; None for all there will ever be.

        Parameters
        ----------
        n_tokens : int
            Tokens that a share is a share of: those of the prompt.
        bytes_per_token : int
            Size of one token's keys and values over all layers.
        """
        if self.ratio == 1:
            return None
        if self.ratio is not None:
            return max(1, math.floor(self.ratio * n_tokens + 1e-9))
        if self.tokens is not None:
            return self.tokens
        assert self.bytes is not None
        return max(1, self.bytes // bytes_per_token)

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"{self.ratio * 100:g}%"
        return str(self.tokens) if self.tokens is not None else f"{self.bytes}B"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "description": _FORM, "examples": ["50%", "256", "64MB"]}


Layers = Literal["uniform", "pyramid"]


def spread(total: int, n_layers: int, shape: Layers, floor: int = 1) -> list[int]:
    """Share out a budget over the layers.

    Parameters
    ----------
    total : int
        Mean number of tokens a layer.
    n_layers : int
        Number of layers.
    shape : {"uniform", "pyramid"}
        ``pyramid`` falls linearly from 1.5 to 0.5 of the mean: low layers look at more tokens.
    floor : int
        Least number a layer may get.

    Returns
    -------
    list of int
        Tokens for each layer; sums to ``total * n_layers`` unless the floor lifts it.
    """
    if shape == "uniform" or n_layers == 1:
        return [max(floor, total)] * n_layers
    ideal = [total * (1.5 - layer / (n_layers - 1)) for layer in range(n_layers)]
    # Round the running sum, so that the rounding errors do not add up.
    edges = [round(sum(ideal[:layer])) for layer in range(n_layers)] + [total * n_layers]
    return [max(floor, high - low) for low, high in itertools.pairwise(edges)]
