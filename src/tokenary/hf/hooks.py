"""Hooks between the layers of a decoder, where transformers has no named extension point of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tokenary.core.errors import OptionError, UnsupportedModelError

#: ``edit(hidden_states, kwargs) -> (hidden_states, kwargs)``; kwargs hold attention_mask, position_ids,
#: position_embeddings and past_key_values of the layer.
LayerEdit = Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a language model, in order.

    Raises
    ------
    UnsupportedModelError
        If the model keeps them elsewhere than in one list as long as its configuration says.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and hasattr(module[0], "self_attn"):
            return module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention of every decoder layer, in order; see `decoder_layers`."""
    return [layer.self_attn for layer in decoder_layers(model)]  # type: ignore[misc]


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states (B, N, D) that a layer, or its attention, was called with."""
    return args[0] if args else kwargs["hidden_states"]


def watched_heads(attention: nn.Module, kind: str, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Hand over what an attention module projects, as it comes and before it is rotated.

    Parameters
    ----------
    attention : nn.Module
        Of a decoder layer, or of a layer of transformers' ViT.
    kind : {"queries", "keys", "values"}
        What; where the module normalizes queries or keys, it is what comes out of that.
    keep : callable
        Gets (B, H, N, D).

    Raises
    ------
    UnsupportedModelError
        If the module projects them otherwise.
    """
    source = getattr(attention, f"{kind[0]}_norm", None) or getattr(attention, f"{kind[0]}_proj", None)
    size = getattr(attention, "head_dim", None)
    if source is None or size is None:
        raise UnsupportedModelError(f"{type(attention).__name__} has no {kind} to look at")

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        keep((output if output.ndim == 4 else output.unflatten(-1, (-1, size))).transpose(1, 2))

    return source.register_forward_hook(hook)


@contextlib.contextmanager
def edited_layer(model: PreTrainedModel, index: int, edit: LayerEdit) -> Iterator[None]:
    """Let `edit` change what a decoder layer receives, inside the block.

    Parameters
    ----------
    model : PreTrainedModel
        A language model.
    index : int
        Which layer.
    edit : callable
        Gets hidden_states (B, N, D) and the layer's other arguments.
    """
    layers = decoder_layers(model)
    if not 0 <= index < len(layers):
        raise OptionError("layer", index, f"0 to {len(layers) - 1}")

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        hidden_states, kwargs = edit(hidden_states, kwargs)
        return (hidden_states, *args[1:]), kwargs

    handle = layers[index].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
