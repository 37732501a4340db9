"""A vision-language model that reads fewer image tokens, wherever they become fewer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from tokenary.core.errors import InputError, OptionError
from tokenary.core.token_map import TokenMap
from tokenary.models.bench_vlm.model import anyres_views, greedy
from tokenary.models.bench_vlm.vocabulary import ANSWER, BOS, PAD, VOCABULARY
from tokenary.reduce.base import Context, Point, Reducer, places
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.encoder import Encoder, Record, VisionReduction, picture_numbers, recorded
from tokenary.reduce.layout import Laid, Prompt, Seen, followed, joined, patch_owners
from tokenary.reduce.mix import anchors_of


def question_of(ids: Tensor) -> Tensor:
    """Say which tokens (B, L) are those of the question, up to where its answer begins: (B, L) bool.

    Only they may guide a choice, or reading a right answer would differ from writing it. Of several questions it is the
    first.
    """
    begins = ids == ANSWER
    return begins.cumsum(1) - begins.long() == 0


class ReducedVLM:
    """A model as `BenchVLM`, with a reducer in it: sees pictures, scores and generates answers; a context manager.

    It takes the place of the model where that is measured: ``exact_match(reduced, questions, device)``.

    Parameters
    ----------
    model : nn.Module
        With ``vision`` (an encoder), ``projector``, ``newline``, ``language`` and ``config.side``.
    reducer : Reducer or None
        None reads everything.
    point : Point or str
        Where.
    counts : mapping of int to int, optional
        Image tokens that stay behind each block of the encoder; see `VisionReduction`.

    Attributes
    ----------
    kept : list of int
        Image tokens that the language model read of each picture of the newest pass, newlines included; between its
        layers, those of the upper ones.
    map : TokenMap or None
        (B, M, N), over image tokens view after view: the newest map.
    numbers : (B, M) Tensor or None
        The patches that the newest pass kept, counted view after view; -1 where a row has fewer, or at a newline.
    owners : (B, N) Tensor or None
        For each patch, counted view after view, the kept token that stands for it; -1 where none does.
    vision_tokens : list of int
        Tokens that each block of the encoder computed in the newest pass, and those that left the last, of one view,
        the class token included.
    language_tokens : list of int
        Tokens that each layer of the language model read of the newest prompt, the question included.
    views : int
        Views of each picture of the newest pass.
    """

    def __init__(
        self,
        model: Any,
        reducer: Reducer | None,
        point: Point | str = "encoder",
        counts: Mapping[int, int] | None = None,
    ) -> None:
        self.model = model
        self.reducer, self.encoder = reducer, Encoder.of(self.model.vision)
        deep = Point.stage_of(point) == "decoder"
        self.point = Point.parse(
            point, self.model.language.config.num_hidden_layers if deep else len(self.encoder.blocks)
        )
        side, patch = self.model.config.side, self.model.config.patch
        self.grid = self.encoder.grid or (side // patch, side // patch)
        self.vision: VisionReduction | None = None
        if reducer is not None and self.point.stage == "vision":
            self.vision = VisionReduction(self.model.vision, reducer, self.point, counts=counts)
        elif counts is not None:
            raise OptionError("counts", dict(counts), "none, but at a place inside the encoder")
        self.kept: list[int] = []
        self.map: TokenMap | None = None
        self.numbers: Tensor | None = None
        self.owners: Tensor | None = None
        self.vision_tokens: list[int] = []
        self.language_tokens: list[int] = []
        self.views = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing stays attached between calls."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> Any:
        """Sizes of the model."""
        return self.model.config

    def eval(self) -> Self:
        """Put the model into its mode for inference."""
        self.model.eval()
        return self

    # -- seeing ------------------------------------------------------------------------------------------------

    def image_tokens(self, pixels: Tensor) -> Seen:
        """Encode uint8 pictures (B, S, S, 3), or of twice the side: a thumbnail and four crops."""
        side = self.model.config.side
        large = pixels.shape[1] != side
        if large and pixels.shape[1] != 2 * side:
            raise InputError(f"this model sees pictures of {side} or {2 * side} pixels a side, not {pixels.shape[1]}")
        views = anyres_views(pixels).flatten(0, 1) if large else pixels
        count = 5 if large else 1
        reducer, record = self.reducer, Record()
        needs = reducer.needs if reducer is not None and self.point.stage == "encoder" else frozenset[str]()
        if "pixels" in needs and hasattr(reducer, "look"):
            return self._look(pixels)
        blocks, last = self.encoder.blocks, len(self.encoder.blocks) - 1
        layers = reducer.layers(len(blocks), last) if reducer is not None and needs else ()
        with recorded(blocks, layers, needs, record), self.vision or contextlib.nullcontext():
            hidden = self.model.vision(views).last_hidden_state[:, self.encoder.prefix :]
        patches = self.grid[0] * self.grid[1]
        self.views, self.vision_tokens = count, self._block_tokens(patches)
        tokens = self.model.projector(hidden).unflatten(0, (-1, count)).flatten(1, 2)
        context = Context(
            grid=self.grid,
            layout="anyres" if large else "image",
            views=count,
            crops=(2, 2) if large else (1, 1),
            span=(self.encoder.prefix, patches),
            scale=record.scale,
            layer=last,
            n_layers=len(blocks),
            samples=picture_numbers(pixels) if reducer is not None and "pixels" in reducer.needs else None,
            queries=record.queries,
            keys=record.keys,
            values=record.values,
        )
        numbers = torch.arange(patches * count, device=tokens.device).expand(len(tokens), -1)
        if self.vision is None:
            context = replace(context, place=places(self.grid, count, tokens.device))
            return Seen(tokens, numbers, context, patches * count)
        shift = torch.arange(count, device=tokens.device)[:, None] * patches
        numbers = (self.vision.anchors.unflatten(0, (-1, count)) + shift).flatten(1, 2)
        place = places(self.grid, count, tokens.device)[numbers]
        sizes = self.vision.sizes.unflatten(0, (-1, count)).flatten(1, 2)
        context = replace(context, place=place, sizes=sizes, span=None)
        there = None if self.vision.there is None else self.vision.there.unflatten(0, (-1, count)).flatten(1, 2)
        return Seen(tokens, numbers, context, patches * count, tuple(self.vision.maps), there)

    def _block_tokens(self, patches: int) -> list[int]:
        """Tokens that each block of the encoder computes, of one view."""
        left = dict(zip(self.point.layers, self.vision.maps, strict=True)) if self.vision is not None else {}
        found = []
        for layer in range(len(self.encoder.blocks)):
            found.append(self.encoder.prefix + patches)
            patches = left[layer].shape[-2] if layer in left else patches
        return [*found, self.encoder.prefix + patches]

    def _look(self, pixels: Tensor) -> Seen:
        """Let a control see the pictures in its own way."""
        reducer: Any = self.reducer
        context = Context(grid=self.grid)
        hidden, chosen = reducer.look(self.model.vision, pixels, context)
        self.views, self.vision_tokens = 1, [self.encoder.prefix + hidden.shape[1]] * (len(self.encoder.blocks) + 1)
        numbers = anchors_of(chosen).expand(len(pixels), -1)
        place = places(self.grid, 1, pixels.device)[numbers]
        return Seen(
            self.model.projector(hidden), numbers, replace(context, place=place), self.grid[0] * self.grid[1], (chosen,)
        )

    # -- the prompt --------------------------------------------------------------------------------------------

    def prompt(self, seen: Seen | None, ids: Tensor, text_mask: Tensor | None = None) -> Prompt:
        """Lay out what the language model reads.

        Parameters
        ----------
        seen : Seen or None
            None for a blind answer.
        ids : (B, L) Tensor
            The questions; what follows them is read, but no reducer is shown it.
        text_mask : (B, L) bool Tensor, optional
            False at padding, which may stand on either side.
        """
        embed = self.model.language.get_input_embeddings()
        start, text = embed(torch.full_like(ids[:, :1], BOS)), embed(ids)
        if seen is None:
            self.kept, self.map, self.numbers, self.owners = [0] * len(ids), None, None, None
            laid, context = Laid(text[:, :0], ids[:, :0], None, None, 0), None
        else:
            asked = question_of(ids) if text_mask is None else question_of(ids) & text_mask.bool()
            seen = replace(seen, context=replace(seen.context, text=text, text_mask=asked))
            laid, context = self._image(seen)
        batch, count = laid.tokens.shape[:2]
        embeds = torch.cat([start, laid.tokens.to(text.dtype), text], dim=1)
        ones = torch.ones(batch, 1, dtype=torch.bool, device=ids.device)
        text_there = ones.expand(-1, ids.shape[1]) if text_mask is None else text_mask.bool()
        image_there = ones.expand(-1, count) if laid.there is None else laid.there
        mask = torch.cat([ones, image_there, text_there], dim=1)
        padded, gaps = not bool(mask.all()), False
        if self.reducer is not None and self.reducer.positions == "original" and self.point.stage != "decoder":
            behind = 1 + laid.total + (text_there.cumsum(1) - 1).clamp_min(0)
            positions = torch.cat([torch.zeros_like(ids[:, :1]), 1 + laid.numbers, behind], dim=1)
            gaps = laid.total != count
        else:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
        bias = None
        if laid.sizes is not None and self.reducer is not None and self.reducer.proportional:
            zeros = laid.sizes.new_zeros(batch, 1)
            bias = torch.cat([zeros, laid.sizes.clamp_min(1e-9).log(), zeros.expand(-1, ids.shape[1])], dim=1)
        return Prompt(embeds, positions, mask if padded or gaps else None, bias, count, context)

    def _image(self, seen: Seen) -> tuple[Laid, Context]:
        """Reduce behind the encoder, and lay out what is left."""
        laid, chosen = Laid(seen.tokens, seen.numbers, seen.there, seen.context.sizes, seen.total), None
        if self.reducer is not None and self.point.stage == "encoder" and not seen.vision:
            chosen = self.reducer.reduce(seen.tokens, seen.context)
            if chosen.is_identity:
                chosen = None
            else:
                laid = laid.followed(chosen, self.reducer.kind != "prune")
        self.map, self.owners = chosen, patch_owners(seen, chosen)
        self.numbers = laid.numbers if laid.there is None else laid.numbers.masked_fill(~laid.there, -1)
        place = seen.context.places(seen.tokens) if chosen is None else self._places(laid.numbers, seen)
        if seen.context.layout == "anyres" and laid.tokens.shape[1]:  # of no tokens, there are no rows either
            place = self._places(laid.numbers, seen)
            laid, place = joined(laid, place, self.grid, seen.context.crops, self.model.newline)
        count = laid.tokens.shape[1]
        self.kept = [count] * len(seen.tokens) if laid.there is None else laid.there.sum(1).tolist()
        nothing: dict[int, Tensor] = {}
        context = replace(
            seen.context, views=1, place=place, sizes=laid.sizes, span=None, queries=nothing, keys=nothing,
            values=nothing, recorded_sizes=nothing,
        )  # fmt: skip
        return laid, context

    def _places(self, numbers: Tensor, seen: Seen) -> Tensor:
        return places(self.grid, seen.context.views, numbers.device)[numbers]

    # -- passes ------------------------------------------------------------------------------------------------

    def _between(self, prompt: Prompt) -> Any:
        """Return what reduces between the layers of the language model, where that is the place."""
        if self.reducer is None or self.point.stage != "decoder" or prompt.context is None:
            return contextlib.nullcontext()
        return DecoderReduction(
            self.model.language, self.reducer, self.point, start=1, count=prompt.image, context=prompt.context
        )

    def _take_stock(self, between: Any, prompt: Prompt) -> None:
        """Note what the pass that read the prompt kept."""
        self.language_tokens = [prompt.embeds.shape[1]] * self.model.language.config.num_hidden_layers
        if isinstance(between, DecoderReduction) and between.map is not None:
            self.map = between.map
            for layer in range(between.first, len(self.language_tokens)):
                self.language_tokens[layer] += between.map.shape[-2] - prompt.image
            ones = torch.ones(prompt.image, dtype=torch.bool, device=prompt.embeds.device)
            there = between.map.mask(ones).expand(len(prompt.embeds), -1)
            self.kept = there.sum(1).tolist()
            assert prompt.context is not None and prompt.context.place is not None
            place = prompt.context.place.expand(len(there), -1, -1)
            view, row, column = place.gather(
                1, anchors_of(between.map).expand(len(there), -1)[..., None].expand(-1, -1, 3)
            ).unbind(-1)
            number = (view * self.grid[0] + row) * self.grid[1] + column
            self.numbers = number.masked_fill(~there | (view < 0), -1)
            view, row, column = place.unbind(-1)  # of every image token
            number = (view * self.grid[0] + row) * self.grid[1] + column
            owner = followed(torch.arange(prompt.image, device=place.device).expand(len(there), -1), between.map)
            total = self.views * self.grid[0] * self.grid[1]
            patches = owner.new_full((len(owner), total + 1), -1)  # the last place is that of newlines
            self.owners = patches.scatter(1, number.masked_fill(view < 0, total), owner)[:, :total]

    def _mask(self, prompt: Prompt, columns: int, queries: int, mask: Tensor | None) -> Tensor | None:
        """Return the mask of a pass: two axes, or four where tokens are weighed by sizes."""
        if prompt.bias is None:
            return mask
        batch, dtype = len(prompt.embeds), prompt.embeds.dtype
        seen = torch.ones(queries, columns, dtype=torch.bool, device=prompt.embeds.device).tril(columns - queries)
        seen = seen.expand(batch, -1, -1)
        if mask is not None:
            seen = seen & mask[:, None] | torch.eye(queries, columns, device=seen.device).bool() & (queries > 1)
        term = torch.nn.functional.pad(prompt.bias, (0, columns - prompt.bias.shape[1])).to(dtype)
        return (term[:, None].expand_as(seen).masked_fill(~seen, torch.finfo(dtype).min))[:, None]

    def __call__(self, seen: Seen | None, ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, L, V) at the text positions: those at t predict the text token t + 1."""
        prompt = self.prompt(seen, ids, text_mask)
        width = prompt.embeds.shape[1]
        with self._between(prompt) as between:
            hidden = self.model.language.model(
                inputs_embeds=prompt.embeds,
                position_ids=prompt.positions,
                attention_mask=self._mask(prompt, width, width, prompt.mask),
                use_cache=False,
            ).last_hidden_state
            self._take_stock(between, prompt)
        return self.model.language.lm_head(hidden[:, -ids.shape[1] :])

    @torch.inference_mode()
    def generate(
        self, seen: Seen | None, ids: Tensor, max_new_tokens: int = 24, text_mask: Tensor | None = None
    ) -> list[list[int]]:
        """Answer greedily with a cache, whose upper layers hold fewer rows where tokens are dropped between layers.

        Parameters
        ----------
        seen : Seen or None
            None for a blind answer.
        ids : (B, L) Tensor
            Questions that end at their last column.
        max_new_tokens : int
            Where to stop an answer that does not end.
        text_mask : (B, L) bool Tensor, optional
            False at padding on the left.

        Returns
        -------
        list of list of int
            The ids of each answer, without ``<end>``.
        """
        prompt = self.prompt(seen, ids, text_mask)
        past, mask = None, prompt.mask
        width, number = prompt.embeds.shape[1], 0
        with self._between(prompt) as between:

            def read(new: Tensor | None) -> Tensor:
                nonlocal past, number, mask
                if new is None:
                    step = {"inputs_embeds": prompt.embeds, "position_ids": prompt.positions}
                else:
                    number += 1
                    step = {"input_ids": new, "position_ids": prompt.positions[:, -1:] + number}
                    mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)
                masked = self._mask(prompt, width + number, width if new is None else 1, mask)
                output = self.model.language(
                    **step, attention_mask=masked, past_key_values=past, use_cache=True, logits_to_keep=1
                )
                past = output.past_key_values
                if new is None:
                    self._take_stock(between, prompt)
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
        prompts = [VOCABULARY.prompt(question) for question in questions]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=self.device)
        there = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=self.device)
        with torch.inference_mode():
            seen = self.image_tokens(pixels.to(self.device))
        found = self.generate(seen, ids, max_new_tokens, None if bool(there.all()) else there)
        return [VOCABULARY.decode(answer) for answer in found]
