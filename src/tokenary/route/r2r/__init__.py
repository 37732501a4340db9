"""R2R, roads to Rome: token routing between a small and a large model (arXiv 2505.21600).

A small model writes every token; a router that sees only the small model's own outputs picks out the few tokens that
would change where the text goes, and the large model writes those instead, at once, without draft and roll-back:

    p = sigmoid(router(h_t, embedding(x_t), top-100 logits))       x_t: the small model's token, h_t: its hidden state
    token = x_t if p < threshold else the large model's token after all that was written so far

The large model reads the tokens it skipped in one pass when it is called, with a cache of its own; the small one simply
goes on from whatever token was written. Rows of a batch route separately. Policies of a recipe (what is kept of the
past, what is read of it) are those of the large model's cache; the small one's is always whole.

The router is trained on automatic labels: the large model continues the sentence once from its own token and once from
the small one's, and the token counts as divergent where the two endings differ in meaning (`labels`). Where this
differs from the paper:

- The judge of two endings is a rule on their words, numbers and negations, where the paper asks a 72B model: the labels
  are proxies.
- The shipped router has 0.9 M parameters and saw some 8,000 labels (the paper's 56 M, and 7.6 M): its inputs are
  standardised, the logits enter as log-probabilities, and most of the hidden state is dropped in training.
- ``large_share`` sets the threshold by quantiles stored with the router; without them (another model) a token is routed
  where its score is in the upper share of the scores of its own text so far.
- A model for which no trained sibling exists gets one by keeping some of its layers, and routes by entropy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.hf.strategy import Strategy, Task
from tokenary.hf.target import check_causal
from tokenary.models.smollm2_small import keep_layers, small_sibling
from tokenary.route.r2r.loop import Gate, Mixed, Score
from tokenary.route.r2r.router import Random, Switch, Trained, aleatoric, entropy, load_router, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = Card(
    slug="r2r",
    cls="R2R",
    room="route",
    title="R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing",
    summary="a small model writes, a router hands the tokens that change the text's course to the large one",
    slot="strategy",
    paper="2505.21600",
    year=2025,
    code="thu-nics/R2R",
    lossless=False,
    training="minutes",
    requires=("kv-cache",),
)

__all__ = ["CARD", "R2R"]

#: Thresholds of the switches that need no training: the published ones, and a tenth of the tokens.
SWITCHES = {"entropy": 0.45, "aleatoric": 2.275, "random": 0.9}


def _share(value: object) -> object:
    """Read 20% as 0.2."""
    return f"{value[:-1]}e-2" if isinstance(value, str) and value.endswith("%") else value


class R2R(Strategy):
    """Writes with a small model and lets the large one overrule token by token.

    Parameters
    ----------
    small : str
        "trained": the distilled sibling of SmolLM2-135M that ships with Tokenary; "layers:N": N layers of the model
        itself, the first and last ones; "auto": the trained one where it fits, else half of the layers.
    router : {"auto", "trained", "entropy", "aleatoric", "random"}
        What decides: the trained router; the small model's entropy or aleatoric uncertainty; a control. "auto": the
        trained router with the trained sibling, else the entropy.
    threshold : float or "auto"
        Scores from here on go to the large model: probability for "trained", nats for "entropy" and "aleatoric", a
        uniform number for "random". 0 is the large model alone. "auto": the trained router's own, 0.45, 2.275, 0.9.
    large_share : float or "auto"
        Instead of a threshold: the share of tokens that the large model should write, 0 to 1 or 0% to 100%. It is met
        on average over texts like those of the calibration, not exactly.
    seed : int
        Of the random router.
    """

    def __init__(
        self,
        small: Annotated[str, Field(pattern=r"^(auto|trained|layers:[1-9][0-9]*)$")] = "auto",
        router: Literal["auto", "trained", "entropy", "aleatoric", "random"] = "auto",
        threshold: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto",
        large_share: Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)] | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        if threshold != "auto" and large_share != "auto":
            raise OptionError("large_share", large_share, "no threshold beside it")
        if router == "trained" and small.startswith("layers"):
            raise OptionError("router", router, f"entropy, aleatoric or random with small={small}")
        self.small, self.router, self.threshold = small, router, threshold
        self.large_share, self.seed = large_share, seed

    def prepare(self, model: PreTrainedModel, tokenizer: Any | None) -> None:
        """Build the small model and the router.

        Raises
        ------
        UnsupportedModelError
            If the trained sibling or router is asked for and belongs to another model, or there are too few layers.
        """
        check_causal(model)
        self.net, trained = self._small(model, tokenizer)
        config = read_config() if trained else {}
        kind = self.router
        if kind == "auto":
            kind = "trained" if trained else "entropy"
        self.score: Score
        if kind == "trained":
            if not trained:
                raise UnsupportedModelError("the trained router needs the trained small model, which is SmolLM2-135M's")
            self.score = Trained(load_router(config), self.net)
        else:
            self.score = Random(self.seed) if kind == "random" else Switch(entropy if kind == "entropy" else aleatoric)
        self._at = self._threshold(kind, config)

    def _small(self, model: PreTrainedModel, tokenizer: Any | None) -> tuple[PreTrainedModel, bool]:
        """Return the small model, and whether it is the trained one."""
        layers = model.config.get_text_config().num_hidden_layers
        if self.small.startswith("layers:"):
            count = int(self.small.partition(":")[2])
            if count >= layers:
                raise UnsupportedModelError(f"small={self.small}: the model has {layers} layers")
            return keep_layers(model, ends(layers, count)), False
        try:
            return small_sibling(model, tokenizer), True
        except UnsupportedModelError:
            if self.small == "trained":
                raise
        return keep_layers(model, ends(layers, max(1, layers // 2))), False

    def _threshold(self, kind: str, config: dict[str, Any]) -> float | None:
        """Return the threshold, or None where `large_share` is kept text by text."""
        share = self.large_share
        if share == "auto":
            own = config["threshold"] if kind == "trained" else SWITCHES[kind]
            return own if self.threshold == "auto" else self.threshold
        if share in (0, 1):
            return -math.inf if share else math.inf
        if kind == "random":
            return 1 - share
        if kind in config.get("quantiles", {}):
            scores = config["quantiles"][kind]
            return float(np.interp(1 - share, np.linspace(0, 1, len(scores)), scores))
        return None

    def loop(self, task: Task) -> Mixed:
        """Return the mixed loop."""
        share = 0.0 if self.large_share == "auto" else self.large_share
        return Mixed(task, self.net, self.score, lambda: Gate(self._at, share))


def ends(layers: int, count: int) -> list[int]:
    """Choose `count` of `layers` layers: the first ones and the last ones."""
    first = (count + 1) // 2
    return [*range(first), *range(layers - (count - first), layers)]
