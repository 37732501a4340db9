"""A model on another vocabulary: its embedding tables read, replaced and tied; a tokenizer that keeps the old roles.

`resize_token_embeddings` knows where a model keeps its tables, its bias and its sizes; its rows are then all written
anew. The model itself is copied without its other weights, which both share.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.token_map import TokenMap

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SPARE = re.compile(r"unused|reserved", re.I)


def tables(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Return the input embeddings (V, D), and the head's (V, D) where they are not the same.

    Raises
    ------
    UnsupportedModelError
        The model has no table of input embeddings, no head, or a head of other width.
    """
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, weight = getattr(inputs, "weight", None), getattr(head, "weight", None)
    if rows is None or weight is None:
        raise UnsupportedModelError(f"{type(model).__name__} lacks a plain input embedding or language-model head")
    if weight is rows:
        return rows, None
    if weight.shape != rows.shape:
        shapes = f"{tuple(rows.shape)} and {tuple(weight.shape)}"
        raise UnsupportedModelError(f"{type(model).__name__}: embedding and head of different shape, {shapes}")
    return rows, weight


@torch.no_grad()
def on_vocabulary(model: PreTrainedModel, inputs: TokenMap, head: TokenMap) -> PreTrainedModel:
    """Return a model with mapped embedding tables; everything else is shared with `model`, which stays as it was.

    Parameters
    ----------
    model : PreTrainedModel
        Tied or not; stays so.
    inputs, head : TokenMap
        (V', V) each; `head` is applied to an untied head and to the head's bias.
    """
    rows, weight = tables(model)
    output: Any = model.get_output_embeddings()
    own = {id(rows), id(weight), id(getattr(output, "bias", None))}
    shared = {id(p): p for p in model.parameters() if id(p) not in own}
    made = copy.deepcopy(model, dict(shared))
    made.resize_token_embeddings(inputs.shape[0], mean_resizing=False)
    made.get_input_embeddings().weight.copy_(inputs.apply(rows))  # type: ignore[operator]
    new_head: Any = made.get_output_embeddings()
    if weight is not None:
        new_head.weight.copy_(head.apply(weight))
    if getattr(output, "bias", None) is not None:
        new_head.bias.copy_(head.apply(output.bias, dim=-1))
    return made.eval()


def rust_tokenizer(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> Tokenizer:
    """Return a copy of the Rust tokenizer inside, without truncation and padding.

    Raises
    ------
    UnsupportedModelError
        A tokenizer written in Python.
    """
    inner = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(inner, Tokenizer):
        raise UnsupportedModelError(f"{type(tokenizer).__name__} has no tokenizer.json behind it")
    made = Tokenizer.from_str(inner.to_str())
    made.no_truncation()
    made.no_padding()
    return made


def roles(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> dict[str, str]:
    """Return which special token plays which role; nothing is known of a bare `Tokenizer`."""
    found = {role: getattr(tokenizer, role, None) for role in ROLES}
    return {role: str(token) for role, token in found.items() if token is not None}


def adopt_roles(
    target: PreTrainedTokenizerBase | Tokenizer, source: PreTrainedTokenizerBase
) -> PreTrainedTokenizerFast:
    """Make a tokenizer that cuts text as `target` and speaks to the model as `source` did.

    Special tokens of `source` that `target` lacks are appended (spare ones left out), roles and chat template are those
    of `source`, and so are the special tokens put around a text. What `target` put there itself is dropped.

    Parameters
    ----------
    target : PreTrainedTokenizerBase or Tokenizer
        Brings vocabulary, merges, normalizer and pre-tokenizer.
    source : PreTrainedTokenizerBase
        That of the model.
    """
    made, old = rust_tokenizer(target), rust_tokenizer(source)
    named, template = set(roles(source).values()), str(source.chat_template or "")
    known = made.get_vocab()
    for _, token in sorted(old.get_added_tokens_decoder().items()):
        wanted = token.content in named or token.content in template or not _SPARE.search(token.content)
        if token.special and wanted and (token.content not in known or token.content in named):
            made.add_special_tokens([AddedToken(token.content, special=True, normalized=False)])
    body = list(source.encode("a", add_special_tokens=False))
    whole = list(source.encode("a"))
    at = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), 0)
    before, after = ([str(old.id_to_token(i)) for i in ids] for ids in (whole[:at], whole[at + len(body) :]))
    made.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, made.token_to_id(token)) for token in {*before, *after}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=source.chat_template,
        model_max_length=source.model_max_length,
        padding_side=source.padding_side,
        clean_up_tokenization_spaces=False,
        **roles(source),
    )


def rename_ids(model: PreTrainedModel, new_id: dict[int, int]) -> None:
    """Rewrite the special ids of a model's configurations; one without a successor becomes None.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    new_id : dict
        Old id to new id.
    """
    owners = (model.config, model.config.get_text_config(), model.generation_config)
    for owner in {id(owner): owner for owner in owners if owner is not None}.values():
        for key in [key for key in vars(owner) if key.endswith("_token_id")]:
            old = getattr(owner, key)
            if isinstance(old, list):
                setattr(owner, key, [new_id[i] for i in old if i in new_id] or None)
            elif old is not None:
                setattr(owner, key, new_id.get(old))
