"""The model: a plain ViT, an MLP projector, and a Llama that reads ``<bos>``, the image tokens, then the questions.

The language side is transformers' own `LlamaForCausalLM`, fed with ``inputs_embeds``, so every cache, attention and
decoding method of the package applies to it. The vision side is plain attention without register tokens; hidden
states, attention maps, queries and keys of every layer can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tokenary.core.errors import InputError, UnknownNameError
from tokenary.models.bench_vlm.scenes import Geometry
from tokenary.models.bench_vlm.vocabulary import BOS, END, PAD, VOCABULARY


@dataclass(frozen=True)
class VLMConfig:
    """Sizes of a model; all of them go into its ``config.json``.

    Parameters
    ----------
    name : str
    side, patch : int
        Pixels of a picture and of a patch.
    vision_width, vision_layers, vision_heads : int
    width, layers, heads, intermediate : int
        Of the language model.
    max_objects, max_glyphs, cell : int
        What the pictures may hold, see `Geometry`.
    vocab_size : int
    """

    name: str
    side: int
    patch: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    layers: int
    heads: int
    intermediate: int
    max_objects: int
    max_glyphs: int
    cell: int
    vocab_size: int = len(VOCABULARY)

    @property
    def geometry(self) -> Geometry:
        """What fits on a picture."""
        return Geometry(self.side, self.patch, self.max_objects, self.max_glyphs, self.cell)

    @property
    def num_patches(self) -> int:
        """Image tokens of one picture."""
        return (self.side // self.patch) ** 2

    def language(self) -> LlamaConfig:
        """Return the configuration of the language model."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
        )

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields."""
        return asdict(self)


SIZES = {
    config.name: config
    for config in (
        VLMConfig("tiny", 64, 16, 32, 2, 2, 32, 2, 2, 64, max_objects=3, max_glyphs=1, cell=16),
        VLMConfig("xs", 64, 8, 128, 6, 4, 128, 6, 4, 352, max_objects=5, max_glyphs=3, cell=16),
        VLMConfig("s-mini", 128, 8, 96, 6, 4, 128, 4, 4, 352, max_objects=9, max_glyphs=3, cell=32),
        VLMConfig("s", 128, 8, 192, 8, 6, 192, 7, 6, 512, max_objects=9, max_glyphs=6, cell=32),
    )
}


def sized(name: str) -> VLMConfig:
    """Return a configuration by name.

    Raises
    ------
    UnknownNameError
        There is no such size.
    """
    if name not in SIZES:
        raise UnknownNameError("bench VLM size", name, SIZES)
    return replace(SIZES[name])


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attend over (B, H, N, D); on a CPU in float32, see `tokenary.hf.float32_attention`."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=bias)
    return mixed.to(value.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, H, N, D / H)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def logits(self, x: Tensor) -> Tensor:
        """Return the scaled products of queries and keys before the softmax, (B, H, N, N)."""
        q, k, _ = self.project(x)
        return q @ k.mT / q.shape[-1] ** 0.5

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Attend; `sizes` (B, N) says how many patches each token stands for (proportional attention)."""
        q, k, v = self.project(x)
        bias = None if sizes is None else sizes.log().to(q.dtype)[:, None, None, :]
        return self.out(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attention(self.norm1(x), sizes)
        return x + self.shrink(F.gelu(self.expand(self.norm2(x))))


@dataclass
class VisionOutput:
    """What the encoder saw.

    Attributes
    ----------
    last_hidden_state : (B, 1 + N, D) Tensor
        After the last norm; token 0 is the class token.
    hidden_states : tuple of (B, 1 + N, D) Tensor
        Input of the first block and output of every block, where asked for.
    attention_logits : tuple of (B, H, 1 + N, 1 + N) Tensor
        Scaled q k of every block before the softmax, where asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    attention_logits: tuple[Tensor, ...] = ()

    @property
    def attentions(self) -> tuple[Tensor, ...]:
        """Attention maps of every block, (B, H, 1 + N, 1 + N)."""
        return tuple(logits.softmax(-1) for logits in self.attention_logits)


class ViT(nn.Module):
    """A plain vision transformer over square patches with a class token and learned positions."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config, width = config, config.vision_width
        self.patch_embedding = nn.Linear(3 * config.patch**2, width)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.empty(1 + config.num_patches, width))
        blocks = [Block(width, config.vision_heads) for _ in range(config.vision_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in blocks:  # residual branches start small, as deep stacks like it
            for last in (block.attention.out, block.shrink):
                nn.init.trunc_normal_(last.weight, std=0.02 / (2 * config.vision_layers) ** 0.5)

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn uint8 pictures (B, S, S, 3) into the tokens (B, 1 + N, D) that enter the first block."""
        side, patch = self.config.side, self.config.patch
        if pixels.shape[1:] != (side, side, 3):
            shape = tuple(pixels.shape[1:])
            raise InputError(f"size {self.config.name} sees {side} x {side} RGB pictures, not {shape}")
        grid = side // patch
        patches = pixels.unflatten(2, (grid, patch)).unflatten(1, (grid, patch)).transpose(2, 3)  # (B, g, g, p, p, 3)
        x = patches.flatten(3).flatten(1, 2).to(self.positions.dtype) / 127.5 - 1
        x = self.patch_embedding(x)
        return torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.positions

    def forward(
        self, pixels: Tensor, output_hidden_states: bool = False, output_attention_logits: bool = False
    ) -> VisionOutput:
        """Encode uint8 pictures (B, S, S, 3)."""
        x = self.embed(pixels)
        hidden, logits = [x], []
        for block in cast("Iterable[Block]", self.blocks):
            if output_attention_logits:
                logits.append(block.attention.logits(block.norm1(x)))
            x = block(x)
            hidden.append(x)
        return VisionOutput(self.norm(x), tuple(hidden) if output_hidden_states else (), tuple(logits))


class BenchVLM(nn.Module):
    """The vision-language model.

    Attributes
    ----------
    vision : ViT
    projector : nn.Sequential
        Two-layer MLP from the encoder's width to the language model's.
    newline : (D,) Parameter
        Ends every grid row of a high-resolution picture.
    language : LlamaForCausalLM
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ViT(config)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, 2 * config.vision_width),
            nn.GELU(),
            nn.Linear(2 * config.vision_width, config.width),
        )
        self.newline = nn.Parameter(torch.randn(config.width) * 0.02)
        self.language: LlamaForCausalLM = AutoModelForCausalLM.from_config(
            config.language(), attn_implementation="sdpa"
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.newline.device

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Encode uint8 pictures to what the language model reads.

        Parameters
        ----------
        pixels : (B, S, S, 3) Tensor
            S is the model's side, or twice that: then the picture is seen as a thumbnail and four crops.

        Returns
        -------
        (B, N, D) Tensor, or (B, N + 2g (2g + 1), D) with g patches a side: the thumbnail, then the rows of the large
        grid, each with a newline behind it.
        """
        if pixels.shape[1] == self.config.side:
            return self.projector(self.vision(pixels).last_hidden_state[:, 1:])
        views = anyres_views(pixels)  # (B, 5, S, S, 3)
        tokens = self.projector(self.vision(views.flatten(0, 1)).last_hidden_state[:, 1:])
        return self.join_views(tokens.unflatten(0, (-1, 5)))

    def join_views(self, tokens: Tensor) -> Tensor:
        """Lay the tokens (B, 5, N, D) of a thumbnail and four crops out as a sequence."""
        grid = self.config.side // self.config.patch
        crops = tokens[:, 1:].unflatten(2, (grid, grid)).unflatten(1, (2, 2)).transpose(2, 3)  # (B, 2, g, 2, g, D)
        rows = crops.flatten(3, 4).flatten(1, 2)  # (B, 2g, 2g, D)
        newline = self.newline.to(rows.dtype).expand(*rows.shape[:2], 1, -1)
        return torch.cat([tokens[:, 0], torch.cat([rows, newline], dim=2).flatten(1, 2)], dim=1)

    def inputs_embeds(self, image_tokens: Tensor | None, ids: Tensor) -> Tensor:
        """Splice: ``<bos>``, the image tokens (B, M, D) where there are any, then the text (B, L)."""
        embed = self.language.get_input_embeddings()
        start, text = embed(torch.full_like(ids[:, :1], BOS)), embed(ids)
        return torch.cat([start, text] if image_tokens is None else [start, image_tokens.to(text.dtype), text], dim=1)

    def forward(self, image_tokens: Tensor | None, ids: Tensor) -> Tensor:
        """Return the logits (B, L, V) at the text positions: those at t predict the text token t + 1."""
        embeds = self.inputs_embeds(image_tokens, ids)
        hidden = self.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.language.lm_head(hidden[:, -ids.shape[1] :])

    @torch.inference_mode()
    def generate(self, image_tokens: Tensor | None, ids: Tensor, max_new_tokens: int = 24) -> list[list[int]]:
        """Answer greedily with a cache.

        Parameters
        ----------
        image_tokens : (B, M, D) Tensor or None
            What is left of the picture; None for a blind answer.
        ids : (B, L) Tensor
            Questions of equal length, each ending with ``<answer>``.
        max_new_tokens : int
            Where to stop an answer that does not end.

        Returns
        -------
        list of list of int
            The ids of each answer, without ``<end>``.
        """
        past: Any = None

        def read(new: Tensor | None) -> Tensor:
            nonlocal past
            step = {"inputs_embeds": self.inputs_embeds(image_tokens, ids)} if new is None else {"input_ids": new}
            output = self.language(**step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            return output.logits[:, -1]

        return greedy(read, len(ids), max_new_tokens)

    def answer(self, pixels: Tensor, questions: Sequence[str], max_new_tokens: int = 24) -> list[str]:
        """Answer one question a picture, uint8 (B, S, S, 3).

        Raises
        ------
        InputError
            A word that the model does not know, a picture of another size, or counts that differ.
        """
        if len(pixels) != len(questions):
            raise InputError(f"{len(pixels)} pictures and {len(questions)} questions: expected one question a picture")
        with torch.inference_mode():
            tokens = self.image_tokens(pixels.to(self.device))
        prompts = [VOCABULARY.prompt(question) for question in questions]
        answers = [""] * len(prompts)
        for length in {len(prompt) for prompt in prompts}:
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([prompts[row] for row in rows], device=self.device)
            for row, answer in zip(rows, self.generate(tokens[rows], ids, max_new_tokens), strict=True):
                answers[row] = VOCABULARY.decode(answer)
        return answers


def greedy(read: Callable[[Tensor | None], Tensor], rows: int, max_new_tokens: int) -> list[list[int]]:
    """Write answers greedily.

    Parameters
    ----------
    read : callable
        Reads the prompts, called with None, and then the newest tokens (B, 1); returns the logits after them, (B, V).
    rows, max_new_tokens : int
        How many answers, and where to stop one that does not end.

    Returns
    -------
    list of list of int
        The ids of each answer, without ``<end>``.
    """
    answers: list[list[int]] = [[] for _ in range(rows)]
    running, new = set(range(rows)), None
    for _ in range(max_new_tokens):
        chosen = read(new).argmax(-1)
        for row in sorted(running):
            token = int(chosen[row])
            if token == END:
                running.discard(row)
            else:
                answers[row].append(token)
        if not running:
            break
        new = chosen[:, None]
    return answers


def anyres_views(pixels: Tensor) -> Tensor:
    """Cut uint8 pictures (B, 2S, 2S, 3) into a thumbnail and four crops, (B, 5, S, S, 3)."""
    side = pixels.shape[1] // 2
    quads = pixels.unflatten(2, (side, 2)).unflatten(1, (side, 2))  # (B, S, 2, S, 2, 3)
    thumbnail = quads.float().mean((2, 4)).round().to(pixels.dtype)
    crops = pixels.unflatten(2, (2, side)).unflatten(1, (2, side)).transpose(2, 3).flatten(1, 2)  # (B, 4, S, S, 3)
    return torch.cat([thumbnail[:, None], crops], dim=1)


__all__ = ["SIZES", "BenchVLM", "VLMConfig", "ViT", "VisionOutput", "anyres_views", "greedy", "sized"]
