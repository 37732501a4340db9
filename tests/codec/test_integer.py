import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.codec import integer, kernels
from tokenary.codec.integer import IntegerLanes, IntegerLlama, exact_product
from tokenary.codec.tables import exp_table, logistic_table, rotations
from tokenary.core.errors import UnsupportedModelError
from tokenary.models.tiny import tiny_lm


def random_ids(count, seed=0, vocab=97):
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def test_tables_are_the_functions():
    d = np.arange(24 * 1024)
    assert np.abs(exp_table(24, 30)[:-1] - np.exp(-d / 1024) * 2**30).max() <= 0.5 + 1e-6
    assert exp_table(24, 30)[-1] == 0
    x = np.arange(-16 * 512, 16 * 512 + 1) / 512
    assert np.abs(logistic_table(16, 512) - 1 / (1 + np.exp(-x))).max() < 1e-7
    cos, sin = rotations(10_000.0, 16, 70_000, 50)
    angle = np.arange(70_000, 70_050)[:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    assert np.abs(cos - np.cos(angle)).max() < 2e-7
    assert np.abs(sin - np.sin(angle)).max() < 2e-7


@pytest.mark.parametrize("width", [16, 576, 1536])
def test_every_product_is_exact(width):
    weight = torch.randint(-127, 128, (40, width), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    weight[0] = 127
    rows = torch.randint(-127, 128, (7, width), dtype=torch.int8)
    rows[0] = 127
    expected = (rows.long() @ weight.long().T).double().numpy()
    for make in (exact_product, integer._int_mm):
        found = make(weight)(rows)
        assert np.array_equal(found, expected.astype(np.float32)), make.__name__


def test_a_product_that_saturates_is_not_taken(monkeypatch):
    monkeypatch.setattr(integer, "_packed", lambda weight: lambda x: np.clip((x.float() @ weight.float().T), -1e4, 1e4))
    monkeypatch.setattr(integer, "_int_mm", lambda weight: lambda x: (x.float() @ weight.float().T).numpy() + 1)
    weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    rows = torch.randint(-127, 128, (3, 64), dtype=torch.int8)
    assert np.array_equal(exact_product(weight)(rows), (rows.long() @ weight.long().T).float().numpy())


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=40))
@settings(deadline=None, max_examples=40)
def test_quantized_rows_are_within_half_a_step(values):
    x = np.array([values], np.float32)
    planes, scales = np.empty((2, len(values)), np.int8), np.empty(1, np.float32)
    kernels.quantize_rows(x, planes, scales)
    whole = planes[0].astype(int) * 128 + planes[1]
    assert np.abs(whole).max(initial=0) <= kernels.LEVELS
    assert np.abs(whole * float(scales[0]) - x[0]).max() <= 0.51 * float(scales[0]) + 1e-30


def masked(model, ids, window, drop, sinks=0):
    """Logits of the float model where each token sees its window, and before it the first tokens.

    These stand where the window begins, so that a pass a beginning is needed.
    """
    rows = np.arange(len(ids))
    starts = np.where(rows >= window, ((rows - window) // drop + 1) * drop, 0)
    logits = np.empty((len(ids), model.config.vocab_size), np.float32)
    for start in np.unique(starts):
        first = rows < (sinks if start else 0)
        seen = (rows[None] <= rows[:, None]) & ((rows[None] >= starts[:, None]) | first)
        mask = torch.where(torch.from_numpy(seen), 0.0, -torch.inf)[None, None]
        places = torch.from_numpy(np.where(first, start - sinks + rows, rows))[None]
        with torch.inference_mode():
            found = model(torch.tensor([ids]), attention_mask=mask, position_ids=places).logits[0].numpy()
        logits[starts == start] = found[starts == start]
    return logits


@pytest.mark.parametrize(("window", "sinks"), [(200, 0), (24, 0), (200, 3), (24, 3)])
@pytest.mark.parametrize("heads", [(4, 2, 32), (1, 1, 64)])
def test_logits_are_those_of_the_float_model(window, sinks, heads):
    lm = tiny_lm(heads=heads[0], kv_heads=heads[1], hidden=heads[2], layers=1 if sinks else 3)
    ids = random_ids(120)
    expected = masked(lm.model, ids, window, 8, sinks)
    lanes = IntegerLanes(IntegerLlama(lm), 1, window, 8, sinks)
    found = lanes.logits(np.concatenate([lanes.read([ids[i : i + 8]])[0] for i in range(0, 120, 8)]))
    error = np.abs(found - expected).mean(1) / expected.std()
    assert np.median(error) < 0.05
    if window < 120:  # the mask is the right one: with the whole past, or other sinks, it is another function
        for other in ((200, 0), (window, 0 if sinks else 3)):
            off = np.abs(found - masked(lm.model, ids, other[0], 8, other[1])).mean(1) / expected.std()
            assert np.median(off[window:]) > 4 * np.median(error[window:])


@given(st.data())
@settings(deadline=None, max_examples=8)
def test_logits_do_not_depend_on_the_pieces_nor_on_the_other_lanes(data):
    model = test_logits_do_not_depend_on_the_pieces_nor_on_the_other_lanes.model
    texts = [random_ids(data.draw(st.integers(0, 60)), seed) for seed in range(3)]
    together = IntegerLanes(model, 3, 24, 8, 3)
    found = [[] for _ in texts]
    rest = [list(text) for text in texts]
    while any(rest):
        pieces = [row[: data.draw(st.integers(0, 8))] for row in rest]
        rest = [row[len(piece) :] for row, piece in zip(rest, pieces, strict=True)]
        for states, new in zip(found, together.read(pieces), strict=True):
            states.extend(new)
    for text, states in zip(texts, found, strict=True):
        alone = IntegerLanes(model, 1, 24, 8, 3)
        for token, state in zip(text, states, strict=True):
            assert np.array_equal(alone.read([[token]])[0][0], state)


test_logits_do_not_depend_on_the_pieces_nor_on_the_other_lanes.model = IntegerLlama(tiny_lm())


def test_threads_change_nothing():
    model, ids, before = IntegerLlama(tiny_lm()), random_ids(8), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(IntegerLanes(model, 1, 24, 8).read([ids])[0])
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "gpt2"])
def test_other_models_are_refused(family):
    with pytest.raises(UnsupportedModelError):
        IntegerLlama(tiny_lm(family=family))
