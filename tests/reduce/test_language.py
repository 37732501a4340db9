"""Fewer image tokens in front of and between the layers of a language model.

The oracle of pruning is masking: a model that reads everything, but whose layers may not look at what is dropped, says
the same as one that does not have it, as long as positions stay.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from tokenary.core.budget import Budget
from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.token_map import TokenMap
from tokenary.hf.attention import attached
from tokenary.hf.cache import TokenCache
from tokenary.hf.hooks import decoder_layers, edited_layer
from tokenary.models.bench_vlm import VOCABULARY, exact_match
from tokenary.models.bench_vlm.batches import Batch, Questions
from tokenary.models.tiny import tiny_lm
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.choose import mask_to_select
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.law_tools import asked, pictures, toy_vlm
from tokenary.reduce.mix import segments
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom


class Chosen(Reducer):
    """Keep what the test says: a mask (B, N), rows of any number."""

    needs = frozenset({"queries", "keys", "values", "text"})
    exact = False

    def __init__(self, kept: torch.Tensor, positions: str = "original") -> None:
        super().__init__(Budget(tokens=1))
        self.kept, self.positions = kept.bool(), positions
        self.seen: list[Context] = []

    def plan(self, x: torch.Tensor, keep: int, context: Context) -> TokenMap:
        self.seen.append(context)
        return mask_to_select(self.kept)


def ragged(batch: int = 3, n: int = 64) -> torch.Tensor:
    """A third of the tokens, another number in every row."""
    drawn = torch.rand(batch, n, generator=torch.Generator().manual_seed(3))
    return drawn < torch.tensor([[0.3], [0.4], [0.2]])[:batch]


def masked_logits(model, image: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, first: int) -> torch.Tensor:
    """Logits at the question when layers from `first` on may not look at dropped image tokens."""
    embeds = model.inputs_embeds(image, ids)
    width = embeds.shape[1]
    seen = torch.ones(len(ids), width, dtype=torch.bool)
    seen[:, 1 : 1 + kept.shape[1]] = kept
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask = (causal & seen[:, None] | torch.eye(width, dtype=torch.bool))[:, None]
    layers, undo = decoder_layers(model.language), []
    for layer in range(first, len(layers)):
        edit = edited_layer(model.language, layer, lambda hidden, kwargs: (hidden, {**kwargs, "attention_mask": mask}))
        edit.__enter__()
        undo.append(edit)
    hidden = model.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    for edit in undo:
        edit.__exit__(None, None, None)
    return model.language.lm_head(hidden[:, -ids.shape[1] :])


@pytest.mark.parametrize(("at", "first"), [("encoder", 0), ("decoder:1", 1), ("decoder:3", 3)])
def test_pruning_with_original_positions_is_masking(at, first):
    model, pixels = toy_vlm(), pictures(3)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 3)
    kept = ragged()
    with Chosen(kept).attach(model, at) as reduced:
        found = reduced(reduced.image_tokens(pixels), ids)
    assert reduced.kept == kept.sum(1).tolist() and len(set(reduced.kept)) == 3
    torch.testing.assert_close(found, masked_logits(model, model.image_tokens(pixels), ids, kept, first))
    assert [sorted(row[row >= 0].tolist()) for row in reduced.numbers] == [row.nonzero()[:, 0].tolist() for row in kept]


def test_rows_of_unequal_number_inside_the_encoder_are_masked_too():
    model, pixels = toy_vlm(), pictures(3)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 3)
    kept = ragged()
    with Chosen(kept).attach(model, "vision:1") as reduced:
        seen = reduced.image_tokens(pixels)
        found = reduced(seen, ids)
        alone = reduced(seen[1:2], ids[1:2])
    assert reduced.kept == [int(kept[1].sum())]
    x = model.vision(pixels, output_hidden_states=True).hidden_states[2]
    there = torch.cat([torch.ones(3, 1, dtype=torch.bool), kept], dim=1)
    x = model.vision.norm(model.vision.blocks[2](x, there.float()))[:, 1:]
    expected = masked_logits(model, model.projector(x), ids, kept, 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, found[1:2], atol=1e-4, rtol=1e-4)


def test_gaps_in_positions_do_not_split_the_text():
    """transformers takes gaps for several texts in one row, unless it is given a mask."""
    model, pixels = toy_vlm(), pictures(1)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")])
    kept = torch.zeros(1, 64, dtype=torch.bool)
    kept[:, 5::9] = True
    with Chosen(kept).attach(model, "encoder") as reduced:
        found = reduced(reduced.image_tokens(pixels), ids)
    torch.testing.assert_close(found, masked_logits(model, model.image_tokens(pixels), ids, kept, 0))


@pytest.mark.parametrize("at", ["encoder", "decoder:2"])
def test_compact_positions_are_those_of_the_kept_alone(at):
    model, pixels = toy_vlm(), pictures(2)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 2)
    kept = torch.zeros(2, 64, dtype=torch.bool)
    kept[0, ::4], kept[1, 1::4] = True, True
    with Chosen(kept, "compact").attach(model, at) as reduced:
        found = reduced(reduced.image_tokens(pixels), ids)
        answers = reduced.generate(reduced.image_tokens(pixels), ids, 5)
    image = model.image_tokens(pixels)
    if at == "encoder":
        few = image[kept].view(2, 16, -1)
        torch.testing.assert_close(found, model(few, ids))
        assert answers == model.generate(few, ids, 5)
        return
    embeds, language = model.inputs_embeds(image, ids), model.language
    steps = torch.arange(embeds.shape[1])[None]
    hidden = embeds
    for layer in language.model.layers[:2]:
        hidden = layer(hidden, position_embeddings=language.model.rotary_emb(hidden, position_ids=steps))
    there = torch.ones(2, embeds.shape[1], dtype=torch.bool)
    there[:, 1:65] = kept
    hidden = hidden[there].view(2, -1, hidden.shape[-1])
    steps = torch.arange(hidden.shape[1])[None]
    for layer in language.model.layers[2:]:
        hidden = layer(hidden, position_embeddings=language.model.rotary_emb(hidden, position_ids=steps))
    expected = language.lm_head(language.model.norm(hidden)[:, -ids.shape[1] :])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("at", ["encoder", "decoder:2"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_decoding_ragged_rows_with_padding_is_reading_on(at, positions):
    model, pixels, (ids, there) = toy_vlm(), pictures(3), asked()
    kept = ragged()
    with Chosen(kept, positions).attach(model, at) as reduced:
        answers = reduced.generate(reduced.image_tokens(pixels), ids, 6, there)
    for row, answer in enumerate(answers):
        text = torch.cat([ids[row, there[row]], torch.tensor(answer, dtype=torch.long)])[None]
        with Chosen(kept[row : row + 1], positions).attach(model, at) as alone:
            logits = alone(alone.image_tokens(pixels[row : row + 1]), text)
        best = logits[0, int(there[row].sum()) - 1 :].argmax(-1).tolist()
        assert best[: len(answer)] == answer


def test_upper_layers_of_the_cache_hold_fewer_rows():
    lm = tiny_lm(layers=4)
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    context = Context(grid=(1, 20))
    with DecoderReduction(lm.model, ReduceRandom(keep=5), "decoder:2", start=3, count=20, context=context):
        output = lm.model(ids, use_cache=True)
        cache = output.past_key_values
        assert [cache.get_seq_length(layer) for layer in range(4)] == [30, 30, 15, 15]
        lm.model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert [cache.get_seq_length(layer) for layer in range(4)] == [31, 31, 16, 16]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_span_of_text_under_generate_and_under_our_cache(family):
    """Plain generate, with its own cache and with ours, says what reading on in one pass says; so do padded rows."""
    lm = tiny_lm(layers=4, family=family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (2, 40), generator=generator)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    padding = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)

    def between(start):
        context = Context(grid=(1, 25))
        reducer = ReduceRandom(keep=7)
        reducer.positions = "original"
        return DecoderReduction(lm.model, reducer, "decoder:1", start=start, count=25, context=context)

    with between(4):
        plain = lm.model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
        ours = TokenCache(lm.model.config)
        with attached(lm.model):
            cached = lm.model.generate(
                ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), past_key_values=ours
            )
    assert [layer.held[0] for layer in ours.token_layers][1:] == [ours.token_layers[0].held[0] - 18] * 3
    with between(7):
        left = lm.model.generate(padded, max_new_tokens=8, do_sample=False, attention_mask=padding)
    assert torch.equal(plain, cached) and torch.equal(plain, left[:, 3:])
    with between(4):
        best = lm.model(plain, use_cache=False).logits.argmax(-1)
    assert torch.equal(best[:, -9:-1], plain[:, 40:])
    with torch.no_grad():
        assert not torch.equal(lm.model.generate(ids, max_new_tokens=8, do_sample=False), plain)


@pytest.mark.parametrize("ours", [False, True], ids=["theirs", "ours"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_step_over_the_cache_gives_the_logits_of_one_pass(positions, ours):
    """Rows of unequal number behind left padding, to the last digits, over transformers' cache and over ours."""
    lm = tiny_lm(layers=4)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(5))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    steps = (padding.cumsum(1) - 1).clamp_min(0)
    kept = ragged(2, 25)

    def between() -> DecoderReduction:
        context = Context(grid=(1, 25))
        return DecoderReduction(lm.model, Chosen(kept, positions), "decoder:1", start=6, count=25, context=context)

    with between():
        whole = lm.model(ids, attention_mask=padding, position_ids=steps, use_cache=False).logits
    with between(), attached(lm.model) if ours else contextlib.nullcontext():
        cache = TokenCache(lm.model.config) if ours else None
        output = lm.model(
            ids[:, :-2],
            attention_mask=padding[:, :-2],
            position_ids=steps[:, :-2],
            past_key_values=cache,
            use_cache=True,
        )
        found = [output.logits[:, -1]]
        for step in (38, 39):
            output = lm.model(
                ids[:, step : step + 1],
                attention_mask=padding[:, : step + 1],
                position_ids=steps[:, step : step + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            found.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(found, 1), whole[:, -3:], atol=2e-4, rtol=1e-4)


def test_padding_behind_a_prompt_stays_out_of_our_cache():
    lm = tiny_lm(layers=3)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(6))
    padding = torch.ones_like(ids)
    padding[0, 35:] = 0
    found = []
    for ours in (False, True):
        reducer = Chosen(ragged(2, 25))
        between = DecoderReduction(lm.model, reducer, "decoder:1", start=6, count=25, context=Context(grid=(1, 25)))
        with between, attached(lm.model) if ours else contextlib.nullcontext():
            cache = TokenCache(lm.model.config) if ours else None
            found.append(lm.model(ids, attention_mask=padding, past_key_values=cache, use_cache=True).logits)
    assert cache is not None
    cache.token_layers[2].commit()
    kept = ragged(2, 25).sum(1).tolist()
    assert cache.token_layers[2].held == [10 + kept[0], 15 + kept[1]]
    text = padding[:, -9:].bool()
    torch.testing.assert_close(found[0][:, -9:][text], found[1][:, -9:][text], atol=2e-4, rtol=1e-4)


