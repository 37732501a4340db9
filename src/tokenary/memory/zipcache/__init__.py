"""ZipCache: KV Cache Quantization with Salient Token Identification (He et al. 2024, arXiv 2405.14256).

Every token stays; *salient* ones are stored in more bits than the others. Three parts:

- quantizers that need few numbers beside the codes (`quantizers`): keys a channel, the salient and the others apart;
  values a token, after every channel was divided by ``sqrt(max |v|)``;
- saliency is the attention that a token receives, *divided by the number of queries that could see it*. Accumulated
  attention favours early tokens, which more queries see::

      A = softmax(q K^T / sqrt(d))     p~[i] = sum_k A[k, i] / |{k : k >= i}|     salient: all but the lowest 40 % of p~

- only the queries of a few *probe* tokens are asked: the newest 5 % and another random 5 %. Attention itself stays in
  its fused kernel.

The prompt is stored when it was read, every further 100 tokens when they are there; until then they lie open in full
precision. What is stored is never rounded a second time: every 100 tokens are a segment of their own (the released code
rounds the whole cache anew). Sets belong to key heads, attention summed over the query heads of a group; keys and
values share them. Keys are stored rotated.

Attention over a segment multiplies the packed codes' integers with scaled queries, and scales the weights instead of
the values, so that neither keys nor values are restored. The ablations of the paper are options: the scores of other
methods (``saliency``), other probes, other quantizers.

Random probes are named by (seed, layer, first token of the segment): a text depends neither on its neighbours nor on
how many tokens a pass yields.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from tokenary.core.card import Card
from tokenary.memory.base import StorePolicy
from tokenary.memory.zipcache.layer import ZipLayer
from tokenary.memory.zipcache.packing import WHOLE
from tokenary.memory.zipcache.quantizers import Scheme
from tokenary.memory.zipcache.saliency import Chooser, Probes, Saliency

CARD = Card(
    slug="zipcache",
    cls="ZipCache",
    room="memory",
    title="ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
    summary="keeps every token of the cache: those that get most attention in 4 bits, the others in 2",
    slot="store",
    paper="2405.14256",
    year=2024,
    code="ThisisBillhe/ZipCache",
    requires=("kv-cache",),
    refuses=(
        (
            "keep",
            "values share one scale over all heads of a token, and a cache that drops tokens tears the heads apart",
        ),
    ),
)

__all__ = ["CARD", "ZipCache"]


def _bits(value: int) -> int:
    if not 1 <= value <= 8 and value != WHOLE:
        raise ValueError(f"1 to 8, or {WHOLE}")
    return value


Bits = Annotated[int, AfterValidator(_bits)]


class ZipCache(StorePolicy):
    """Store salient tokens in more bits than the others.

    Parameters
    ----------
    high, low : int
        Bits of salient and of other tokens, 1 to 8; with 16 they stay as the model made them.
    salient : float
        Share of the tokens that are salient.
    saliency : {"normalized", "length", "accumulated", "recent", "random"}
        The paper's score; divided by the length instead, as in the released code; not divided (H2O); or, as controls,
        the newest tokens, or random ones.
    probes : {"both", "recent", "random", "all"}
        Whose attention counts; ``both`` is half recent, half random tokens.
    probed : float
        Share of the tokens that are probes.
    keys, values : {"channel", "separable", "token", "group"}
        What shares a scale: see `quantizers`.
    interval : int
        New tokens that are stored together.
    seed : int
        Of random probes and random sets.
    """

    def __init__(
        self,
        high: Bits = 4,
        low: Bits = 2,
        salient: Annotated[float, Field(ge=0, le=1)] = 0.6,
        saliency: Saliency = "normalized",
        probes: Probes = "both",
        probed: Annotated[float, Field(gt=0, le=1)] = 0.1,
        keys: Scheme = "channel",
        values: Scheme = "separable",
        interval: Annotated[int, Field(ge=1)] = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(high, low, interval)
        self.salient, self.saliency, self.probes, self.probed = salient, saliency, probes, probed
        self.keys, self.values, self.seed = keys, values, seed

    def layer(self, index: int) -> ZipLayer:
        """Return fresh state for one layer."""
        share = 1.0 if self.high == self.low else self.salient  # else there is nothing to choose
        return ZipLayer(
            self,
            bits=(self.high, self.low),
            schemes=(self.keys, self.values),
            chooser=Chooser(share, self.saliency, self.probes, self.probed, self.seed, index),
        )
