"""What we rely on in transformers, item by item: a version that changes one of these breaks here first."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StoppingCriteria, StoppingCriteriaList

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Loop
from tokenary.decode.prompt_lookup import PromptLookup
from tokenary.hf.attention import attend
from tokenary.hf.cache import TokenCache
from tokenary.hf.hooks import decoder_layers, edited_layer
from tokenary.hf.packing import PackedLinear, can_pack, pack_linears
from tokenary.hf.target import Target, attached
from tokenary.memory.recent import RecentTokens
from tokenary.models import tiny_lm

PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3], [10, 11] * 5, [4, 3, 2, 1]]
FAMILIES = ("llama", "gemma3", "qwen2")


def left_padded(prompts, pad=0):
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, prompt, n=24):
    """The reference: transformers' own generate, alone and without padding."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_lm(seed=3, family=request.param).model


def test_plain_generate_over_our_cache_with_left_padding(model):
    inputs = left_padded(PROMPTS)
    with attached(model):
        out = model.generate(
            **inputs, past_key_values=TokenCache(model.config), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    for row, prompt in enumerate(PROMPTS):
        assert out[row, inputs["input_ids"].shape[1] :].tolist() == greedy(model, prompt)


def test_target_equals_generate_on_a_ragged_batch(model):
    with attached(model):
        loop = Loop(Target(model), PROMPTS, Sampler(), 24)
        list(loop)
    assert [s.new_ids for s in loop.sequences] == [greedy(model, p) for p in PROMPTS]


def test_prompt_in_chunks_equals_prompt_at_once(model):
    prompts = [list(range(1, 40)), list(range(5, 20)), [7] * 33]
    with attached(model):
        whole, pieces = Target(model), Target(model)
        torch.testing.assert_close(whole.prefill(prompts), pieces.prefill(prompts, chunk=7), atol=1e-5, rtol=1e-4)
        tree = TokenTree.roots([1, 2, 3])
        torch.testing.assert_close(whole.score(tree), pieces.score(tree), atol=1e-5, rtol=1e-4)


def test_tree_scores_equal_every_path_alone(model):
    """One pass over a ragged batch of trees = running each root-to-node path by itself."""
    trees = [([9, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 4]), ([8, 6], [-1, 0]), ([7], [-1]), ([6, 2, 3, 4], [-1, 0, 1, 0])]
    with attached(model):
        target = Target(model)
        target.prefill(PROMPTS)
        logits = target.score(TokenTree.stack(trees))
    for row, (ids, parents) in enumerate(trees):
        for node in range(len(ids)):
            path, at = [], node
            while at >= 0:
                path.insert(0, ids[at])
                at = parents[at]
            expected = model(torch.tensor([PROMPTS[row] + path])).logits[0, -1]
            torch.testing.assert_close(logits[row, node], expected, atol=1e-5, rtol=1e-4)


def test_commit_and_roll_back_leave_the_exact_past(model):
    trees = TokenTree.stack([([9, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 4]), ([8, 6, 7], [-1, 0, 1])])
    with attached(model):
        target = Target(model)
        target.prefill(PROMPTS[:2])
        target.score(trees)
        target.commit([[0, 2, 4], [0]])
        target.score(trees)
        target.commit([[], []])  # rolled back whole
        logits = target.score(TokenTree.roots([11, 12]))[:, 0]
    for row, tail in enumerate(([9, 2, 4, 11], [8, 12])):
        expected = model(torch.tensor([PROMPTS[row] + tail])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-4)
    assert target.lengths == [len(PROMPTS[0]) + 3, len(PROMPTS[1]) + 1]


def test_rows_leave_the_batch(model):
    with attached(model):
        target = Target(model)
        target.prefill(PROMPTS)
        target.select_rows([2, 0])
        logits = target.score(TokenTree.roots([11, 12]))[:, 0]
    for row, tokens in enumerate((PROMPTS[2] + [11], PROMPTS[0] + [12])):
        torch.testing.assert_close(logits[row], model(torch.tensor([tokens])).logits[0, -1], atol=1e-5, rtol=1e-4)


def test_transformers_prompt_lookup_rolls_our_cache_back():
    """`crop` over an inherited counter once ran silently wrong; ours removes pending tokens only."""
    model, prompt = tiny_lm(seed=3).model, [10, 11, 12, 13] * 4
    cache = TokenCache(model.config)
    with attached(model):
        out = model.generate(
            torch.tensor([prompt]), past_key_values=cache, max_new_tokens=24, do_sample=False, pad_token_id=0,
            prompt_lookup_num_tokens=5,
        )  # fmt: skip
    assert out[0, len(prompt) :].tolist() == greedy(model, prompt)
    assert cache.get_seq_length() == out.shape[1] - 1


def test_crop_past_the_pending_tokens_is_refused():
    model = tiny_lm().model
    cache = TokenCache(model.config)
    with attached(model):
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        model(torch.tensor([[4]]), past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="roll back 2"):
        cache.crop(-2)


def test_logical_and_physical_length_are_apart():
    model = tiny_lm().model
    policy = RecentTokens(keep="8", sinks=2, interval=4)
    cache = TokenCache(model.config, policy.attach(model.config, torch.float32))
    with attached(model):
        model(torch.tensor([list(range(1, 31))]), past_key_values=cache)
        model(torch.tensor([[4]]), past_key_values=cache)
    assert cache.get_seq_length() == 31
    assert cache.layers[0].keys.shape[2] == 9
    length, offset = cache.get_mask_sizes(1, 0)
    assert (length, offset) == (10, 22)


def test_layers_may_hold_different_lengths():
    """One mask per layer type cannot serve unequal budgets; ours is built by each layer."""
    model = tiny_lm(layers=3).model
    policy = RecentTokens(keep="12", sinks=2, interval=4, layers="pyramid")
    with attached(model):
        target = Target(model, policy.attach(model.config, torch.float32))
        loop = Loop(target, [*PROMPTS, list(range(1, 60))], Sampler(), 30)
        list(loop)
    held = [layer.held[-1] for layer in target.cache.layers]
    assert len(set(held)) == 3 and all(len(s.new_ids) == 30 for s in loop.sequences)


def test_a_registered_attention_without_mask_function_would_see_padding():
    """The trap itself: if this stops failing, `padding_mask` may be dropped."""
    AttentionInterface.register("no_mask_function", attend_to_all)
    model = tiny_lm(seed=3).model
    inputs = left_padded(PROMPTS[:2])
    alone = model(torch.tensor([PROMPTS[1]])).logits[0, -1]
    model.set_attn_implementation("no_mask_function")
    assert not torch.allclose(model(**inputs).logits[1, -1], alone, atol=1e-3)


def attend_to_all(module, query, key, value, attention_mask, scaling, **kwargs):
    assert attention_mask is None
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def test_keys_that_lost_their_layer_are_refused():
    model = tiny_lm().model
    with attached(model), pytest.raises(UnsupportedModelError, match="hand the cache's keys"):
        model(torch.tensor([[1, 2, 3]]), past_key_values=DynamicCache(config=model.config))


def test_soft_cap_is_refused():
    query = torch.zeros(1, 2, 1, 4)
    with pytest.raises(UnsupportedModelError, match="soft cap"):
        attend(torch.nn.Identity(), query, query, query, None, softcap=30.0)


def test_attached_restores_the_models_own_attention(model):
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), attached(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before


def test_encoder_decoder_is_refused_before_any_work():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        Target(T5ForConditionalGeneration(config))


class Recorder(StoppingCriteria):
    """Streams every token and cancels after some; what `custom_generate` offers instead of a streamer."""

    def __init__(self, most):
        self.most, self.seen = most, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(int(input_ids[0, -1]))
        return torch.tensor([len(self.seen) >= self.most])


def test_custom_generate_streams_and_cancels_through_stopping_criteria(model):
    prompt, recorder = [10, 11, 12] * 4, Recorder(9)
    out = model.generate(
        torch.tensor([prompt]), custom_generate=PromptLookup(nodes=6), max_new_tokens=24, do_sample=False,
        pad_token_id=0, stopping_criteria=StoppingCriteriaList([recorder]),
    )  # fmt: skip
    assert out[0, len(prompt) :].tolist() == recorder.seen == greedy(model, prompt)[:9]


def test_custom_generate_with_processors_and_left_padding(model):
    inputs = left_padded(PROMPTS)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.3}
    out = model.generate(**inputs, custom_generate=PromptLookup(nodes=6), **options)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert out[row, inputs["input_ids"].shape[1] :].tolist() == alone.tolist()


