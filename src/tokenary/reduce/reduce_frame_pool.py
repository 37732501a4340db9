"""Control: the mean over the frames of a segment, patch by patch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.token_map import TokenMap
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.mix import segments

CARD = Card(
    slug="reduce-frame-pool",
    cls="ReduceFramePool",
    room="reduce",
    title="Average of frames",
    summary="makes one frame of a few by averaging each place over them",
    slot="reduce",
    requires=("images",),
    baseline=True,
)


class ReduceFramePool(Reducer):
    """Average each place over the frames of a segment; what is no clip stays as it is.

    Parameters
    ----------
    frames : int
        Consecutive frames of a segment, in an encoder alone.
    """

    kind = "merge"
    at = "vision:50%"

    def __init__(self, frames: Annotated[int, Field(ge=1)] = 4) -> None:
        super().__init__(Budget(ratio=1.0))
        self.frames = frames

    def attach(self, model: nn.Module, at: Point | str | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Let a model work on fewer tokens, an encoder with its frames joined; see `Reducer.attach`."""
        if not hasattr(model, "language"):
            options = {"join": self.frames, **options}
        return super().attach(model, at, **options)

    def count(self, num_tokens: int, context: Context) -> int:
        """Return how many tokens stay: those of one frame."""
        return num_tokens // context.views if context.layout == "clip" else num_tokens

    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Average by place."""
        view, row, column = context.places(x).unbind(-1)
        place = row * context.grid[1] + column
        if context.layout != "clip":
            place = place + view * context.grid[0] * context.grid[1]
        place = place.masked_fill(~context.allowed(x), -1)
        return segments(place, self.count(x.shape[1], context), context.sizes)
