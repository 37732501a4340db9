"""Token maps against matrices filled entry by entry."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError
from tokenary.core.token_map import (
    Compose,
    Cost,
    Dense,
    Permute,
    Scatter,
    Segment,
    Select,
    Sparse,
    TokenMap,
    check_token_map,
)

torch.set_num_threads(1)
F64 = torch.float64
thorough = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = ["select", "permute", "scatter", "segment", "sparse", "dense"]


def reference(kind: str, batch: tuple[int, ...], m: int, n: int, entries) -> torch.Tensor:
    """Matrix (*batch, m, n) filled by a loop; entries(b) yields (row, column, value) of batch element b."""
    matrix = torch.zeros(*batch, m, n, dtype=F64)
    for b in itertools.product(*(range(size) for size in batch)):
        for row, column, value in entries(b):
            matrix[(*b, row, column)] += value
    return matrix


def make(kind: str, seed: int, n: int, m: int, batch: tuple[int, ...], extra: bool) -> tuple[TokenMap, torch.Tensor]:
    """One map that reads n tokens, and its matrix. ``extra`` adds weights, invalid rows and tokens of no group."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g) if math.prod(shape) else torch.zeros(shape).long()

    def weights(*shape: int) -> torch.Tensor:
        return ints(0, 5, *shape).double() / 2  # zeros among them

    if kind == "permute":
        index = torch.rand(*batch, n, generator=g).argsort(-1)
        return Permute(index), reference(kind, batch, n, n, lambda b: ((i, j, 1) for i, j in enumerate(index[b])))
    if kind == "select":
        index = ints(0, n, *batch, m)
        valid = ints(0, 2, *batch, m).bool() if extra else torch.ones(*batch, m, dtype=torch.bool)
        w = weights(*batch, m) if extra else torch.ones(*batch, m, dtype=F64)
        made = Select(index.where(valid, -7), n, valid, w) if extra else Select(index, n)
        rows = lambda b: ((i, index[b][i], w[b][i]) for i in range(m) if valid[b][i])  # noqa: E731
        return made, reference(kind, batch, m, n, rows)
    if kind == "scatter":
        m = max(m, 1)
        index, valid, w = ints(0, m, *batch, n), ints(0, 2, *batch, n).bool() | (not extra), weights(*batch, n)
        w = w if extra else torch.ones_like(w)
        made = Scatter(index.where(valid, 99), m, valid, w) if extra else Scatter(index, m)
        return made, reference(
            kind, batch, m, n, lambda b: ((index[b][j], j, w[b][j]) for j in range(n) if valid[b][j])
        )
    if kind == "segment":
        assign, w = ints(-2 if extra else 0, m, *batch, n) if m else ints(-2, 0, *batch, n), weights(*batch, n)
        w = w if extra else torch.ones_like(w)
        reduction = ("mean", "sum")[seed % 2]

        def entries(b):
            for j in range(n):
                if assign[b][j] >= 0:
                    total = sum(w[b][i] for i in range(n) if assign[b][i] == assign[b][j])
                    if reduction == "sum" or total:
                        yield assign[b][j], j, w[b][j] / (total if reduction == "mean" else 1)

        return Segment(assign, m, w if extra else None, reduction), reference(kind, batch, m, n, entries)
    matrix = weights(m, n) if kind == "sparse" else weights(*batch, m, n)
    return (Sparse(matrix.to_sparse()) if kind == "sparse" else Dense(matrix)), matrix


@st.composite
def maps(draw, kinds=KINDS, n=None):
    kind = draw(st.sampled_from(kinds))
    batch = draw(st.sampled_from([(), (2,), (1,), (2, 3), (2, 1), (0,)]))
    n = draw(st.integers(1, 6)) if n is None else n
    return make(kind, draw(st.integers(0, 10**6)), n, draw(st.integers(0, 5)), batch, draw(st.booleans()))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@thorough
@given(maps())
def test_apply_is_the_matrix_product(pair):
    op, matrix = pair
    n = matrix.shape[-1]
    assert op.shape == matrix.shape and op.batch_shape == matrix.shape[:-2]
    close(op.dense(F64), matrix)
    close(op.T.dense(F64), matrix.mT)
    x = noise(*op.batch_shape, n, 4)
    close(op.apply(x), matrix @ x)
    close(op @ x, matrix @ x)
    shared = noise(n, 4)  # no batch of its own
    close(op.apply(shared), matrix @ shared)
    close(op @ shared[:, 0], (matrix @ shared[:, :1]).squeeze(-1))
    wide = noise(2, *[1] * len(op.batch_shape), n, 4)  # one more batch dim than the map
    close(op.apply(wide), matrix @ wide)


