"""TokenSelect (Wu et al. 2024, arXiv 2411.02886): each layer reads sinks, a window, and the tokens its heads vote for.

Of n tokens, with unrotated keys k_s and queries q_h averaged over a chunk of the prompt (one query while decoding)::

    a[h, s] = R(local) q_h . k_s       p[h] = softmax_s a[h]       c[s] = sum_h p[h, s]       s between sinks and window
    read    = [sinks, top-k of c, window], rotated anew by their place in this list, the query at its end

A head votes with its softmax, so that none with large logits drowns the others. One list serves all heads of a layer.
Rotated by its place in a list of bounded length, no key stands farther away than the model was trained for: texts may
be longer than its context. While the queries of a layer stay alike (cosine), its choice is kept. The keys are cached
unrotated; everything stays in the cache, only less of it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.hf.rotation import Rotation, rotation_of
from tokenary.memory.read_base import PartialRead
from tokenary.memory.token_select.reading import TokenSelectLayer
from tokenary.memory.token_select.votes import Vote

CARD = Card(
    slug="token-select",
    cls="TokenSelect",
    room="memory",
    title="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
    "Cache Selection",
    summary="reads sinks, a window and the tokens that the heads of a layer vote for; goes past the trained context",
    slot="read",
    paper="2411.02886",
    year=2024,
    code="pzs19/TokenSelect",
    requires=("kv-cache", "rope"),
    refuses=(
        ("keep", "its cache holds unrotated keys, by which a keep policy would misjudge them"),
        ("store", "its cache holds unrotated keys, and a store judges tokens by rotated ones"),
    ),
)

__all__ = ["CARD", "TokenSelect"]


class TokenSelect(PartialRead):
    """Read sinks, a window and the tokens with the most votes.

    Parameters
    ----------
    read : Budget
        Tokens chosen by vote; a share is of all tokens so far.
    sinks : int
        First tokens, always read.
    local : int
        Newest tokens, always read, the query included.
    chunk : int
        Tokens of the prompt that choose together, at most `local`. A pass of the prompt (1024 tokens) starts a new
        chunk. The first of a chunk sees fewer than `local` tokens before it.
    vote : {"soft", "hard", "raw", "none"}
        What the heads sum: their softmax, one for each of a head's own top-k tokens, or plain logits. ``none`` leaves
        sinks and window with positions counted anew, as StreamingLLM reads.
    scale : {"none", "width"}
        Logits of the vote as they are, as released, or divided by the square root of the head's width.
    pool : int
        Odd width of a max-pool over the votes of neighbours; 1 for none.
    reuse : float
        Cosine of the queries of a layer from which on it keeps its last choice; 1 chooses every time, as released.
    """

    rotation: Rotation
    extends_context = True

    toy_options: ClassVar[Mapping[str, Any]] = {"read": 8, "sinks": 2, "local": 6, "chunk": 4}

    def __init__(
        self,
        read: Budget = Budget(tokens=2048),  # noqa: B008 (frozen)
        sinks: Annotated[int, Field(ge=0)] = 128,
        local: Annotated[int, Field(ge=1)] = 512,
        chunk: Annotated[int, Field(ge=1, le=1024)] = 512,
        vote: Vote = "soft",
        scale: Literal["none", "width"] = "none",
        pool: Annotated[int, Field(ge=1, le=63)] = 1,
        reuse: Annotated[float, Field(ge=-1, le=1)] = 1.0,
    ) -> None:
        super().__init__(read)
        if pool % 2 == 0:
            raise OptionError("pool", pool, "an odd number")
        self.sinks, self.local, self.chunk = sinks, local, chunk
        self.vote, self.scale, self.pool, self.reuse = vote, scale, pool, reuse

    def prepare(self, model: PreTrainedModel) -> None:
        """Read how the model rotates.

        Raises
        ------
        UnsupportedModelError
            If it has no rotary positions, rotates its layers differently, or has sliding layers.
        """
        text = model.config.get_text_config(decoder=True)
        if "sliding_attention" in (getattr(text, "layer_types", None) or []):
            raise UnsupportedModelError(f"{type(model).__name__} has sliding layers, whose keys must come rotated")
        self.rotation = rotation_of(model)

    def count(self, seen: Tensor) -> Tensor:
        """Return how many tokens are chosen by vote."""
        return torch.zeros_like(seen) if self.vote == "none" else super().count(seen)

    def most(self, seen: Tensor) -> Tensor:
        """Return how many tokens a query reads: sinks, chosen ones and window."""
        return (self.sinks + self.count(seen) + self.local).minimum(seen)

    def layer(self, index: int) -> TokenSelectLayer:
        """Return fresh state for one layer."""
        return TokenSelectLayer(self)
