"""midisim: a really pretrained masked language model, of piano music (25.6 M, PyPI midisim, Apache-2.0).

An encoder of eight layers trained to fill masked tokens of MIDI scores. Its layers are those of GPT-NeoX with the
residuals in sequence, no biases at norms and attention, and attention that looks both ways; so transformers' own class
holds the weights, and loops and caches work on it as on any other masked model. What differs is the layout:

- norms multiply by 1 + gamma there, and by the weight here;
- queries, keys and values are three matrices there and one here, in the order q, k, v of each head;
- rotary positions turn neighbours (2j, 2j+1) there and halves (j, j+16) here: the rows of a head are put in that order.

386 tokens: 0-127 time since the note before, 128-255 duration, both in steps of 32 ms, 256-383 pitch, 384 mask, 385
padding. As text they are ``t0 d16 p60``. A score begins with ``t0``; then comes each note, its time left out where that
is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from tokenary.core.errors import InputError
from tokenary.core.files import one_line

MASK, PAD = 384, 385
STEP_MS = 32


class MidisimConfig(GPTNeoXConfig):
    """A `GPTNeoXConfig` with ``is_causal=False``, ``objective`` and ``mask_token_id``."""

    model_type = "tokenary_midisim"
    is_causal: bool = False
    objective: str = "diffusion"
    mask_token_id: int = MASK


class MidisimModel(GPTNeoXForCausalLM):
    """A bidirectional GPT-NeoX: the logits at a position are about that position."""

    config_class = MidisimConfig

    def __init__(self, config: MidisimConfig) -> None:
        super().__init__(config)
        for layer in self.gpt_neox.layers:
            layer.attention.is_causal = False  # type: ignore[union-attr]


def build_midisim(hidden: int = 512, layers: int = 8, heads: int = 8, vocab: int = 386) -> MidisimModel:
    """Make the network without its weights; with other sizes a small one for tests."""
    config = MidisimConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=3072,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=min(PAD, vocab - 1),
        mask_token_id=min(MASK, vocab - 1),
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        return MidisimModel(config).eval()


def converted(state: dict[str, Tensor], heads: int = 8) -> dict[str, Tensor]:
    """Turn the published weights into those of `MidisimModel`.

    Parameters
    ----------
    state : dict
        Of x-transformers' ``TransformerWrapper`` around an ``Encoder``: an attention and a feed-forward layer by turns.
    heads : int
        Attention heads.
    """
    depth = sum(name.endswith("to_q.weight") for name in state)
    new = {
        "gpt_neox.embed_in.weight": state["token_emb.emb.weight"],
        "gpt_neox.final_layer_norm.weight": 1 + state["attn_layers.final_norm.gamma"],
        "lm_head.weight": state["to_logits.weight"],
    }
    for n in range(depth):
        attend, feed = f"attn_layers.layers.{2 * n}.", f"attn_layers.layers.{2 * n + 1}."
        layer = f"gpt_neox.layers.{n}."
        query, key, value = (state[f"{attend}1.to_{name}.weight"].unflatten(0, (heads, -1)) for name in "qkv")
        width = query.shape[1] // 2  # of the rotated part: half a head
        order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2), torch.arange(width, query.shape[1])])
        packed = torch.stack([query[:, order], key[:, order], value], dim=1)  # (H, 3, D, hidden)
        new |= {
            f"{layer}attention.query_key_value.weight": packed.flatten(0, 2),
            f"{layer}attention.dense.weight": state[f"{attend}1.to_out.weight"],
            f"{layer}input_layernorm.weight": 1 + state[f"{attend}0.0.gamma"],
            f"{layer}post_attention_layernorm.weight": 1 + state[f"{feed}0.0.gamma"],
            f"{layer}mlp.dense_h_to_4h.weight": state[f"{feed}1.ff.0.0.weight"],
            f"{layer}mlp.dense_h_to_4h.bias": state[f"{feed}1.ff.0.0.bias"],
            f"{layer}mlp.dense_4h_to_h.weight": state[f"{feed}1.ff.2.weight"],
            f"{layer}mlp.dense_4h_to_h.bias": state[f"{feed}1.ff.2.bias"],
        }
    norms = [name for name in new if "norm.weight" in name]
    return new | {name.replace("weight", "bias"): torch.zeros_like(new[name]) for name in norms}


def midisim_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: words ``t0``-``t127``, ``d0``-``d127`` and ``p0``-``p127``, spaces between them."""
    words = [f"{kind}{number}" for kind in "tdp" for number in range(128)] + ["[MASK]", "[PAD]"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]")


def note_tokens(notes: Sequence[tuple[float, float, int]], quarter_ms: float = 500.0) -> list[int]:
    """Token ids of a score.

    Parameters
    ----------
    notes : sequence of (float, float, int)
        Start and length in quarter notes, and MIDI pitch.
    quarter_ms : float
        Milliseconds of a quarter note.
    """
    scale = quarter_ms / STEP_MS
    rows = sorted({(round(start * scale), -pitch): round(length * scale) for start, length, pitch in notes}.items())
    heads = [at for (at, _), _ in rows]
    ids = [0]
    for (before, at), ((_, pitch), length) in zip(pairwise([heads[0] if heads else 0, *heads]), rows, strict=True):
        ids += [min(at - before, 127)] if at > before else []
        ids += [128 + min(max(length, 1), 127), 256 - pitch]
    return ids


def read_midisim(file: Path) -> tuple[MidisimModel, PreTrainedTokenizerFast]:
    """Read the published ``.pth`` file.

    Raises
    ------
    InputError
        If it is no such file.
    """
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
        model = build_midisim()
        model.load_state_dict(converted(state))
    except Exception as error:  # whatever unpickling and a foreign layout raise
        raise InputError(f"{file.name} does not hold midisim's weights: {one_line(error)}") from error
    return model, midisim_tokenizer()