@thorough
@given(maps())
def test_any_token_axis(pair):
    op, matrix = pair
    lead, n = op.batch_shape, matrix.shape[-1]
    last = noise(*lead, n)
    close(op.apply(last, dim=-1), (matrix @ last[..., None]).squeeze(-1))
    grid = noise(*lead, n, 2, 3)
    want = (matrix @ grid.reshape(*lead, n, 6)).unflatten(-1, (2, 3))
    close(op.apply(grid, dim=-3), want)
    close(op.apply(grid, dim=len(lead)), want)
    strided = noise(*lead, 3, n).mT  # not contiguous
    close(op.apply(strided), matrix @ strided)


@thorough
@given(maps())
def test_laws_hold(pair):
    assert check_token_map(pair[0]) == []


def test_laws_find_a_broken_map():
    class Wrong(Dense):
        @property
        def T(self):
            return Dense(2 * self.matrix.mT)

    broken = check_token_map(Wrong(torch.eye(3)))
    assert any("T.dense()" in text for text in broken) and any("<P x, y>" in text for text in broken)


@thorough
@given(maps())
def test_sizes_masks_and_positions_count_entries(pair):
    op, matrix = pair
    there = matrix != 0
    close(op.sizes().double(), there.sum(-1).double())
    prior = torch.arange(1.0, there.shape[-1] + 1, dtype=F64)
    close(op.sizes(prior), (there * prior).sum(-1))
    m = torch.arange(there.shape[-1]) % 2 == 0
    assert torch.equal(op.mask(m), (there & m).any(-1))

    p = torch.arange(there.shape[-1]).flip(0) + 5
    first, mean, reindex = (op.positions(p, policy) for policy in ("first", "mean", "reindex"))
    for row in itertools.product(*(range(size) for size in there.shape[:-1])):
        sources = p[there[row]].tolist()
        assert first[row] == min(sources, default=0)
        assert mean[row] == pytest.approx(sum(sources) / len(sources) if sources else 0)
        assert reindex[row] == max(there[row[:-1]].any(-1)[: row[-1] + 1].sum() - 1, 0)
    if op.single_source:
        assert torch.equal(op.positions(p), first)
    else:
        with pytest.raises(OptionError, match="first, mean or reindex"):
            op.positions(p)
    assert op.positions(p.float(), "first").dtype == torch.float32 and mean.dtype == torch.float32


@thorough
@given(maps())
def test_pinv_undoes(pair):
    op, matrix = pair
    close(matrix @ op.pinv().dense(F64) @ matrix, matrix)
    copies_back = isinstance(op, Segment) and op.reduction == "mean" and op.weights is not None
    if not copies_back:  # with equal weights the copy is the pseudo-inverse
        torch.testing.assert_close(op.pinv().dense(F64), torch.linalg.pinv(matrix), rtol=1e-9, atol=1e-9)


@settings(thorough, max_examples=40)
@given(st.data())
def test_three_maps_compose(data):
    inner, b = data.draw(maps())
    middle, m = data.draw(maps(n=b.shape[-2])) if b.shape[-2] else data.draw(maps(kinds=["dense"], n=0))
    outer, o = data.draw(maps(n=m.shape[-2])) if m.shape[-2] else data.draw(maps(kinds=["dense"], n=0))
    try:
        want = o @ m @ b
    except RuntimeError:  # the batches do not broadcast
        with pytest.raises(OptionError):
            outer @ (middle @ inner)
        return
    left, right = (outer @ middle) @ inner, outer @ (middle @ inner)
    x = noise(b.shape[-1], 3)
    for op in (left, right):
        close(op.dense(F64), want)
        close(op.apply(x), want @ x)
        close(op.T.dense(F64), want.mT)
    assert check_token_map(left) == []
    paths = (o != 0).double() @ (m != 0).double() @ (b != 0).double()
    close(left.sizes().double(), paths.sum(-1).expand(left.sizes().shape))
    assert torch.equal(left.mask(torch.ones(b.shape[-1], dtype=torch.bool)), paths.sum(-1) > 0)


