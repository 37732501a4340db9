"""ASSD: any-subset speculative decoding (arXiv 2504.20456).

An any-subset autoregressive model knows the exact distribution of any masked tokens given any visible ones, and tells
it in one pass for a whole proposal. So it drafts k tokens at once, each as if it were next, then checks its proposal
and keeps the part that its joint distribution agrees with. What comes out is distributed as if the tokens had been
drawn one a pass, left to right, and there are never more passes than tokens.

    draft    x_s ~ p_s = p(. | decoded)                       s = 0..k-1, one pass
    verify   q_s = p(. | decoded, x_0 .. x_{s-1})             one pass; q_0 = p_0, so that x_0 always stands
    accept   with probability min(1, q_s(x_s) / p_s(x_s)); at the first refusal draw from max(q_s - p_s, 0), stop

Where this differs from the published code: it keeps the keys and values of what is decoded, computes only the rows that
a pass needs, runs batches, and draws named random numbers. The options k and drafter change which sample a seed
gives, never its distribution; at temperature 0 they change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.decode.any_subset_ar.loop import Filling, NGram, Row, accept_drafts
from tokenary.decode.any_subset_ar.streams import Streams, log_density
from tokenary.hf.strategy import Strategy, Task

CARD = Card(
    slug="any-subset-ar",
    cls="ASSD",
    room="decode",
    title="Reviving Any-Subset Autoregressive Models with Principled Parallel Sampling and Speculative Decoding",
    summary="fills any blanks several tokens a round, from the model's exact joint distribution",
    slot="strategy",
    paper="2504.20456",
    year=2025,
    code="gabeguo/any-order-speculative-decoding",
    lossless=True,
    training="hours",
    requires=("any-subset",),
)

__all__ = ["ASSD", "CARD", "Filling", "NGram", "Row", "Streams", "accept_drafts", "log_density"]


class ASSD(Strategy):
    """Fills the mask tokens of the prompts left to right, then writes `max_new_tokens` more.

    Parameters
    ----------
    k : int
        Tokens of a draft. 1 is sequential decoding, a token a pass: what all others are compared with.
    drafter : {"self", "ngram"}
        The network itself, or counts of the pairs of tokens in the known part of the text, which cost no pass.
    verify : bool
        False keeps every draft of the network as it is: k tokens a pass, each blind to the others. This is no longer
        the model's distribution, and there for comparison.
    draft_temperature : float
        Cools the drafts after the first, on top of the sampling temperature; what is written keeps its distribution.
    """

    def __init__(
        self,
        k: Annotated[int, Field(ge=1, le=64)] = 5,
        drafter: Literal["self", "ngram"] = "self",
        verify: bool = True,
        draft_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0,
    ) -> None:
        if drafter == "ngram" and not verify:
            raise OptionError("verify", verify, "True, since counts alone do not know the text")
        if draft_temperature != 1 and (drafter == "ngram" or not verify):
            raise OptionError("draft_temperature", draft_temperature, "1 unless it is the network's drafts to verify")
        self.k, self.drafter, self.verify, self.draft_temperature = k, drafter, verify, draft_temperature

    def prepare(self, model: PreTrainedModel, tokenizer: Any | None) -> None:
        """Refuse models that were not trained for any-subset densities."""
        if getattr(model.config, "objective", None) != "any-subset":
            raise UnsupportedModelError(f"{CARD.slug} needs a model trained for any-subset autoregression")

    def loop(self, task: Task) -> Filling:
        """Return the loop; `log_density` gives the probability of what it wrote."""
        return Filling(task, self.k, self.drafter, self.verify, self.draft_temperature, CARD.slug)
