"""Puts the groups into a tokenizer.json, and rows for them into a model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.core.seeding import substream
from tokenary.core.token_map import Sparse, TokenMap
from tokenary.tokenize.backend import backend
from tokenary.tokenize.triadic_suffix.reading import unmark
from tokenary.tokenize.triadic_suffix.rules import marking_rules, unmarking_rules
from tokenary.tokenize.triadic_suffix.scheme import DIGITS, PLANE, Scheme

PROBE = "a 1234.50 (7)x, 12 b .5"


def extend_tokenizer(tokenizer: Any, scheme: Scheme, rules: bool = True) -> Tokenizer:
    """Return a copy of a tokenizer that writes numerals as groups.

    Parameters
    ----------
    tokenizer : Tokenizer or transformers tokenizer
        Left as it is.
    scheme : Scheme
        Of the groups.
    rules : bool
        Whether the copy marks numerals itself, by replacement rules of its normalizer: then its tokenizer.json needs
        nothing else. Without them it wants texts that went through `Scheme.mark`, which is faster.

    Raises
    ------
    UnsupportedModelError
        The tokenizer's own normalizer changes the added tokens, or texts with numerals would not come back as they did
        (it puts a space before every stretch between added tokens, or its tokens do not simply join).
    InputError
        It has tokens of the scheme already.
    """
    base = backend(tokenizer)
    config = json.loads(base.to_str())
    config["normalizer"] = _prefix_once(config["normalizer"])
    made = Tokenizer.from_str(json.dumps(config))
    made.no_truncation()
    made.no_padding()
    contents, known = list(scheme.vocabulary()), made.get_vocab()
    if clash := [content for content in contents if content in known]:
        raise InputError(f"the tokenizer has {len(clash)} of the groups' tokens already")
    # Behind the tokenizer's own: what it makes of other digits or spaces is what numerals are looked for in.
    steps: list[Any] = [] if made.normalizer is None else [made.normalizer]
    if rules:
        steps += [normalizers.Replace(Regex(pattern), content) for pattern, content in marking_rules(scheme)]
    if steps:
        made.normalizer = normalizers.Sequence(steps)
        probe = contents[:: max(1, len(contents) // 50)]
        if any(made.normalizer.normalize_str(content) != content for content in probe):
            raise UnsupportedModelError("the tokenizer's normalizer changes the added tokens")
    made.add_tokens([AddedToken(content, normalized=True, special=False) for content in contents])
    restore: list[Any] = [decoders.Replace(Regex(pattern), content) for pattern, content in unmarking_rules(scheme)]
    own = [] if made.decoder is None else [made.decoder]
    made.decoder = decoders.Sequence([*own, decoders.Fuse(), *restore])
    before, after = _there_and_back(base, PROBE), _there_and_back(made, PROBE if rules else scheme.mark(PROBE))
    if after != unmark(scheme, scheme.mark(before)).text:
        raise UnsupportedModelError(f"texts with numerals would not come back: {before!r} as {after!r}")
    return made


def _prefix_once(normalizer: Any) -> Any:
    """Let what a normalizer puts before a text stay away from the text of an added token."""
    if not isinstance(normalizer, dict):
        return normalizer
    if normalizer["type"] == "Prepend":
        alone = rf"\A(?!(?:[0-9]*[{chr(PLANE)}-{DIGITS}])?\z)"
        return {"type": "Replace", "pattern": {"Regex": alone}, "content": normalizer["prepend"]}
    if normalizer["type"] == "Sequence":
        return {**normalizer, "normalizers": [_prefix_once(step) for step in normalizer["normalizers"]]}
    return normalizer


def _there_and_back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


def without_restoring(tokenizer: Tokenizer, scheme: Scheme) -> Tokenizer:
    """Return a copy of an extended tokenizer whose decoder leaves the marks in: the input of `unmark`."""
    config = json.loads(tokenizer.to_str())
    config["decoder"]["decoders"] = config["decoder"]["decoders"][: -len(unmarking_rules(scheme))]
    return Tokenizer.from_str(json.dumps(config))


def group_ids(tokenizer: Tokenizer, scheme: Scheme) -> dict[int, tuple[str, int | None]]:
    """Map the id of every added token to its digits and level."""
    vocabulary = scheme.vocabulary()
    known = tokenizer.get_vocab()
    if not vocabulary.keys() <= known.keys():
        raise InputError("the tokenizer was not extended by this scheme")
    return {known[content]: meaning for content, meaning in vocabulary.items()}


def vocabulary_map(base: Tokenizer, extended: Tokenizer, scheme: Scheme, old_rows: int, rows: int) -> TokenMap:
    """Return the map (rows, old rows) that keeps every old row and averages the digits of every new token.

    A magnitude marker has no digits: its row is the mean of the ten digits.
    """
    digit = {}
    for char in "0123456789":
        at = base.token_to_id(char)
        if at is None:
            ids = base.encode(char, add_special_tokens=False).ids
            at = ids[-1] if ids else None
        if at is None:
            raise UnsupportedModelError(f"the tokenizer has no token for the digit {char}")
        digit[char] = at
    groups = group_ids(extended, scheme)
    row, column, weight = [], [], []
    for id in range(min(old_rows, rows)):
        if id not in groups:
            row.append(id)
            column.append(id)
            weight.append(1.0)
    for id, (digits, _) in groups.items():
        for char in digits or digit:
            row.append(id)
            column.append(digit[char])
            weight.append(1 / len(digits or digit))
    indices = torch.tensor([row, column])
    values = torch.tensor(weight, dtype=torch.float32)
    return Sparse(torch.sparse_coo_tensor(indices, values, (rows, old_rows), check_invariants=False))


def extend_model(model: Any, base: Any, extended: Any, scheme: Scheme, seed: int = 0, scale: float = 0.1) -> TokenMap:
    """Give a model rows for the added tokens, in place.

    A row is the mean of its digits' rows plus a small random vector that all groups of one level share. Rows that pad
    the embedding are used before it grows; a tied head stays tied; a head of its own is extended alike.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    base, extended : tokenizers
        Before and after `extend_tokenizer`.
    scheme : Scheme
        Of the groups.
    seed : int
        Of the shared vectors.
    scale : float
        Their length over that of a mean row.

    Returns
    -------
    TokenMap
        (new rows, old rows), without the shared vectors.

    Raises
    ------
    UnsupportedModelError
        The model has no input embedding, or one with fewer rows than the base tokenizer has tokens, or was packed for
        inference.
    """
    base, extended = backend(base), backend(extended)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or not hasattr(embedding, "weight"):
        raise UnsupportedModelError(f"{type(model).__name__} has no input embedding to extend")
    if head is not None and not hasattr(head, "weight"):
        raise UnsupportedModelError("the head of the model is packed for inference: load it with optimize=False")
    old_rows, need = embedding.weight.shape[0], max(extended.get_vocab().values()) + 1
    if old_rows <= max(base.get_vocab().values()):
        raise UnsupportedModelError(f"the embedding has {old_rows} rows, fewer than the tokenizer has tokens")
    rows = max(old_rows, need)
    mapping = vocabulary_map(base, extended, scheme, old_rows, rows)
    untied = head is not None and head.weight is not embedding.weight
    before = [module.weight.detach().clone() for module in ([embedding, head] if untied else [embedding])]
    if rows > old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    levelled = [(id, level) for id, (_, level) in group_ids(extended, scheme).items() if level is not None]
    ids, levels = (torch.tensor(column) for column in zip(*levelled, strict=True))
    after = [model.get_input_embeddings(), model.get_output_embeddings()]
    for number, (module, weight) in enumerate(zip(after, before, strict=False)):
        made = mapping.to(weight.device).apply(weight.float())
        shape = (scheme.integer_groups + scheme.fraction_groups, weight.shape[1])
        drawn = substream(seed, "triadic-suffix", "levels", number).standard_normal(shape, dtype=np.float32)
        length = scale * weight.float().norm(dim=-1).mean() / weight.shape[1] ** 0.5
        shared = torch.from_numpy(drawn).to(weight.device) * length
        made[ids] += shared[levels + scheme.fraction_groups]
        with torch.no_grad():
            module.weight.copy_(made.to(weight.dtype))
    return mapping