def test_custom_generate_returns_a_dict_where_asked(model):
    out = model.generate(
        torch.tensor([[1, 2, 3]]), custom_generate=PromptLookup(), max_new_tokens=4, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    assert out.sequences.shape == (1, 7)


def test_hooks_see_and_edit_a_layers_arguments(model):
    seen = {}

    def edit(hidden_states, kwargs):
        seen.update(kwargs, shape=hidden_states.shape)
        return hidden_states * 0, kwargs

    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    with edited_layer(model, 1, edit):
        assert not torch.allclose(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, before)
    assert seen["shape"][:2] == (1, 3)
    assert {"attention_mask", "position_ids", "position_embeddings", "past_key_values"} <= set(seen)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_equal_plain_ones(dtype, bias):
    linear = torch.nn.Linear(48, 80, bias=bias).to(dtype)
    if not can_pack(linear):
        pytest.skip(f"oneDNN has no {dtype} on this machine")
    with torch.inference_mode():
        packed = PackedLinear(linear)
        for shape in ((48,), (1, 48), (5, 48), (2, 7, 48)):
            x = torch.randn(shape).to(dtype)
            torch.testing.assert_close(packed(x), linear(x), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_packing_replaces_every_linear_layer_and_spares_a_tied_embedding(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        before = model(ids).logits
        count = pack_linears(model)
        assert count == sum(isinstance(m, PackedLinear) for m in model.modules()) > 0
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