def test_what_a_decoder_shows_is_rotated():
    model, pixels = toy_vlm(), pictures(2)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 2)
    reducer = Chosen(ragged(2))
    with reducer.attach(model, "decoder:2") as reduced:
        reduced(reduced.image_tokens(pixels), ids)
    context = reducer.seen[0]
    assert set(context.queries) == {1} and (context.layer, context.n_layers) == (1, 4)
    assert context.text is not None and context.text.shape == (2, ids.shape[1], 32)
    maps = {}
    model.language.set_attn_implementation("eager")
    embeds = model.inputs_embeds(model.image_tokens(pixels), ids)
    maps = model.language.model(inputs_embeds=embeds, output_attentions=True).attentions
    model.language.set_attn_implementation("sdpa")
    logits = context.attention_logits(1)
    width = logits.shape[-1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    torch.testing.assert_close(logits.masked_fill(~causal, float("-inf")).softmax(-1), maps[1])
    torch.testing.assert_close(context.image(logits, 3), logits[..., 1:65])


class Pooled(ReducePool):
    """Pool with given numbers of tokens, and weigh by sizes."""

    def plan(self, x: torch.Tensor, keep: int, context: Context) -> TokenMap:
        return segments((torch.arange(x.shape[1]) ** 2 * keep // x.shape[1] ** 2).expand(len(x), -1), keep)


@pytest.mark.parametrize("at", ["encoder", "decoder:2"])
def test_equal_tokens_merged_and_weighed_are_the_tokens_themselves(at):
    """A token that stands for c equal ones at one position is attended to as they are: exp(log c + l) = c exp(l)."""
    model = toy_vlm()
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 2)
    language, n, keep = model.language, 64, 6
    assign = torch.arange(n) ** 2 * keep // n**2
    distinct = torch.randn(2, keep, 32, generator=torch.Generator().manual_seed(0))
    reducer = Pooled(keep=keep, proportional=True)
    reducer.positions = "original"
    with reducer.attach(model, "encoder") as reduced:
        seen = reduced.image_tokens(pictures(2))
        seen = type(seen)(distinct[:, assign], seen.numbers, seen.context, seen.total)
        found = reduced(seen, ids)
        answers = reduced.generate(seen, ids, 4)
    first = torch.tensor([int((assign == group).nonzero()[0]) for group in range(keep)])
    at_ids = torch.cat([torch.zeros(1, dtype=torch.long), 1 + first[assign], 65 + torch.arange(ids.shape[1])])[None]
    embeds = model.inputs_embeds(distinct[:, assign], ids)
    # all members of a group see each other, as the one token sees itself
    order = torch.cat([torch.tensor([-1]), assign, keep + torch.arange(ids.shape[1])])
    mask = (order[:, None] >= order)[None, None].expand(2, -1, -1, -1)
    hidden = language.model(
        inputs_embeds=embeds, position_ids=at_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(found, language.lm_head(hidden[:, -ids.shape[1] :]), atol=1e-4, rtol=1e-4)
    assert [answer[:1] for answer in answers] == found[:, -1:].argmax(-1).tolist()
    if at == "decoder:2":
        with reducer.attach(model, at) as reduced:
            seen = reduced.image_tokens(pictures(2))
            one, weighed = reduced.generate(seen, ids, 6), reduced(seen, ids)
            reducer.proportional = False
            assert (reduced(seen, ids) - weighed).abs().max() > 1e-3
            reducer.proportional = True
            for row, answer in enumerate(one):
                text = torch.cat([ids[row], torch.tensor(answer, dtype=torch.long)])[None]
                best = reduced(reduced.image_tokens(pictures(2)[row : row + 1]), text)[0, ids.shape[1] - 1 :].argmax(-1)
                assert best.tolist()[: len(answer)] == answer


def test_crops_keep_their_rows_and_newlines():
    model = toy_vlm()
    pixels = pictures(1, 128)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")])
    kept = torch.zeros(1, 5 * 64, dtype=torch.bool)
    kept[0, [3, 64 + 9, 2 * 64 + 8, 4 * 64 + 63]] = True  # thumbnail; crops 0, 1 (row 1), 3 (last row)
    with Chosen(kept, "compact").attach(model) as reduced:
        seen = reduced.image_tokens(pixels)
        prompt = reduced.prompt(seen, ids)
    assert reduced.kept == [4 + 16] and prompt.image == 20
    full = model.image_tokens(pixels)[0]
    line, newline = 17, model.newline
    expected = [full[3], newline, full[64 + line + 1], full[64 + line + 8], newline]
    torch.testing.assert_close(prompt.embeds[0, 1:6], torch.stack(expected))
    torch.testing.assert_close(prompt.embeds[0, 19], full[64 + 15 * line + 15])
    torch.testing.assert_close(prompt.embeds[0, 20], newline)
    with Chosen(kept, "original").attach(model) as reduced:
        prompt = reduced.prompt(reduced.image_tokens(pixels), ids)
    assert prompt.positions[0, :6].tolist() == [0, 4, 65 + 16, 65 + line + 1, 65 + line + 8, 65 + line + 16]
    assert prompt.positions[0, 21] == 1 + 64 + 16 * line


def test_it_takes_the_place_of_the_model_where_that_is_measured():
    model, pixels = toy_vlm(), pictures(2)
    turns = [VOCABULARY.turn("is there a red star ?", "yes")] * 2
    ids = torch.tensor([ids for ids, _ in turns])
    batch = Batch(pixels, ids, torch.tensor([predicted for _, predicted in turns]), torch.zeros(2, 8, 8))
    held_out = Questions(batch, [], [])
    expected = exact_match(model, held_out, torch.device("cpu"))
    with ReduceRandom(keep="100%").attach(model) as reduced:
        assert exact_match(reduced, held_out, torch.device("cpu")) == expected
        exact_match(reduced, held_out, torch.device("cpu"), blind=True)
        assert reduced.kept == [0, 0]
        seen = reduced.image_tokens(pixels)
        torch.testing.assert_close(reduced(seen[1:2], ids[1:2]), reduced(seen, ids)[1:2])
    with ReduceRandom(keep=16).attach(model, "vision:1") as reduced:
        reduced(reduced.image_tokens(pixels), ids)
        assert reduced.vision_tokens == [65, 65, 17, 17]
    with ReduceRandom(keep=16).attach(model, "decoder:3") as reduced:
        reduced(reduced.image_tokens(pixels), ids)
        width = 65 + ids.shape[1]
        assert reduced.language_tokens == [width, width, width, width - 48]


def test_wrong_places_and_pictures_are_refused():
    model = toy_vlm()
    for at in ("decoder:0", "decoder:4", "vision:3", "llm"):
        with pytest.raises(OptionError):
            ReduceRandom().attach(model, at)
    with pytest.raises(OptionError):
        ReduceRandom().attach(model, "encoder", counts={1: 3})
    with ReduceRandom().attach(model) as reduced:
        with pytest.raises(InputError, match="64 or 128"):
            reduced.image_tokens(pictures(1, 96))
        with pytest.raises(InputError, match="one question a picture"):
            reduced.answer(pictures(2), ["is there a red star ?"])
        with pytest.raises(InputError, match="do not know"):
            reduced.answer(pictures(1), ["who painted this ?"])
    gemma = tiny_lm(family="gemma3").model
    with pytest.raises(UnsupportedModelError):
        DecoderReduction(gemma, ReduceRandom(), "decoder:1", start=1, count=4, context=Context(grid=(1, 4)))
    lm = tiny_lm(layers=3).model
    late = DecoderReduction(lm, ReduceRandom(keep=2), "decoder:1", start=2, count=9, context=Context(grid=(1, 9)))
    with late, pytest.raises(UnsupportedModelError, match="one pass"):
        lm(torch.zeros(1, 5, dtype=torch.long))
