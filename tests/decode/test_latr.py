"""LATR: its measures against the obvious definitions, the tree against a slow one, and each rule of the paper."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.decoding import Decoding
from tokenary.core.errors import OptionError, RecipeError, UnsupportedModelError
from tokenary.core.laws import check_class
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.core.tree import TokenTree
from tokenary.decode.latr import (
    ETA_COUNTDOWN,
    ETA_MATH,
    LATR,
    edit_distance,
    eta_at,
    forks,
    rouge_l,
    suffix_match,
    within,
)
from tokenary.decode.latr.likeness import is_word
from tokenary.decode.latr.rollouts import Group
from tokenary.hf.strategy import Task
from tokenary.hf.target import attached
from tokenary.memory import Keyformer, RecentTokens
from tokenary.models.tiny import tiny_lm
from tokenary.run import Generation, generate, load
from tokenary.strategy_laws import STRATEGY_LAWS

LISTS = st.lists(st.integers(0, 3), min_size=1, max_size=8)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
EAGER = {"tau_abs": 0.05, "tau_rel": 0.6, "ages": "3/5"}  # forks often on a toy net


def run(method, prompts=PROMPTS, new=16, sampler=Sampler(temperature=1.0, seed=1), lm=None, **more):  # noqa: B008
    lm = lm or tiny_lm(vocab=13)
    loop = method.loop(Task(lm.model, None, prompts, sampler, new, **more))
    with attached(lm.model):
        emissions = [emission for made in loop for emission in made]
    return loop, emissions


# ----------------------------------------------------------------------------------------------- how alike two are


def slow_edit_distance(a, b):
    @functools.cache
    def go(i, j):
        if not i or not j:
            return i + j
        return min(go(i - 1, j) + 1, go(i, j - 1) + 1, go(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return go(len(a), len(b))


def contains(text, piece):
    return any(text[at : at + len(piece)] == piece for at in range(len(text) - len(piece) + 1))


def is_subsequence(piece, text):
    rest = iter(text)
    return all(token in rest for token in piece)


@given(LISTS, LISTS)
def test_edit_distance(a, b):
    assert edit_distance(a, b) == slow_edit_distance(a, b)


@given(LISTS, LISTS)
def test_suffix_match(a, b):
    b = (b * 8)[: len(a)]
    longest = max(n for n in range(len(a) + 1) if contains(b, a[len(a) - n :]) or contains(a, b[len(b) - n :]))
    assert suffix_match(a, b) == longest / len(a)


@given(LISTS, LISTS)
def test_rouge_l(a, b):
    pieces = [[x for at, x in enumerate(a) if bits >> at & 1] for bits in range(1 << len(a))]
    longest = max(len(piece) for piece in pieces if is_subsequence(piece, b))
    recall, precision = longest / len(b), longest / len(a)
    assert rouge_l(a, b) == pytest.approx(2 * recall * precision / (recall + precision) if longest else 0)


def test_rejoining_is_judged_by_each_measure():
    a, b = [1, 2, 3, 4, 5, 6, 7, 8], [9, 2, 3, 4, 5, 6, 7, 8]  # one replacement; a common suffix of 7; ROUGE-L 7/8
    off = {"tau_ed": 0, "tau_suf": 1, "tau_rouge": 1}
    assert not LATR(**off).rejoins(a, b)
    assert LATR(**{**off, "tau_ed": 0.126}).rejoins(a, b)
    assert not LATR(**{**off, "tau_ed": 0.125}).rejoins(a, b)
    assert LATR(**{**off, "tau_suf": 0.87}).rejoins(a, b)
    assert not LATR(**{**off, "tau_suf": 0.875}).rejoins(a, b)
    assert LATR(**{**off, "tau_rouge": 0.87}).rejoins(a, b)
    assert not LATR(**{**off, "tau_rouge": 0.875}).rejoins(a, b)


# ------------------------------------------------------------------------------------------------ forks and their room


def test_forks_are_near_ties_of_likely_tokens():
    probabilities = torch.tensor([[0.45, 0.35, 0.1], [0.6, 0.3, 0.05], [0.3, 0.24, 0.22], [0.4, 0.3, 0.29]])
    assert forks(probabilities, 0.25, 0.15).tolist() == [[True, False], [False, False], [False, False], [True, True]]


def test_room_goes_to_second_candidates_first():
    pairs, likely = [(0, 1), (0, 2), (1, 1), (2, 1)], [0.2, 0.19, 0.3, 0.25]
    assert within(2, pairs, likely) == [(1, 1), (2, 1)]
    assert within(2, pairs, likely, by_row=True) == [(0, 1), (1, 1)]
    assert within(4, pairs, likely)[-1] == (0, 2)
    assert within(0, pairs, likely) == []


def test_published_schedules():
    assert [eta_at(step, ETA_COUNTDOWN) for step in (0, 9, 10, 79, 200, 500)] == [1, 1, 0.75, 0.5, 0, 0]
    assert [eta_at(step, ETA_MATH) for step in (99, 100, 300)] == [1, 0.75, 0.25]


def test_words():
    assert is_word(" tree")
    assert not any(map(is_word, (" the", "\n", ".", "?!", "", "The")))


# --------------------------------------------------------------------------- the tree, against a slow formulation


def slow_tree(lm, prompt, method, steps):
    """Grow one tree by whole forward passes of every branch, with dictionaries instead of rows of a cache."""
    branches = [{"ids": list(prompt), "parent": None, "birth": 0}]
    pruned = 0
    for step in range(1, steps + 1):
        with torch.no_grad():
            best = [lm.model(torch.tensor([b["ids"]])).logits[0, -1].softmax(-1).topk(2) for b in branches]
        wanted = []
        for branch, (values, ids) in zip(branches, best, strict=True):
            first, second = values.tolist()
            if second > method.tau_abs and first - second < method.tau_rel:
                wanted.append((-second, branch, int(ids[1])))
        room = method.group - len(branches)
        wanted = sorted(wanted, key=lambda fork: fork[0])[:room]
        born = [{"ids": [*b["ids"], token], "parent": b, "birth": step - 1} for _, b, token in wanted]
        for branch, (_, ids) in zip(branches, best, strict=True):
            branch["ids"].append(int(ids[0]))
        branches += born
        gone = []
        for branch in branches:
            age = step - branch["birth"]
            if branch["parent"] and age in method.steps:
                a, b = branch["ids"][-age:], branch["parent"]["ids"][-age:]
                if slow_edit_distance(tuple(a), tuple(b)) / age < method.tau_ed:
                    gone.append(branch)
        for _ in branches:
            gone += [b for b in branches if any(b["parent"] is g for g in gone) and not any(b is g for g in gone)]
        pruned += len(gone)
        branches = [b for b in branches if not any(b is g for g in gone)]
    return sorted(b["ids"][len(prompt) :] for b in branches), pruned


@pytest.mark.parametrize(("seed", "tau_ed"), [(0, 0.7), (1, 0.9), (2, 1.0)])
def test_the_tree_is_that_of_the_slow_formulation(seed, tau_ed):
    """Completed greedily, a tree that was left goes on as one that may still grow but has no room."""
    lm = tiny_lm(seed, vocab=13)
    method = LATR(group=6, **EAGER, tau_ed=tau_ed, full=1.0)
    prunes = 0
    for prompt in PROMPTS:
        expected = {steps: slow_tree(lm, prompt, method, steps) for steps in (2, 4, 7, 16)}
        prunes += expected[16][1]
        loop = method.loop(Task(lm.model, None, [prompt], Sampler(), 17))
        with attached(lm.model):
            for steps, _ in enumerate(loop, start=1):
                if steps in expected:
                    found = sorted(text.new_ids for text in loop.branches[0] if text.finish is None)
                    assert found == expected[steps][0]
    assert prunes


def test_pruned_branches_are_emitted_and_their_places_taken_again():
    loop, emissions = run(LATR(group=4, **EAGER, tau_ed=1.0), new=30, lm=tiny_lm(1, vocab=13))
    pruned = [(e.row, e.branch) for e in emissions if e.finish == "pruned"]
    copies = [(e.row, e.branch) for e in emissions if e.copy_of is not None]
    assert pruned
    assert any(copies.count(key) > 1 for key in pruned)
    for row in loop.branches:
        assert len(row) == 4
        assert {text.finish for text in row} == {"length"}


def test_descendants_go_with_a_pruned_branch():
    branches: list[Decoding] = []
    group = Group(Decoding(0, [1, 2], 2), branches, capacity=5, samples=0)
    root = group.leaves[0]
    root.text.ids.append(3)
    child = group.fork(root)
    grandchild, other = group.fork(child), group.fork(root)
    grandchild.text.finish = "stop"
    assert group.prune(child) == [child, grandchild]
    assert [text.finish for text in branches] == [None, "pruned", "pruned", None]
    assert group.leaves == [root, other] and root.children == [other]
    assert group.fork(other).slot == 1  # the free place; its text is a copy of the other's
    assert len(branches) == 4 and branches[1].finish is None


def test_a_short_tree_is_filled_with_copies_of_its_root():
    greedy = run(LATR(group=1), sampler=Sampler())[0]
    loop, emissions = run(LATR(tau_abs=1.0, group=5), sampler=Sampler())
    for row in range(len(PROMPTS)):
        assert [text.new_ids for text in loop.branches[row]] == [greedy.branches[row][0].new_ids] * 5
    assert len([e for e in emissions if e.copy_of == 0]) == 4 * len(PROMPTS)
    loop, _ = run(LATR(tau_abs=1.0, group=5, tree_steps=6))  # left early: the copies are completed by sampling
    for row in loop.branches:
        assert len({tuple(text.new_ids[:6]) for text in row}) == 1
        assert len({tuple(text.new_ids) for text in row}) > 1


def test_a_tree_is_left_when_it_is_full_and_compared():
    method = LATR(group=8, full=0.75, decay=0.5, ages="3/5")
    assert not method.leaves_tree(0.0, 5, 9)
    assert method.leaves_tree(0.0, 6, 5)
    assert not method.leaves_tree(0.0, 8, 4)
    assert method.leaves_tree(1.0, 2, 5)
    assert LATR().leaves_tree(0, 8, 50) and not LATR().leaves_tree(0, 7, 50)


def test_the_rest_of_a_group_are_independent_samples():
    mixed, _ = run(LATR(group=8, eta=0.5))
    samples, _ = run(LATR(group=8, eta=0))
    for row in range(len(PROMPTS)):
        assert [t.new_ids for t in mixed.branches[row][1:5]] == [t.new_ids for t in samples.branches[row][1:5]]
        assert len({tuple(text.new_ids) for text in samples.branches[row]}) == 8


def test_samples_follow_the_model():
    lm = tiny_lm(vocab=7, layers=1)
    loop, _ = run(LATR(group=256, eta=0), [[1, 2, 3]] * 8, 1, Sampler(temperature=1.5), lm)
    drawn = [text.new_ids[0] for row in loop.branches for text in row]
    with torch.no_grad():
        expected = 2048 * (lm.model(torch.tensor([[1, 2, 3]])).logits[0, -1] / 1.5).softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=7)
    assert float(((counts - expected) ** 2 / expected).sum()) < 30  # p < 1e-4 at 6 degrees


@pytest.mark.parametrize("sample", ["none", "full", "always"])
def test_when_a_growing_tree_is_sampled(sample):
    """Without a fork a row takes the argmax (none), samples (always), or samples once there is no room (full)."""

    def roots(sampler=Sampler(temperature=1.0, seed=1), **options):  # noqa: B008
        return [row[0].new_ids for row in run(LATR(tau_abs=1.0, **options), sampler=sampler)[0].branches]

    greedy = roots(Sampler(), group=1)
    assert (roots(group=4, sample=sample) == greedy) == (sample != "always")
    assert (roots(group=1, sample=sample) == greedy) == (sample == "none")


def test_weights_are_log_probabilities_and_the_answer_is_the_likeliest():
    lm = tiny_lm(vocab=13)
    loop, _ = run(LATR(group=5, **EAGER), lm=lm)
    for row, prompt in enumerate(PROMPTS):
        means = []
        for text in loop.branches[row]:
            with torch.no_grad():
                log_probs = lm.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
            new = range(len(prompt), len(text.ids))
            assert text.log_weight == pytest.approx(sum(float(log_probs[at - 1, text.ids[at]]) for at in new), abs=1e-3)
            means.append(text.log_weight / len(text.new_ids))
            assert len(text.trace.from_draft) == len(text.new_ids)
        best = loop.branches[row][means.index(max(means))]
        answer = loop.sequences[row]
        assert (answer.new_ids, answer.log_weight) == (best.new_ids, best.log_weight)
        assert answer.trace.tokens_per_pass == 1


def test_branches_that_ended_are_not_compared():
    """With every token an end token, a fork ends at birth, and no age is reached."""
    _, emissions = run(LATR(group=4, **EAGER, tau_ed=1.0), end_tokens=range(13))
    assert {e.finish for e in emissions} == {"stop"}


@pytest.mark.parametrize("options", [{}, EAGER | {"tau_ed": 0.9}, {"eta": 0.5, "random_forks": 0.3, "ages": "2/4"}])
def test_the_laws_hold(options):
    report = check_class(LATR, STRATEGY_LAWS, **options)
    assert report.ok, str(report)


@pytest.mark.parametrize("policy", [Keyformer(keep=8, interval=4), RecentTokens(keep=6, interval=2)])
def test_forks_copy_an_evicting_cache(policy):
    """A branch over a reduced cache is what one gets by forcing its tokens alone through the same policy."""
    lm = tiny_lm(vocab=13)
    task = Task(lm.model, None, PROMPTS, Sampler(), 14, policies=lambda: policy.attach(lm.model.config, torch.float32))
    loop = LATR(group=4, **EAGER, tau_ed=0).loop(task)
    with attached(lm.model):
        for _ in loop:
            pass
        for row in loop.branches:
            assert len({tuple(text.new_ids) for text in row}) > 1
            for text in row:
                target, weight = task.target(), 0.0
                logits = target.prefill([text.ids[: text.n_prompt]])
                for token in text.new_ids:
                    weight += float(logits.log_softmax(-1)[0, token])
                    logits = target.score(TokenTree.roots([token]))[:, 0]
                    target.commit([[0]])
                assert text.log_weight == pytest.approx(weight, abs=1e-3)


# ------------------------------------------------------------------------------------------------- in the package


def test_wrong_options_are_refused():
    for options in ({"ages": "0"}, {"ages": "20,30"}, {"tau_abs": 1.5}, {"group": 0}, {"full": 0.5, "decay": 0.6}):
        with pytest.raises(OptionError):
            LATR(**options)
    with pytest.raises(RecipeError, match="do not compose"):
        Recipe.parse("latr + token-recycling")
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        LATR(words=True).prepare(tiny_lm().model, None)


def test_on_a_trained_model_with_text_and_streaming():
    lm = load("stories260k")
    pieces: dict[tuple[int, int | None], str] = {}
    recipe = "latr:group=4,ages=4/8,tau_abs=0.1,tau_rel=0.5,tree_steps=20,words=true"
    options = {"max_new_tokens": 32, "temperature": 1.0, "raw": True}
    outputs = generate(lm, ["Once upon a time", "The dog"], recipe, **options)
    assert [len(output.branches) for output in outputs] == [4, 4]
    assert all(len({branch.text for branch in output.branches}) > 1 for output in outputs)
    for output in outputs:  # what branches share counts once
        ids = [branch.token_ids for branch in output.branches]
        assert output.written == len({tuple(b[:n]) for b in ids for n in range(1, len(b) + 1)}) < sum(map(len, ids))
    run = Generation(lm, ["Once upon a time", "The dog"], recipe, 32, Sampler(temperature=1.0), raw=True)
    for piece in run:
        key = piece.row, piece.branch
        if piece.copy_of is not None:
            pieces[key] = pieces[piece.row, piece.copy_of]  # copies come before what their originals wrote in this pass
        pieces[key] = pieces.get(key, "") + piece.text
    assert [output.text for output in run.outputs] == [output.text for output in outputs]
    for row, output in enumerate(outputs):
        assert pieces[row, None] == output.text
        assert [pieces[row, branch] for branch in range(4)] == [branch.text for branch in output.branches]
    stopped = generate(lm, ["Once upon a time"], recipe, stop=["."], **options)
    assert all("." not in branch.text.rstrip()[:-1].rstrip(".") for branch in stopped[0].branches)
