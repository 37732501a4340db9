"""Group Think against the slow formulation: one plain pass over the whole text with an explicit 4-D mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenary
from tokenary.core.errors import InputError, OptionError, RecipeError, UnsupportedModelError
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Loop
from tokenary.decode.group_think import MERGE, SYSTEM, GroupThink, encode, header, sees
from tokenary.hf.strategy import Task
from tokenary.hf.target import Target, attached
from tokenary.models import tiny_lm

PROMPTS = [[5, 6, 7, 8, 9, 3, 1], [1, 2, 3], [10, 11] * 5]
SAMPLING = Sampler(temperature=0.8, seed=3)


def write(lm, prompts, new=12, sampler=SAMPLING, end=(), stops=None, **options):
    """Run to the end; return the loop and what it emitted."""
    with attached(lm.model):
        loop = GroupThink(**options).loop(Task(lm.model, lm.tokenizer, prompts, sampler, new, end, stops))
        return loop, [emission for emissions in loop for emission in emissions]


def threads(loop):
    return [[branch.new_ids for branch in row] for row in loop.branches]


def plain(lm, prompts, new, sampler=Sampler(), end=()):  # noqa: B008 (frozen)
    with attached(lm.model):
        loop = Loop(Target(lm.model), prompts, sampler, new, end)
        list(loop)
    return [sequence.new_ids for sequence in loop.sequences]


@dataclass
class Fed:
    """What the loop fed for one prompt, in order, and the logits that came back."""

    ids: list
    positions: list
    logits: list


@pytest.fixture
def fed(monkeypatch):
    """Records every pass of a single prompt."""
    seen, forward = Fed([], [], []), Target.forward

    def recording(self, ids, positions, *masks):
        logits = forward(self, ids, positions, *masks)
        assert len(ids) == 1
        seen.ids += ids[0].tolist()
        seen.positions += positions[0].tolist()
        seen.logits += list(logits[0])
        return logits

    monkeypatch.setattr(Target, "forward", recording)
    return seen


def recompute(lm, prompt, fed, budget, thinkers, headers, mode, peers, delay):
    """Logits of all fed tokens from one pass of the plain model, with a mask built token by token."""
    start = len(prompt)

    def place(position):
        thread, at = divmod(position - start, budget)
        if thread >= thinkers:  # the merged answer, which may be longer than a slot
            return thinkers, position - start - thinkers * budget, 10**6
        return thread, at, at - headers[thread]

    def may_see(query, key):
        if key < start:
            return True
        (thread, at, step), (other, other_at, other_step) = place(query), place(key)
        if thread == other:
            return other_at <= at
        if thread == thinkers:
            return True
        if other == thinkers or peers == "none":
            return False
        if mode == "step":
            return other_step + delay <= step
        return (other_step + delay, other) <= (step, thread)

    total = start + len(fed.ids)
    mask = torch.full((total, total), float("-inf"))
    mask[:start, :start] = torch.zeros(start, start).masked_fill(torch.ones(start, start).triu(1) > 0, float("-inf"))
    for row, query in enumerate(fed.positions):
        mask[start + row, :start] = 0
        for column, key in enumerate(fed.positions):
            if may_see(query, key):
                mask[start + row, start + column] = 0
    with torch.inference_mode():
        return lm.model(
            torch.tensor([list(prompt) + fed.ids]),
            position_ids=torch.tensor([list(range(start)) + fed.positions]),
            attention_mask=mask[None, None],
        ).logits[0, start:]


# ------------------------------------------------------------------------------------------- the mask itself


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 9)), min_size=1, max_size=12), st.integers(0, 5))
def test_visibility_says_what_it_says(tokens, lag):
    found = sees(*np.array(tokens).T, *np.array(tokens).T, lag)
    for q, (thread, tick) in enumerate(tokens):
        for k, (other, then) in enumerate(tokens):
            assert found[q, k] == (then <= tick - lag or (thread == other and then <= tick))


# ---------------------------------------------------------------------------------- one thinker, no peers


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("mode", ["step", "interleaved"])
@pytest.mark.parametrize("sampler", [Sampler(), SAMPLING], ids=["greedy", "sampled"])
def test_one_thinker_is_ordinary_decoding(family, mode, sampler):
    lm = tiny_lm(family=family)
    loop, _ = write(lm, PROMPTS, 40, sampler, thinkers=1, mode=mode)
    assert [sequence.new_ids for sequence in loop.sequences] == plain(lm, PROMPTS, 40, sampler)


def test_one_thinker_ends_where_ordinary_decoding_ends(stories):
    prompts = stories.encode(["Once upon a time", "Tom and Ann"])
    end = [plain(stories, prompts[:1], 40)[0][17]]
    loop, _ = write(stories, prompts, 40, Sampler(), end, thinkers=1)
    assert [sequence.new_ids for sequence in loop.sequences] == plain(stories, prompts, 40, end=end)
    assert loop.sequences[0].finish == "stop" and len(loop.sequences[0].new_ids) <= 18


@pytest.mark.parametrize("mode", ["step", "interleaved"])
def test_without_peers_each_thread_is_decoded_alone_in_its_slot(stories, mode):
    prompt, new, n = stories.encode(["Lily had a red ball. "])[0], 24, 3
    loop, _ = write(stories, [prompt], new, Sampler(), thinkers=n, mode=mode, peers="none")
    for thinker, found in enumerate(threads(loop)[0]):
        ids = prompt + encode(stories.tokenizer, header(thinker))
        places = [*range(len(prompt)), *range(len(prompt) + thinker * new, len(prompt) + (thinker + 1) * new)]
        with torch.inference_mode():
            while len(ids) < len(prompt) + new:  # a full pass for every token
                out = stories.model(torch.tensor([ids]), position_ids=torch.tensor([places[: len(ids)]]))
                ids.append(int(out.logits[0, -1].argmax()))
        assert found == ids[len(prompt) :]


# --------------------------------------------------------------------------- incremental against full recompute

CASES = [
    {"mode": mode, "peers": peers, "delay": delay}
    for mode in ("step", "interleaved")
    for peers, delay in (("all", 0), ("all", 2), ("none", 0))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("aggregate", ["none", "merge"])
def test_incremental_logits_equal_a_full_recompute(stories, fed, case, aggregate):
    prompt, new, n = stories.encode(["Once upon a time there was a cat. "])[0], 22, 3
    loop, _ = write(stories, [prompt], new, thinkers=n, aggregate=aggregate, **case)
    headers = [len(encode(stories.tokenizer, header(thinker))) for thinker in range(n)]
    expected = recompute(stories, prompt, fed, new, n, headers, **case)
    if aggregate == "none":  # the last token of a thread is read only if others still write
        assert n * (new - 1) <= len(fed.ids) < n * new
    else:
        assert len(fed.ids) == n * new + len(encode(stories.tokenizer, MERGE)) + new - 1
    assert (torch.stack(fed.logits) - expected).abs().max() < 1e-4
    assert len(set(map(tuple, threads(loop)[0]))) == n


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_it_holds_without_headers_and_with_frozen_thinkers(fed, family, case):
    lm = tiny_lm(family=family, seed=2)
    first, _ = write(lm, PROMPTS[:1], 16, thinkers=4, **case)
    end = {threads(first)[0][1][4], threads(first)[0][2][9]}
    fed.ids, fed.positions, fed.logits = [], [], []
    loop, _ = write(lm, PROMPTS[:1], 16, end=end, thinkers=4, **case)
    expected = recompute(lm, PROMPTS[0], fed, 16, 4, [0] * 4, **case)
    assert (torch.stack(fed.logits) - expected).abs().max() < 1e-4
    ended = [thread for thread in threads(loop)[0] if thread[-1] in end]
    assert ended and not end & set(fed.ids)  # an end token is no part of what peers read


def test_peers_change_the_text_and_are_seen_at_once(stories):
    """With peers, thread 2's second word depends on what thread 1 wrote first; without them it does not."""
    prompt = stories.encode(["Once upon a time "])
    together, alone = (write(stories, prompt, 30, peers=peers)[0] for peers in ("all", "none"))
    assert threads(together) != threads(alone)
    late, _ = write(stories, prompt, 30, delay=60)  # longer than the slot
    assert threads(late) == threads(alone)