@pytest.mark.parametrize(
    ("outer", "inner", "kind"),
    [
        ("select", "select", Select),
        ("select", "permute", Select),
        ("permute", "select", Select),
        ("permute", "permute", Permute),
        ("scatter", "scatter", Scatter),
        ("segment", "segment", Compose),
        ("segment", "select", Compose),
    ],
)
@pytest.mark.parametrize("extra", [False, True])
def test_structure_survives_composition(outer, inner, kind, extra):
    b, b_matrix = make(inner, 3, 6, 4, (2, 1), extra)
    a, a_matrix = make(outer, 4, b.shape[-2], 3, (3,), extra)
    assert type(a @ b) is kind
    close((a @ b).dense(F64), a_matrix @ b_matrix)


def test_unmerge_through_two_layers_copies_back():
    first = Segment(torch.tensor([0, 0, 1, 2, 2, 2]), 3)
    second = Segment(torch.tensor([0, 1, 1]), 2, weights=first.sizes())
    both = second @ first
    x = noise(6, 2)
    close(both.apply(x), torch.stack([x[:2].mean(0), x[2:].mean(0)]))  # sizes make it the mean over tokens
    close((both.pinv() @ both).apply(x), torch.stack([x[:2].mean(0)] * 2 + [x[2:].mean(0)] * 4))
    assert both.sizes().tolist() == [2, 4] == second.sizes(first.sizes()).tolist()


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 4), (1, 3, 4), (3, 4), (4,)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_select_agrees_with_gather(shape, contiguous):
    keys = noise(2, 3, 7, 5) if contiguous else noise(2, 7, 3, 5).transpose(1, 2)  # (B, H, N, D)
    index = torch.randint(7, shape, generator=torch.Generator().manual_seed(0))
    want = keys.gather(-2, index.expand(2, 3, 4)[..., None].expand(2, 3, 4, 5))
    assert torch.equal(Select(index, 7).apply(keys), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64, torch.int64, torch.bool])
