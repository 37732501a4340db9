"""The network: a Llama whose attention looks both ways.

Why a Llama and not forty lines of our own: rotary positions, ``position_ids``, 4D masks, ``past_key_values`` and the
attention interface come with it, so a decoder can drop far positions (gather tokens, keep their true positions), keep
the keys and values of frozen positions in an ordinary cache, or swap the attention function, without touching the
network. Setting ``is_causal=False`` in the config is not enough: transformers then builds no mask, but the attention
module still says ``is_causal=True`` and the SDPA kernel obeys it. So the class below turns that off as well, and has a
``model_type`` of its own, so that ``AutoModelForCausalLM`` refuses the folder instead of loading a causal model.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenary.core.errors import InputError
from tokenary.core.files import sha256_of
from tokenary.models.lm import LM

PAD, MASK, EOS = "[PAD]", "[MASK]", "[EOS]"
SPECIAL = (PAD, MASK, EOS)  # ids 0, 1, 2

Objective = Literal["diffusion", "any-subset"]


class TextDiffusionConfig(LlamaConfig):
    """A `LlamaConfig` with ``is_causal=False``, ``objective`` and ``mask_token_id``."""

    model_type = "tokenary_text_diffusion"
    is_causal: bool = False
    objective: str = "diffusion"
    mask_token_id: int = SPECIAL.index(MASK)


class TextDiffusionModel(LlamaForCausalLM):
    """A bidirectional Llama: the logits at a position are about that position, not about the next one."""

    config_class = TextDiffusionConfig

    def __init__(self, config: TextDiffusionConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False


def build(
    *,
    seed: int = 0,
    objective: Objective = "diffusion",
    vocab: int = 4096,
    hidden: int = 256,
    layers: int = 8,
    heads: int = 4,
    intermediate: int = 704,
    context: int = 256,
) -> TextDiffusionModel:
    """Make an untrained network in float32; the global random generator is left as it was.

    The defaults have 7,475,456 parameters (embedding and head are one matrix): 14.95 MB in float16.

    Parameters
    ----------
    seed : int
        The same seed gives the same weights.
    objective : {"diffusion", "any-subset"}
        What it will be trained for; only written down.
    vocab, hidden, layers, heads, intermediate, context : int
        Sizes; ``context`` is the length of the training rows.
    """
    config = TextDiffusionConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=None,
        eos_token_id=SPECIAL.index(EOS),
        use_cache=False,
        objective=objective,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextDiffusionModel(config)


def save_text_diffusion(model: TextDiffusionModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write weights (float16), config and tokenizer.json; each file is written beside its place, then renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).half().cpu()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        half.save_pretrained(name)
        tokenizer.save(str(Path(name, "tokenizer.json")))
        for file in sorted(Path(name).iterdir()):
            os.replace(file, folder / file.name)


def load_tokenizer(file: str | Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer.json as a transformers tokenizer that knows the mask, padding and end tokens."""
    return PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=PAD, mask_token=MASK, eos_token=EOS)


def load_text_diffusion(folder: str | Path, device: str | torch.device = "cpu") -> LM:
    """Read a folder that `save_text_diffusion` wrote, in float32.

    Returns
    -------
    LM
        Its model is a `TextDiffusionModel` in eval mode.

    Raises
    ------
    InputError
        If a file is missing.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no text-diffusion model: it has no {name}")
    model = TextDiffusionModel.from_pretrained(folder, dtype=torch.float32)
    model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    fingerprint = sha256_of(folder / "model.safetensors")
    return LM(folder.name, model, load_tokenizer(folder / "tokenizer.json"), fingerprint, f"trained here ({folder})")