# ------------------------------------------------------------------------------- batches, streams, seeds, bytes


@pytest.mark.parametrize("options", [*CASES, {"aggregate": "merge"}, {"until": "first"}], ids=str)
@pytest.mark.parametrize("sampler", [Sampler(), SAMPLING], ids=["greedy", "sampled"])
def test_a_batch_is_its_prompts(stories, options, sampler):
    prompts = stories.encode(["Once upon a time ", "Tom", "The dog and the very big bear went to the park. "])
    end = [threads(write(stories, prompts, 24, sampler, **options)[0])[1][2][16]]
    together, emissions = write(stories, prompts, 24, sampler, end, **options)
    for row, prompt in enumerate(prompts):
        own = Sampler(sampler.temperature, seed=sampler.seed, first_row=row)
        alone, parts = write(stories, [prompt], 24, own, end, **options)
        assert threads(alone)[0] == threads(together)[row]
        assert alone.sequences[0].new_ids == together.sequences[row].new_ids
        assert [e.token_ids for e in parts] == [e.token_ids for e in emissions if e.row == row]


@pytest.mark.parametrize("options", [{}, {"mode": "interleaved"}, {"aggregate": "merge"}, {"until": "first"}], ids=str)
def test_emissions_make_the_branches_and_the_answer(stories, options):
    prompts = stories.encode(["Once upon a time ", "Tom"])
    end = [threads(write(stories, prompts, 24)[0])[0][1][15]]
    loop, emissions = write(stories, prompts, 24, end=end, **options)
    for row, branches in enumerate(loop.branches):
        for branch, expected in [*enumerate(branches), (None, loop.sequences[row])]:
            mine = [e for e in emissions if (e.row, e.branch) == (row, branch)]
            assert [token for e in mine for token in e.token_ids] == expected.new_ids
            assert [e.finish for e in mine if e.finish] == [expected.finish] and mine[-1].finish
            assert all(len(e.token_ids) == len(e.from_draft) for e in mine)