def test_dtype_is_kept(dtype):
    x = (noise(2, 6, 3) * 4).to(dtype)
    index = torch.tensor([[4, 0, 4], [1, 2, 5]])
    select = Select(index, 6, torch.tensor([[True, False, True], [True, True, True]]))
    want = x.gather(1, index[..., None].expand(2, 3, 3)).clone()
    want[0, 1] = 0
    assert torch.equal(select.apply(x), want)
    total = Segment(torch.tensor([0, 1, 0, -1, 1, 1]), 2, reduction="sum")
    if dtype != torch.bool:
        want = torch.stack([x.double()[:, [0, 2]].sum(1), x.double()[:, [1, 4, 5]].sum(1)], 1).to(dtype)
        torch.testing.assert_close(total.apply(x), want)
    if dtype.is_floating_point:
        for op in (Segment(torch.arange(6) // 2, 3), Dense(torch.rand(2, 6)), Sparse(torch.rand(2, 6).to_sparse())):
            assert op.apply(x).dtype == dtype
            torch.testing.assert_close(op.apply(x), (op.dense(F64) @ x.double()).to(dtype), rtol=1e-2, atol=1e-2)
    else:
        with pytest.raises(OptionError, match="fractional weights"):
            Segment(torch.arange(6) // 2, 3).apply(x)


def test_half_precision_sums_in_float32():
    x = torch.ones(4096, 1, dtype=torch.bfloat16)  # bfloat16 counts to 256 only
    pool = torch.zeros(4096, dtype=torch.long)
    assert Segment(pool, 1, reduction="sum").apply(x).item() == 4096
    assert Segment(pool, 1).apply(x * 2).item() == 2
    assert Segment(pool, 1).apply(torch.full((4096, 1), 60000).half()).item() == 60000  # the sum alone would overflow
    x = noise(999, 50).bfloat16()
    for op in (Segment(torch.arange(999) // 3, 333), Dense(noise(9, 999)), Sparse(noise(9, 999).to_sparse())):
        assert torch.equal(op.apply(x), op.apply(x.float()).bfloat16())  # as in float32, rounded once at the end


def test_what_goes_nowhere_cannot_poison():
    x = torch.tensor([[1.0], [math.nan], [2.0]])
    assert Segment(torch.tensor([0, -1, 0]), 1).apply(x).tolist() == [[1.5]]
    first = x.flip(0)[[1, 0, 2]]  # an invalid row is read from token 0
    assert Select(torch.tensor([1, 1]), 3, torch.tensor([False, True])).apply(first).tolist() == [[0], [2]]
    assert Scatter(torch.tensor([0, 0, 0]), 1, torch.tensor([True, False, True])).apply(x).tolist() == [[3]]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients(batch):
    x = noise(2, 4, 2).requires_grad_()
    w = (noise(*batch, 4).abs() + 0.5).requires_grad_()
    matrix = noise(*batch, 3, 4).requires_grad_()
    index = torch.tensor([2, 0, 2, 1]).expand(*batch, 4).clone()
    valid = torch.tensor([True, True, True, False]).expand(*batch, 4)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: Select(index, 4, valid, w).apply(x), (x, w))
    assert check(lambda x, w: Scatter(index, 3, valid, w).apply(x), (x, w))
    assert check(lambda x: Permute(torch.tensor([2, 0, 3, 1])).apply(x), (x,))
    for reduction in ("mean", "sum"):
        assert check(lambda x, w, r=reduction: Segment(index - 1, 2, w, r).apply(x), (x, w))
        assert check(lambda x, w, r=reduction: Segment(index - 1, 2, w, r).T.apply(x[:, :2]), (x, w))
    assert check(lambda x, a: Dense(a).apply(x), (x, matrix))
    assert check(lambda x, w: (Dense(matrix.detach()) @ Segment(index, 4, w)).apply(x), (x, w))
    places = torch.tensor([[0, 2, 2, 1], [3, 0, 1, 1]])
    values = noise(4).requires_grad_()
    assert check(
        lambda x, v: Sparse(torch.sparse_coo_tensor(places, v, (3, 4), check_invariants=True)).apply(x), (x, values)
    )


def test_a_map_with_learned_weights_can_be_used_step_after_step():
    w = torch.ones(4, requires_grad=True)
    pool = Segment(torch.tensor([0, 0, 1, 1]), 2, w)
    grads = [torch.autograd.grad(pool.apply(torch.arange(4.0)[:, None]).square().sum(), w)[0] for _ in range(2)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_batch_indexing_and_moving():
    op, matrix = make("segment", 6, 5, 3, (2, 3), True)
    close(op[1].dense(F64), matrix[1])
    close(op[1, 2].dense(F64), matrix[1, 2])
    close(op[:, None].dense(F64), matrix[:, None])
    close(op[torch.tensor([1, 1, 0])].dense(F64), matrix[[1, 1, 0]])  # as beam search repeats rows
    nested = Dense(noise(2, 3)) @ (make("select", 1, 3, 3, (3,), True)[0] @ op)
    close(nested[1].dense(F64), nested.dense(F64)[1])
    close(nested[:, 2].dense(F64), nested.dense(F64)[:, 2])
    assert op.to(dtype=torch.float32).weights.dtype == torch.float32 and op.to("cpu").assign.dtype == torch.int64
    with pytest.raises(OptionError, match="only batch dims"):
        op[0, 0, 0]


def test_identity_and_what_a_map_says_of_itself():
    one = TokenMap.identity(4)
    assert one.is_identity and isinstance(one, Permute)
    assert (one @ one).is_identity and Compose(one, one).is_identity
    assert Select(torch.arange(4), 4).is_identity and Segment(torch.arange(4), 4).is_identity
    assert Scatter(torch.arange(4), 4).is_identity and Dense(torch.eye(4)).is_identity
    assert not Permute(torch.tensor([1, 0])).is_identity and not Select(torch.arange(3), 4).is_identity
    assert not Select(torch.arange(2), 2, torch.tensor([True, False])).is_identity
    keep = Select(torch.zeros(2, 8, 3, dtype=torch.long), 12)
    assert repr(keep) == "Select(3 of 12 tokens, batch (2, 8))"
    assert repr(Segment(torch.zeros(6).long(), 2) @ Select(torch.arange(6), 9)) == (
        "(Segment(mean of 6 tokens in 2 groups) @ Select(6 of 9 tokens))"
    )


def test_cost_counts_one_column():
    select, pool = Select(torch.arange(6), 9), Segment(torch.arange(6) // 3, 2)
    assert select.cost() == Cost(flops=0, bytes=2 * 6 * 4)
    assert pool.cost(itemsize=2) == Cost(flops=12, bytes=(6 + 2) * 2)
    assert Dense(torch.ones(5, 2, 3)).cost() == Cost(flops=60, bytes=100)
    assert Sparse(torch.eye(3).to_sparse()).cost() == Cost(flops=6, bytes=24)
    assert (pool @ select).cost() == pool.cost() + select.cost()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_takes_csr_and_uncoalesced_coo():
    matrix = torch.tensor([[0.0, 2, 0], [0, 0, 0], [1, 0, 3]])
    twice = torch.sparse_coo_tensor([[0, 0, 2, 2], [1, 1, 0, 2]], [1.0, 1, 1, 3], (3, 3), check_invariants=False)
    for given_ in (matrix.to_sparse_csr(), twice):
        assert torch.equal(Sparse(given_).dense(), matrix)
    stored_zero = Sparse(torch.sparse_coo_tensor([[0, 0], [0, 2]], [0.0, 1], (1, 3), check_invariants=False))
    assert stored_zero.sizes().tolist() == [1] and stored_zero.positions(torch.arange(3), "first").tolist() == [2]


def test_empty_axes():
    assert Select(torch.zeros(2, 0).long(), 5).apply(torch.ones(2, 5, 3)).shape == (2, 0, 3)
    assert Segment(torch.full((4,), -1), 0).apply(torch.ones(2, 4, 3)).shape == (2, 0, 3)
    assert Segment(torch.zeros(0).long(), 2).apply(torch.ones(0, 3)).tolist() == [[0, 0, 0]] * 2
    assert Sparse(torch.zeros(2, 3).to_sparse()).apply(torch.ones(5, 3, 1)).shape == (5, 2, 1)
    assert TokenMap.identity(0).apply(torch.ones(0, 3)).shape == (0, 3)
    assert Segment(torch.zeros(4).long(), 1).apply(torch.ones(4, 0)).shape == (1, 0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Select(torch.tensor([0, 5]), 5), r"option index='0..5': expected entries from 0 to 4"),
        (lambda: Select(torch.tensor([-1, 2]), 5), r"index='-1..2'"),
        (lambda: Select(torch.tensor([0.0]), 5), r"an int64 tensor"),
        (lambda: Select(torch.tensor([0], dtype=torch.int32), 5), r"torch.int32.*an int64 tensor"),
        (lambda: Select(torch.tensor([0]), 5, torch.tensor([1])), r"valid=torch.int64: expected a bool tensor"),
        (lambda: Select(torch.tensor([0]), 5, torch.ones(2).bool()), r"valid=\(2,\): expected \(\*batch, 1\)"),
        (lambda: Select(torch.tensor([0]), 0), r"num_tokens=0: expected at least 1"),
        (lambda: Permute(torch.tensor([0, 0, 1])), r"each of 0..2 once"),
        (lambda: Scatter(torch.tensor([3]), 3), r"index='3..3'"),
        (lambda: Segment(torch.tensor([0, 2]), 2), r"assign='0..2': expected entries from -1 to 1"),
        (lambda: Segment(torch.tensor([0]), 1, reduction="max"), r"reduction='max': expected mean or sum"),
        (lambda: Segment(torch.zeros(2, 3).long(), 1, torch.ones(4, 3)), r"a batch that broadcasts"),
        (lambda: Dense(torch.ones(3)), r"a dense tensor"),
        (lambda: Sparse(torch.ones(3, 3)), r"a 2-D sparse COO or CSR tensor"),
        (lambda: TokenMap.identity(3).apply(torch.ones(4, 2)), r"x=\(4, 2\): expected 3 tokens on dim 0"),
        (lambda: TokenMap.identity(3).apply(torch.ones(3, 2), dim=2), r"dim=2: expected a dim of x"),
        (lambda: Dense(torch.ones(2, 3, 3)).apply(torch.ones(4, 3, 1)), r"broadcast with the map's batch \(2,\)"),
        (lambda: TokenMap.identity(3) @ TokenMap.identity(2), r"a map that writes 3 tokens"),
        (lambda: TokenMap.identity(3).positions(torch.arange(3), "last"), r"policy='last'"),
        (lambda: TokenMap.identity(3).positions(torch.arange(2)), r"p=\(2,\)"),
        (lambda: TokenMap.identity(3).mask(torch.ones(3)), r"mask=torch.float32: expected a bool tensor"),
    ],
)
def test_errors_are_one_clear_line(call, text):
    with pytest.raises(OptionError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_maps_are_frozen():
    with pytest.raises(AttributeError):
        TokenMap.identity(3).num_tokens = 4
