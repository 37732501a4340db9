"""Nacrith: arithmetic coding under a language model, corrected online by what the text itself teaches.

P(token) = w p_model + (1 - w) p_ngrams,    p_model = softmax(logits + b)
b  <- b - rate (p_model - onehot(token))    the head learns a bias for every token
w  <- w sqrt(p_model(token)) / (w sqrt(p_model(token)) + (1 - w) sqrt(p_ngrams(token)))
Where the n-grams alone are sure (entropy below `skip`), the token is coded with them and the model is not asked.

Counts of 24 bits: with 16, the least count of each of 49,152 symbols would take three quarters of the range.
Paper: arXiv 2602.19626 (2026). Three options have other defaults than the paper's values, for what they save (see the
claim); the paper's are `mixer=paper, rate=0.001, skip=1.5`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tokenary.codec.base import TextCodec
from tokenary.codec.nacrith.ensemble import OnlineEnsemble, Settings
from tokenary.core.card import Card

CARD = Card(
    slug="nacrith",
    cls="Nacrith",
    room="codec",
    slot="codec",
    title="Nacrith: Neural Lossless Compression via Ensemble Context Modeling and High-Precision CDF Coding",
    summary="compresses text and files without loss, with a language model that learns along",
    paper="2602.19626",
    year=2026,
    code="robtacconelli/Nacrith-GPU",
    lossless=True,
    requires=("kv-cache", "rope"),
)


class Nacrith(TextCodec):
    """Language model, n-grams, bias head and skipping, in lanes that advance together.

    Parameters
    ----------
    lanes : int
        Most lanes a block is cut into. Each starts without context, and together they read the weights once a step.
    least : int
        Fewest tokens of a lane.
    window : int
        Most tokens that the model sees.
    drop : int
        Tokens forgotten at once when the window is full; the rest stays as it is.
    sinks : int
        First tokens of a lane that are never forgotten. Models rest attention that has nowhere else to go on them, and
        predict far worse without.
    order : int
        Longest context of the n-grams.
    contexts : int
        Most contexts kept of each order.
    head : bool
        The adaptive bias.
    rate : float
        Its step.
    factors : float
        Step of the factors by which tokens that the n-grams propose become likelier or less likely in the model's
        distribution, learnt for each kind of proposal; 0 for none.
    mixer : {"context", "paper", "off"}
        One pair of weights for each order and confidence of the n-grams, with forgetting; one pair for all; none.
    warm_up : int
        Tokens of a block that are coded by the model alone.
    skip : float
        Bits of entropy below which the n-grams code alone; 0 never.
    """

    def __init__(
        self,
        lanes: Annotated[int, Field(ge=1, le=64)] = 8,
        least: Annotated[int, Field(ge=1)] = 1024,
        window: Annotated[int, Field(ge=8, le=8192)] = 2048,
        drop: Annotated[int, Field(ge=4, le=512)] = 512,
        sinks: Annotated[int, Field(ge=0, le=64)] = 4,
        order: Annotated[int, Field(ge=0, le=8)] = 4,
        contexts: Annotated[int, Field(ge=1)] = 500_000,
        head: bool = True,
        rate: Annotated[float, Field(gt=0, le=1)] = 0.1,
        factors: Annotated[float, Field(ge=0, le=1)] = 0.1,
        mixer: Literal["context", "paper", "off"] = "context",
        warm_up: Annotated[int, Field(ge=0)] = 100,
        skip: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        from tokenary.core.errors import OptionError

        if drop >= window - sinks:
            raise OptionError("drop", drop, f"less than window={window} without sinks={sinks}")
        if sinks > drop:
            raise OptionError("sinks", sinks, f"at most drop={drop}")
        self.window, self.drop, self.sinks = window, drop, sinks
        self.most, self.least = lanes, least
        self.settings = Settings(order, contexts, head, rate, factors, mixer, warm_up, skip)

    def lanes_for(self, tokens: int) -> int:
        """As many lanes as have `least` tokens each, up to `lanes`."""
        return max(1, min(self.most, tokens // self.least))

    def ensemble(self, vocab_size: int, lanes: int) -> OnlineEnsemble:
        """Return a fresh state for a block."""
        return OnlineEnsemble(vocab_size, lanes, self.settings)
