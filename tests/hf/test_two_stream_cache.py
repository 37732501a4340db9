from __future__ import annotations

import pytest
import torch

from tokenary.hf.two_stream_cache import TwoStreamCache
from tokenary.models.text_diffusion import build

IDS = torch.tensor([[5, 9, 8, 7, 20, 3], [30, 4, 22, 12, 6, 17]])
SIZES = {"vocab": 40, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "context": 16}


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    found = build(objective="any-subset", **SIZES).eval()
    found.set_attn_implementation(request.param)
    return found


def run(model, cache, ids, contents, queries):
    """One pass over both sequences: every row sees all slots of the first four positions, each query itself too."""
    contents, queries = torch.tensor(contents), torch.tensor(queries)
    rows, count = contents.shape[1] + queries.shape[1], queries.shape[1]
    sees = torch.zeros(2, 1, rows, cache.length + 1 + count, dtype=torch.bool)
    sees[..., :4] = True
    sees[:, :, rows - count :, cache.length + 1 :] = torch.eye(count, dtype=torch.bool)
    cache.begin(contents)
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    asked = torch.full_like(queries, model.config.mask_token_id)
    read = ids.gather(1, contents.clamp(max=ids.shape[1] - 1))
    with torch.inference_mode():
        return model(
            input_ids=torch.cat([read, asked], dim=1),
            position_ids=torch.cat([contents, queries], dim=1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=count,
        ).logits


def plain(model, ids, query):
    """The logits at a position given the first four tokens, without a cache."""
    ids = torch.cat([ids[:, :4], torch.full_like(ids[:, :1], model.config.mask_token_id)], dim=1)
    mask = torch.zeros(1, 1, 5, 5)
    mask[:, :, :4, 4] = torch.finfo(mask.dtype).min  # the tokens do not see the query
    with torch.inference_mode():
        return model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, query]]), attention_mask=mask).logits[:, -1]


def test_queries_see_what_was_read_in_this_pass_and_before(model):
    cache = TwoStreamCache(model.config, IDS.shape[1])
    first = run(model, cache, IDS, [[0, 1, 2, 3]] * 2, [[4, 5]] * 2)
    later = run(model, cache, IDS, [[6]] * 2, [[5], [4]])  # reads nothing but padding
    for query in (4, 5):
        torch.testing.assert_close(first[:, query - 4], plain(model, IDS, query), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(later[:, 0], torch.stack([first[0, 1], first[1, 0]]), atol=1e-5, rtol=1e-5)
    assert cache.nbytes == 2 * 2 * 2 * 7 * 16 * 4  # keys and values, layers, sequences, slots, width, float32


def test_a_slot_is_written_anew_where_it_belongs(model):
    cache = TwoStreamCache(model.config, IDS.shape[1])
    run(model, cache, IDS, [[0, 1, 2, 3]] * 2, [[4]] * 2)
    before = cache.layers[0].keys.clone()
    run(model, cache, IDS + 1, [[2], [3]], [[4]] * 2)
    differs = (cache.layers[0].keys != before).any(-1).any(1)
    assert differs.nonzero().tolist() == [[0, 2], [1, 3]]


def test_sequences_leave(model):
    cache = TwoStreamCache(model.config, IDS.shape[1])
    cache.select([0])  # nothing was read yet
    run(model, cache, IDS, [[0, 1, 2, 3]] * 2, [[4]] * 2)
    second = cache.layers[1].values[1].clone()
    cache.select([1])
    assert torch.equal(cache.layers[1].values[0], second) and len(cache.layers[0].keys) == 1