def test_texts_pieces_and_cost_through_generate(stories):
    pieces = []
    (out,) = tokenary.generate(
        stories,
        "Once upon a time",
        "group-think:thinkers=3",
        max_new_tokens=30,
        temperature=0.7,
        on_piece=pieces.append,
    )
    assert out.token_ids == [token for branch in out.branches for token in branch.token_ids]
    assert len(out.branches) == 3 and all(f"Thinker {number}:" in out.text for number in (1, 2, 3))
    for number, branch in enumerate(out.branches):
        assert branch.text.strip().startswith(f"Thinker {number + 1}:")
        assert "".join(piece.text for piece in pieces if piece.branch == number) == branch.text
    assert len(out.trace.from_draft) == len(out.token_ids)
    assert out.trace.passes <= 30 - 8 + 1  # time is counted in steps, not in tokens
    headers = [len(encode(stories.tokenizer, header(number))) for number in range(3)]
    assert out.written == len(out.token_ids) - sum(headers) == 3 * 30 - sum(headers)  # headers are not the model's
    assert out.trace.tokens_per_pass == (out.written - 1) / out.trace.passes <= 3


def test_same_seed_same_text_and_thinkers_draw_alone():
    lm = tiny_lm()
    first, again = (write(lm, PROMPTS, 20)[0] for _ in range(2))
    assert threads(first) == threads(again)
    other, _ = write(lm, PROMPTS, 20, Sampler(0.8, seed=4))
    assert threads(first) != threads(other)
    apart, _ = write(lm, PROMPTS[:1], 20, peers="none")
    assert len(set(map(tuple, threads(apart)[0]))) == 4


@pytest.mark.parametrize("mode", ["step", "interleaved"])
def test_the_cache_holds_the_prompt_once(mode):
    lm, prompt, new, n = tiny_lm(), list(range(60)), 33, 4
    loop, _ = write(lm, [prompt], new, thinkers=n, mode=mode)
    layers = loop.target.cache.token_layers
    assert layers[0].held == [len(prompt) + n * (new - 1)]  # a thread's last token is never read
    per_token = loop.target.nbytes / layers[0].storage.shape[3]
    assert (
        loop.peak_bytes == loop.target.nbytes <= per_token * (len(prompt) + n * new + 32)
    )  # slots come in pieces of 32
    assert loop.peak_bytes < n * plain_bytes(lm, prompt, new)


def plain_bytes(lm, prompt, new):
    with attached(lm.model):
        loop = Loop(Target(lm.model), [prompt], Sampler(), new)
        list(loop)
    return loop.peak_bytes


def test_a_cancelled_run_leaves_its_threads(stories):
    generation = tokenary.run.Generation(
        stories, ["Once upon a time"], "group-think:thinkers=2", 30, Sampler(), stop=("zzz",)
    )
    for count, _ in enumerate(generation):
        if count == 9:
            break
    (out,) = generation.outputs
    assert out.stats.finish == "cancelled" and not out.token_ids
    assert [branch.finish for branch in out.branches] == ["cancelled"] * 2
    assert all(len(branch.token_ids) > 8 for branch in out.branches)


# --------------------------------------------------------------------------------------------- ends and answers


def test_the_first_that_is_done_ends_all():
    lm = tiny_lm()
    full, _ = write(lm, PROMPTS[:1], 30)
    end = [threads(full)[0][2][11]]
    at = min(thread.index(end[0]) for thread in threads(full)[0] if end[0] in thread)
    loop, _ = write(lm, PROMPTS[:1], 30, end=end, until="first")
    assert [len(thread) for thread in threads(loop)[0]] == [at + 1] * 4
    assert {branch.finish for branch in loop.branches[0]} == {"stop", "pruned"}
    assert loop.sequences[0].finish == "stop"


