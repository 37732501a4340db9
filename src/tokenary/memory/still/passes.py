"""What the attention of some layers sees of a text, and what it should say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from tokenary.hf.cache import TokenCache, TokenLayer
from tokenary.hf.hooks import attention_modules, decoder_layers, hidden_states_of
from tokenary.hf.target import attached
from tokenary.memory.base import ReadLayer
from tokenary.memory.still.branches import Exact
from tokenary.memory.still.hybrid import Plan
from tokenary.memory.still.maps import Maps
from tokenary.memory.still.routing import Rule, prompt_saliency


@dataclass(frozen=True, eq=False)
class Pass:
    """What one layer's attention sees of a text, and says.

    Parameters
    ----------
    query, key, value : Tensor
        (Hq, N, D), and twice (Hkv, N, D), rotated, float32.
    hidden_states : Tensor
        What they were made of, (N, hidden).
    scaling : float
        Factor on the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor
    scaling: float

    def scores(self, rule: Rule) -> Tensor:
        """Saliency of every token, (Hkv, N)."""
        return prompt_saliency(self.query, self.key, self.scaling, rule.chunk)

    def softmax(self, first: int = 0) -> Tensor:
        """Output of ordinary attention for the tokens from `first` on, (Hq, N - first, D)."""
        query, key, value = self.query[None], self.key[None], self.value[None]
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True)
        return output[0, :, first:]

    def exact(self, rule: Rule, layer: int, first: int = 0) -> tuple[Plan, Exact]:
        """What every chunk looks at, and what the exact branch says to the tokens from `first` on."""
        plan = Plan.of(rule, self.scores(rule), self.key.shape[1], layer)
        return plan, plan.exact(self.query[:, first:], self.key, self.value, self.scaling)

    def hybrid(self, maps: Maps, rule: Rule, plan: Plan, exact: Exact, first: int = 0) -> Tensor:
        """Output of hybrid attention for the tokens from `first` on, (Hq, N - first, D)."""
        linear = plan.linear(self.query[:, first:], self.key, self.value, maps)
        return exact.joined(linear, maps.gates(self.hidden_states[first:]), rule.rescale)


class _Watch(ReadLayer):
    """Reads everything, and notes queries, keys and values."""

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Note them."""
        self.seen = (query[0].float(), key[0].float(), value[0].float())
        self.scale = scale


class _Enough(Exception):
    """All layers that matter were computed."""


def passes(model: PreTrainedModel, ids: Sequence[int], layers: Sequence[int]) -> dict[int, Pass]:
    """Read a text in one pass, as far up as needed; return what the attention of `layers` sees."""
    blocks: Any = decoder_layers(model)
    readers = [_Watch() if index in layers else None for index in range(len(blocks))]
    hidden: dict[int, Tensor] = {}

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        hidden[int(module.layer_idx)] = hidden_states_of(args, kwargs)

    def stop(module: Any, args: tuple, output: object) -> None:
        raise _Enough

    attention = attention_modules(model)
    handles = [attention[index].register_forward_pre_hook(note, with_kwargs=True) for index in layers]
    handles.append(blocks[max(layers)].register_forward_hook(stop))
    try:
        with attached(model), torch.no_grad():
            cache = TokenCache(model.config, None, readers)
            model(torch.tensor([list(ids)], device=model.device), past_key_values=cache, use_cache=True)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for index in layers:
        watch = readers[index]
        assert watch is not None
        found[index] = Pass(*watch.seen, hidden[index][0].float(), watch.scale)
    return found
