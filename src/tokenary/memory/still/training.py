"""Attention transfer: hybrid attention should say what softmax attention says, on the model's own queries and keys.

    o = softmax(q K^T / sqrt(D)) V        loss = mean (y - o)^2 / mean o^2        in every layer by itself

The divisor makes layers comparable; Adam does not see it. The model stays as it is. Tokens of the first two chunks,
which attend exactly, teach nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenary.memory.still.maps import Features, Maps, fresh_maps
from tokenary.memory.still.passes import passes
from tokenary.memory.still.routing import Routing, Rule

LR = 1e-3


@dataclass(frozen=True)
class Variant:
    """What may differ between maps that are compared.

    Parameters
    ----------
    routing, features, rescale
        As in `tokenary.memory.STILL`.
    """

    routing: Routing = "saliency"
    features: Features = "norm"
    rescale: bool = False

    @property
    def name(self) -> str:
        """Name of its file: ``model`` for the method itself."""
        parts = [self.routing] * (self.routing != "saliency") + [self.features] * (self.features != "norm")
        return "-".join([*parts, *["rescaled"] * self.rescale]) or "model"

    def rule(self, rule: Rule) -> Rule:
        """Return a rule with this routing."""
        return replace(rule, routing=self.routing, rescale=self.rescale)


def transfer(
    model: PreTrainedModel,
    layers: Sequence[int],
    texts: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    rule: Rule,
    seed: int = 0,
) -> Iterator[tuple[dict[str, dict[int, Maps]], dict[str, float]]]:
    """Train maps on texts, each read once; variants learn beside each other from the same passes.

    Parameters
    ----------
    model : PreTrainedModel
        Frozen.
    layers : sequence of int
        Which get maps.
    texts : sequence of token ids
        One update each.
    variants : sequence of Variant
        What is trained.
    rule : Rule
        Its chunk and number of salient tokens.
    seed : int
        Of the first weights.

    Yields
    ------
    dict, dict
        Maps by name of the variant and by layer, always the same objects, and the loss of each variant on the text,
        before its update, as a share of the mean square of what is to be said; a mean over the layers.
    """
    text_config = model.config.get_text_config(decoder=True)
    maps: dict[str, dict[int, Maps]] = {}
    optimizers: dict[str, torch.optim.Adam] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for variant in variants:
            heads = text_config.num_attention_heads
            size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
            sizes = {"heads": heads, "size": size, "hidden": text_config.hidden_size}
            made = [each.to(model.device) for each in fresh_maps(len(layers), seed, variant.features, **sizes)]
            maps[variant.name] = dict(zip(layers, made, strict=True))
            optimizers[variant.name] = torch.optim.Adam(nn.ModuleList(made).parameters(), lr=LR)
    for ids in texts:
        with torch.inference_mode(False):
            seen = passes(model, ids, layers)
            losses = dict.fromkeys(maps, 0.0)
            first = 2 * rule.chunk
            for index, found in seen.items():
                truth = found.softmax(first)
                rules = {variant.name: variant.rule(rule) for variant in variants}
                exact = {
                    name: found.exact(each, index, first)
                    for name, each in {r.routing: r for r in rules.values()}.items()
                }
                for variant in variants:
                    own = rules[variant.name]
                    with torch.enable_grad():
                        said = found.hybrid(maps[variant.name][index], own, *exact[own.routing], first)
                        loss = (said - truth).square().mean() / truth.square().mean()
                        loss.backward()
                    losses[variant.name] += loss.item() / len(layers)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        yield maps, losses


def middle_layers(model: PreTrainedModel) -> list[int]:
    """Return the layers that get maps where nothing else is said: about an eighth of all, below the middle.

    Layers with a sliding window hold little, and are left out.
    """
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = [index for index, kind in enumerate(kinds) if kind != "sliding_attention"]
    first = len(full) * 2 // 5
    return full[first : first + max(1, round(len(full) * 4 / 30))]