def test_a_stop_text_ends_one_thinker_and_is_not_found_in_a_header(stories):
    prompts = ["Once upon a time"]
    free = tokenary.generate(stories, prompts, "group-think", max_new_tokens=40, temperature=0.7)[0]
    word = free.branches[1].text.split(":", 1)[1].split()[2]
    out = tokenary.generate(stories, prompts, "group-think", max_new_tokens=40, temperature=0.7, stop=[word, "inker"])[
        0
    ]
    assert out.branches[1].finish == "stop" and word in out.branches[1].text[12:]
    assert any(branch.finish == "length" for branch in out.branches)


def test_the_merged_answer_is_greedy_over_all_threads(stories, fed):
    prompt = stories.encode(["Once upon a time "])[0]
    loop, _ = write(stories, [prompt], 20, SAMPLING, thinkers=2, aggregate="merge")
    answer, asked = loop.sequences[0].new_ids, len(encode(stories.tokenizer, MERGE))
    tail = fed.logits[-len(answer) :]
    assert [int(row.argmax()) for row in tail] == answer and len(answer) == 20
    assert fed.positions[-1] == len(prompt) + 2 * 20 + asked + 20 - 2
    other, _ = write(stories, [prompt], 20, Sampler(0.8, seed=9), thinkers=2, aggregate="merge")
    assert other.sequences[0].new_ids != answer  # it read the threads


# ------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_before_any_work(stories):
    for other in ("keyformer:keep=50%", "token-recycling"):
        with pytest.raises(RecipeError, match="do not compose"):
            Recipe.parse(f"group-think + {other}")
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        write(tiny_lm(family="gemma3"), PROMPTS)
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        write(tiny_lm(), PROMPTS, aggregate="merge")
    with pytest.raises(InputError, match="past the context of 512"):
        write(tiny_lm(), [[1] * 33], 120)
    write(tiny_lm(context=53), [[1] * 5], 12)  # exactly full
    with pytest.raises(OptionError, match="header"):
        write(stories, [[5, 6]], 11)
    for wrong in ({"thinkers": 0}, {"mode": "both"}, {"delay": -1}):
        with pytest.raises(OptionError):
            GroupThink(**wrong)


@pytest.mark.real
def test_the_system_text_goes_before_a_chat_and_not_before_plain_text():
    lm = tokenary.load("smollm2", dtype="float32", optimize=False)
    chat, raw = lm.encode(["Name some fruits."])[0], lm.encode(["Fruits: apple,"], raw=True)[0]
    task = Task(lm.model, lm.tokenizer, [chat, raw], Sampler(), 20)
    loop = GroupThink(thinkers=3).loop(task)
    expected = lm.tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM.format(n=3)}, {"role": "user", "content": "Name some fruits."}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert loop.sequences[0].ids == expected and loop.sequences[1].ids == raw
    alone = GroupThink(thinkers=1).loop(task)
    assert alone.sequences[0].ids == chat and alone.branches[0][0].ids == chat


# ------------------------------------------------------------------- contract: one pass over given masks


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_forward_takes_any_positions_and_visibility(family):
    """A ragged batch with gaps in its positions and holes in its past = the plain model with a 4-D mask."""
    lm = tiny_lm(family=family)
    rng = np.random.default_rng(0)
    prompts, width = [[5, 6, 7, 8, 9, 3, 1], [1, 2, 3, 4]], 3
    ids = torch.from_numpy(rng.integers(0, 97, (2, width)))
    positions = torch.tensor([[30, 12, 9], [50, 51, 4]])
    ancestors = torch.tensor([[[1, 1, 0], [0, 1, 1], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 1]]]).bool()
    visible = torch.from_numpy(rng.integers(0, 2, (2, width, 7)) > 0)
    with attached(lm.model):
        target = Target(lm.model)
        target.prefill(prompts)
        found = target.forward(ids, positions, ancestors, visible)
        target.commit([[], []])
        chain = TokenTree.chains([[4, 5], [6, 7]])
        places = torch.tensor([[7, 8], [4, 5]])
        given = target.forward(torch.from_numpy(chain.ids), places)
        target.commit([[], []])
        torch.testing.assert_close(given, target.score(chain))
    for row, prompt in enumerate(prompts):
        held = len(prompt)
        seen = torch.ones(held + width, held + width).tril().bool()
        seen[held:, :held], seen[held:, held:] = visible[row, :, :held], ancestors[row]
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        with torch.inference_mode():
            expected = lm.model(
                torch.tensor([prompt + ids[row].tolist()]),
                position_ids=torch.tensor([[*range(held), *positions[row].tolist()]]),
                attention_mask=mask[None, None],
            ).logits[0, held:]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
