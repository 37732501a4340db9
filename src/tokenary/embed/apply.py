"""From a model and another tokenizer to a model that speaks with it, and to a folder that transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from tokenary.core.errors import InputError
from tokenary.core.files import one_line
from tokenary.embed.base import Transplant
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import adopt_roles, on_vocabulary, rename_ids, roles, rust_tokenizer, tables
from tokenary.models import LM
from tokenary.models.convert import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def vocabularies(
    lm: LM, to: PreTrainedTokenizerBase | Tokenizer, multiple: int = 1
) -> tuple[Vocabulary, Vocabulary, PreTrainedTokenizerFast]:
    """Return the old and the new vocabulary, and the new tokenizer with the old one's special tokens and roles.

    Parameters
    ----------
    lm : LM
        The model.
    to : PreTrainedTokenizerBase or Tokenizer
        The tokenizer it shall have.
    multiple : int
        The new table has a multiple of so many rows.

    Raises
    ------
    InputError
        The model has no tokenizer.
    UnsupportedModelError
        Its tokenizer has no ``tokenizer.json``, or the model no plain embedding table.
    """
    if lm.tokenizer is None:
        raise InputError(f"{lm.name} has no tokenizer")
    source = Vocabulary(rust_tokenizer(lm.tokenizer), roles(lm.tokenizer), rows=len(tables(lm.model)[0]))
    tokenizer = adopt_roles(to, lm.tokenizer)
    target = Vocabulary(rust_tokenizer(tokenizer), roles(to))
    target.rows = -(-target.size // multiple) * multiple
    return source, target, tokenizer


def transfer(lm: LM, to: PreTrainedTokenizerBase | Tokenizer, method: Transplant, multiple: int = 1) -> LM:
    """Return the model on another vocabulary; the given one stays as it was, and shares all weights but the tables.

    Parameters
    ----------
    lm : LM
        A causal language model with its tokenizer.
    to : PreTrainedTokenizerBase or Tokenizer
        The tokenizer it shall have.
    method : Transplant
        Says what new rows are made of.
    multiple : int
        The new table has a multiple of so many rows.

    Returns
    -------
    LM
        Tied as before, with ``.tokenizer`` the new one.
    """
    source, target, tokenizer = vocabularies(lm, to, multiple)
    inputs, weight = tables(lm.model)
    mapped = head = method.vocab_map(source, target, inputs.detach().cpu())
    if weight is not None and method.reads_rows:
        head = method.vocab_map(source, target, weight.detach().cpu())
    model = on_vocabulary(lm.model, mapped.to(lm.device), head.to(lm.device))
    new_id = {i: target.tokenizer.token_to_id(content) for i, content in source.special.items()}
    rename_ids(model, {i: new for i, new in new_id.items() if new is not None})
    said = json.dumps([lm.fingerprint, repr(method), target.tokenizer.to_str(), target.rows])
    return LM(f"{lm.name}+{method.card.slug}", model, tokenizer, hashlib.sha256(said.encode()).hexdigest(), lm.source)


def save(lm: LM, folder: str | os.PathLike[str]) -> None:
    """Write model and tokenizer as an ordinary transformers folder.

    Raises
    ------
    InputError
        The folder holds something already, or cannot be written.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not an empty folder")
    assert lm.tokenizer is not None
    try:
        with quiet():
            lm.model.save_pretrained(path)
            lm.tokenizer.save_pretrained(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or one_line(error)}") from None


def load_target(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase | Tokenizer:
    """Load the tokenizer that a path names: a ``tokenizer.json``, or a folder with one.

    Raises
    ------
    InputError
        There is none, or it cannot be read.
    """
    path = Path(name)
    try:
        if (path / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(path, local_files_only=True)
        return Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise InputError(f"{path}: no tokenizer.json that can be read ({one_line(error)})") from None
