from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.budget import Budget, spread


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("50%", Budget(ratio=0.5)),
        (" 12.5 % ", Budget(ratio=0.125)),
        ("0.5", Budget(ratio=0.5)),
        (0.25, Budget(ratio=0.25)),
        (1.0, Budget(ratio=1.0)),
        ("100%", Budget(ratio=1.0)),
        ("256", Budget(tokens=256)),
        (256, Budget(tokens=256)),
        ("1", Budget(tokens=1)),
        ("64MB", Budget(bytes=64_000_000)),
        ("64 mb", Budget(bytes=64_000_000)),
        ("1.5KiB", Budget(bytes=1536)),
        ("2GB", Budget(bytes=2_000_000_000)),
        ("100B", Budget(bytes=100)),
        (Budget(tokens=3), Budget(tokens=3)),
    ],
)
def test_reading(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text", ["", "half", "0%", "101%", "-3", "0", "0.0", "1.5", "64XB", "nan", "inf", "0MB", "-5MB", "5 0%", None]
)
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=r"budget|share"):
        Budget.parse(text)


@given(
    st.one_of(
        st.integers(1, 400).map(lambda n: Budget(ratio=n / 400)),
        st.integers(1, 10**6).map(lambda n: Budget(tokens=n)),
        st.integers(1, 10**12).map(lambda n: Budget(bytes=n)),
    )
)
def test_text_reads_back(budget):
    back = Budget.parse(str(budget))
    assert (back.tokens, back.bytes) == (budget.tokens, budget.bytes)
    assert back.ratio == pytest.approx(budget.ratio) if budget.ratio else back.ratio is None


def test_exactly_one_field():
    for fields in ({}, {"ratio": 0.5, "tokens": 3}, {"tokens": 3, "bytes": 3}):
        with pytest.raises(ValueError, match="share"):
            Budget(**fields)


@given(st.integers(1, 100), st.integers(1, 5000))
def test_a_share_is_of_the_prompt_rounded_down(percent, n_tokens):
    found = Budget(ratio=percent / 100).resolve(n_tokens, 1)
    assert found == (None if percent == 100 else max(1, percent * n_tokens // 100))


def test_tokens_and_bytes():
    assert Budget(tokens=256).resolve(1000, 7) == 256
    assert Budget(bytes=1000).resolve(50, 7) == 142
    assert Budget(bytes=1).resolve(50, 7) == 1


@given(st.integers(1, 500), st.integers(1, 40), st.sampled_from(["uniform", "pyramid"]))
def test_layers_share_the_whole_budget(total, layers, shape):
    shares = spread(total, layers, shape)
    assert len(shares) == layers and min(shares) >= 1
    if min(round(0.5 * total), total) >= 2:  # the floor lifts nothing
        assert sum(shares) == total * layers
    if shape == "uniform":
        assert set(shares) == {total}
    else:
        ideal = [total * (1.5 - (layer / (layers - 1) if layers > 1 else 0.5)) for layer in range(layers)]
        assert all(abs(share - wish) < 2 for share, wish in zip(shares, ideal, strict=True))


def test_the_floor_is_kept():
    assert min(spread(2, 10, "pyramid", floor=2)) == 2
    assert math.prod(spread(1, 3, "uniform", floor=4)) == 64
