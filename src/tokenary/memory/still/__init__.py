"""STILL (2026, arXiv 2602.02180): a few salient tokens stay exact, all other old ones become a sum.

Text is cut into chunks of l tokens. A query attends exactly to its own chunk, to the one before it, and to the r most
salient tokens of every older one; the other old tokens have left the cache and are summed in a linear state::

    y = (sum_i u_i v_i + g * phi_q(q) S) / (sum_i u_i + phi_q(q) . Z)        u_i = exp(q . k_i / sqrt(D) - max)
    S = sum phi_k(k_i) v_i^T,  Z = sum phi_k(k_i)                            over what left;  g = sigmoid(W_g h)

A token is salient if its attention over a window changes much when it may not look at itself (`routing`). The feature
maps keep the norm of queries and keys (`maps`). Maps and gate are learnt by attention transfer, in a few layers in the
middle of a model; the others stay as they are. Memory is r / l of the keys and values, and a constant.

The cache holds key heads, so tokens are chosen for each key head, by scores averaged over the query heads that share
it; the paper repeats key heads and chooses for each query head. Maps, gates and sums are those of query heads, as
there.

Maps belong to a model. Those of SmolLM2-135M ship (``scripts/train_still.py``); other models are refused, or rough ones
are trained on a few texts that the model writes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from transformers import PretrainedConfig, PreTrainedModel

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError, RecipeError, UnsupportedModelError
from tokenary.hf.hooks import attention_modules
from tokenary.memory.base import KeepLayer, KeepPolicy
from tokenary.memory.learnt import fits, own_texts
from tokenary.memory.still.layer import DenseLayer, StillLayer, hand_over
from tokenary.memory.still.maps import Features, Maps, belongs_to, load_maps
from tokenary.memory.still.routing import Routing, Rule
from tokenary.memory.still.training import Variant, middle_layers, transfer

CARD = Card(
    slug="still",
    cls="STILL",
    room="memory",
    title="STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs",
    summary="keeps the salient tokens of old chunks in middle layers and sums the others into a linear state",
    slot="keep",
    paper="2602.02180",
    year=2026,
    code="ZacharyMeng/STILL",
    training="minutes",
    requires=("kv-cache", "attention-logits"),
    refuses=(("read", "its layers attend in their own way to what they hold, and leave nothing to choose"),),
)
WEIGHTS = Path(__file__).with_name("weights")
OWN_CHUNKS = 6  # length of a text that a model writes to train on

__all__ = ["CARD", "STILL"]


class STILL(KeepPolicy):
    """Keep the salient tokens of old chunks exact, and sum the others.

    Parameters
    ----------
    chunk : int
        Tokens a chunk, l; also the window of the saliency.
    salient : int
        Tokens of every old chunk that stay exact, r; with all of them attention is the ordinary one.
    routing : {"saliency", "recent", "random"}
        Which ones: the most salient; as controls, a window that grows by as many, or any.
    features : {"norm", "hedgehog"}
        The feature map that keeps norms, or Hedgehog's.
    rescale : bool
        Take the linear branch off the maximum of the exact branch's logits, as these are. The paper leaves that scale
        for the maps to learn, for which they need more updates.
    weights : str
        Folder of trained maps; by default those for SmolLM2-135M. It holds those of controls too, as far as they were
        trained.
    train : int
        Short texts to train rough maps on where those do not fit; 0 to refuse the model.
    seed : int
        Of that training, and of random tokens.

    Raises
    ------
    OptionError
        If more tokens are salient than a chunk has.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {"chunk": 8, "salient": 2, "train": 1}

    def __init__(
        self,
        chunk: Annotated[int, Field(ge=2, le=4096)] = 64,
        salient: Annotated[int, Field(ge=0)] = 4,
        routing: Routing = "saliency",
        features: Features = "norm",
        rescale: bool = False,
        weights: str = "",
        train: Annotated[int, Field(ge=0, le=1000, json_schema_extra={"remote": False})] = 0,
        seed: int = 0,
    ) -> None:
        if salient > chunk:
            raise OptionError("salient", salient, f"at most chunk={chunk}")
        super().__init__(Budget(ratio=1.0), "uniform", chunk)
        self.rule = Rule(chunk, salient, routing, rescale, seed)
        self.variant = Variant(routing, features, rescale)
        self.weights, self.train, self.seed = weights, train, seed
        self.maps: dict[int, Maps] | None = None  # by layer, once prepared

    def prepare(self, model: PreTrainedModel) -> None:
        """Load the maps of a model, or train some, and let its attention hand hidden states to our cache.

        Raises
        ------
        UnsupportedModelError
            The maps belong to another model, or this one keeps its layers elsewhere than in one list.
        InputError
            The folder of weights cannot be read.
        """
        attention = attention_modules(model)
        folder = Path(self.weights) if self.weights else WEIGHTS
        if fits(model, *belongs_to(folder)):
            maps = load_maps(folder, self.variant.name, self.variant.features)
        elif self.weights or not self.train:
            raise UnsupportedModelError(
                "the feature maps of still were trained for another model: train some with scripts/train_still.py"
                " --model NAME --out FOLDER and give weights=FOLDER"
            )
        else:
            maps = self._trained(model)
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.maps = {layer: each.to(model.device, dtype).requires_grad_(False) for layer, each in maps.items()}
        for layer in maps:
            if hand_over not in attention[layer]._forward_pre_hooks.values():
                attention[layer].register_forward_pre_hook(hand_over, with_kwargs=True)

    def _trained(self, model: PreTrainedModel) -> dict[int, Maps]:
        """Train maps on short texts that the model writes."""
        length = OWN_CHUNKS * self.rule.chunk
        if length > model.config.get_text_config(decoder=True).max_position_embeddings:
            raise UnsupportedModelError(f"texts of {length} tokens, to train maps on, are past the model's context")
        texts = own_texts(model, self.train, length, self.seed)
        *_, (maps, _) = transfer(model, middle_layers(model), texts, [self.variant], self.rule, self.seed)
        return maps[self.variant.name]

    def attach(self, config: PretrainedConfig, dtype: torch.dtype) -> list[KeepLayer]:
        """Return fresh state for every layer of a model, with nothing left of earlier sequences.

        Raises
        ------
        RecipeError
            If it was not prepared for a model.
        """
        if self.maps is None:
            raise RecipeError("still belongs to a model: call prepare(model) first")
        return super().attach(config, dtype)

    def layer(self, index: int) -> KeepLayer:
        """Return fresh state for one layer: one that keeps everything where no maps are."""
        maps = None if self.maps is None else self.maps.get(index)
        return DenseLayer(self) if maps is None else StillLayer(self, maps)
