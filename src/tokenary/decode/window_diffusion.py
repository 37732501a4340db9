"""Window-Diffusion: Windowed Token Pruning and Caching (2026, arXiv 2601.20332).

What is decoded next stands near the decoded text; masks far behind hardly matter to it; keys and values of a decoded
token change only shortly after it was decoded. Masks are told apart by their rank among the masks, left to right::

    refresh, every C-th pass:  compute all T positions, attend to all, write all keys and values; then
                               window = {decoded} + {masks of rank < w}         fixed until the next refresh
    other passes:              active = {masks of rank < a} + {decoded in this phase}         computed, and written
                               attend to window; predict the active masks

Masks between a and w are the buffer: cached. Those beyond w are left out. Tokens decoded in a pass between refreshes
stay active until the next refresh (their transient); those of the refresh itself for one pass, as in the authors' code
(its variant for LLaDA; `early_stop` is that of their other one). A refresh in every pass is the full decoder.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.decode.denoise import Pass, Window, WindowState

CARD = Card(
    slug="window-diffusion",
    cls="WindowDiffusion",
    room="decode",
    slot="window",
    title="Window-Diffusion: Accelerating Diffusion Language Model Inference with Windowed Token Pruning and Caching",
    summary="computes only the first masks and what was just decoded, over a cached window; far masks are left out",
    paper="2601.20332",
    year=2026,
    code="vhicrgit/Window-Diffusion",
    requires=("diffusion", "rope"),
)


class WindowDiffusion(Window):
    """Compute the first masks, cache a window, leave the rest out.

    Parameters
    ----------
    window : int
        Masks that can be attended to, w.
    active : int
        Masks that are computed, a; at most `window`.
    refresh : int
        Passes from one full computation to the next, C.
    buffer : bool
        Without it the window ends with the active masks (ablation).
    transient : bool
        Without it a decoded token keeps its mask's keys and values until the next refresh (ablation).
    early_stop : bool
        Drop what stands behind an end token as soon as it is committed.
    """

    everything = {"window": 10**9, "active": 10**9, "refresh": 1}  # noqa: RUF012

    def __init__(
        self,
        window: Annotated[int, Field(ge=1)] = 64,
        active: Annotated[int, Field(ge=1)] = 16,
        refresh: Annotated[int, Field(ge=1)] = 32,
        buffer: bool = True,
        transient: bool = True,
        early_stop: bool = False,
    ) -> None:
        if active > window:
            raise OptionError("active", active, f"at most window={window}")
        self.width, self.active, self.cycle = window if buffer else active, active, refresh
        self.transient, self.early_stop = transient, early_stop

    def begin(self) -> WindowState:
        """Begin with a refresh."""
        return _Phase(self)


class _Phase(WindowState):
    """Where one sequence stands between two refreshes."""

    def __init__(self, method: WindowDiffusion) -> None:
        self.method, self.step = method, 0

    def plan(self, masked: Tensor, fresh: Tensor) -> Pass:
        """Refresh, or compute what is active."""
        at, self.step = self.step % self.method.cycle, self.step + 1
        if at == 0:
            return Pass()
        if at == 1:  # the masks as the refresh left them
            self.window = in_window(masked, self.method.width)
            self.decoded, keep = torch.zeros_like(masked), fresh
        else:
            self.decoded, keep = self.decoded | fresh, self.decoded | fresh
        computed = first_masks(masked, self.method.active)
        if self.method.transient:
            computed = computed | keep
        return Pass(computed.nonzero()[:, 0], self.window)


def first_masks(masked: Tensor, count: int) -> Tensor:
    """Mark the masks (T,) of rank below `count`."""
    return masked & (masked.cumsum(0) <= count)


def in_window(masked: Tensor, width: int) -> Tensor:
    """Positions (N,) that are attended to: what is decoded, wherever it stands, and the first masks."""
    return (~masked | first_masks(masked, width)).nonzero()[:, 0]
