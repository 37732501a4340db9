"""Timing in turns: the order, the sums, equality of outputs, and what Ctrl-C leaves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from tokenary.bench.contender import RecipeContender, Sample
from tokenary.bench.measure import cases_of, logit_gap, measure
from tokenary.bench.measured import Case, Measurement, tokens_per_pass
from tokenary.bench.peers import LlamaCppPeer, TransformersPeer, peers_of
from tokenary.core.errors import InputError, OptionError, RecipeError
from tokenary.core.recipe import Recipe
from tokenary.models import tiny_lm
from tokenary.run import generate

PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3, 1, 2, 3, 1], [10] * 9, [4, 3, 2, 1]]
DRAFTS = ["token-recycling:nodes=6", "prompt-lookup:nodes=4"]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(seed=1)


def greedy(lm, prompt, count):
    """The slow obvious reference: a full forward pass for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Clock:
    """Advances by a second whenever it is read, so that every run takes two seconds, the first token one."""

    def __init__(self):
        self.count = itertools.count()

    def __call__(self):
        return float(next(self.count))


class Scripted:
    """A contender that says what it is told, and notes when it was asked."""

    kind, lossless = "recipe", True

    def __init__(self, name, seconds, log, new=(1, 2, 3, 4), per_pass=((2, 1), (1, 1)), learns=False, stop_at=None):
        self.name, self.seconds, self.log, self.learns, self.stop_at = name, list(seconds), log, learns, stop_at
        self.new, self.per_pass = list(new), list(per_pass)

    def run(self, prompts: Sequence[Sequence[int]]) -> Sample:
        self.log.append((self.name, *(prompt[0] for prompt in prompts)))
        if self.stop_at is not None and len(self.log) > self.stop_at:
            raise KeyboardInterrupt
        count = sum(entry[0] == self.name for entry in self.log)
        seconds = self.seconds[min(count, len(self.seconds)) - 1]
        n = len(prompts)
        return Sample([self.new] * n, [self.per_pass] * n, [[False] * len(self.new)] * n, seconds, 0.5, 1000, 64)

    def forget(self):
        self.log.append((self.name, "forget"))

    def freeze(self):
        self.log.append((self.name, "freeze"))

    def thaw(self):
        self.log.append((self.name, "thaw"))


# ------------------------------------------------------------------------------------------------------- the order


def test_contenders_run_in_turns_on_every_prompt(lm, monkeypatch):
    log = []
    original = RecipeContender.run

    def noted(self, prompts):
        log.append((self.name, prompts[0][0]))
        return original(self, prompts)

    monkeypatch.setattr(RecipeContender, "run", noted)
    draft = DRAFTS[0]
    measure(lm, [draft], PROMPTS[:2], warmup=[PROMPTS[3]], max_new_tokens=3, rounds=3)
    cold = [("plain", 5), (draft, 5), (draft, 1)]
    lessons = [(draft, 4)]
    a_round = [("plain", 5), (draft, 5), ("plain", 1), (draft, 1)]
    assert log == cold + lessons + 3 * a_round


def test_every_round_starts_from_what_the_warmup_taught(lm):
    log = []
    learner = Scripted("learner", [1.0], log, learns=True)
    measure(lm, [], PROMPTS[:1], warmup=[PROMPTS[3]], max_new_tokens=2, rounds=2, peers=[learner])
    assert log == [
        *[("learner", 5), ("learner", "forget"), ("learner", 4), ("learner", "freeze")],
        *[("learner", "thaw"), ("learner", 5), ("learner", "thaw"), ("learner", 5)],
    ]


def test_a_method_never_learns_from_the_prompts_that_are_measured(lm):
    """Rounds are equal pass for pass; without the reset, token recycling would know the text in the second one."""
    found = measure(lm, DRAFTS, PROMPTS, warmup=[], max_new_tokens=24, rounds=3)
    for draft in DRAFTS:
        passes = [[sample.per_pass for sample in done[draft].values()] for done in found.rounds]
        assert passes[0] == passes[1] == passes[2]
        assert passes[0] == [sample.per_pass for sample in found.cold[draft].values()]  # nothing was taught


def test_cold_and_warm_differ_where_the_warmup_teaches(lm):
    found = measure(lm, [DRAFTS[0]], PROMPTS[:1], warmup=PROMPTS[:1], max_new_tokens=24, rounds=1)
    row = found.rows()[1]
    assert row.cold_tokens_per_pass < row.tokens_per_pass  # it was taught the very text: the test must see learning


def test_what_was_learned_before_is_left_as_it_was(lm):
    known = {"draft": object()}
    lm.warm[Recipe.parse(DRAFTS[0])] = known
    try:
        measure(lm, DRAFTS, PROMPTS[:1], warmup=[], max_new_tokens=3, rounds=1)
        assert lm.warm == {Recipe.parse(DRAFTS[0]): known}
    finally:
        lm.warm.clear()


def test_snapshots_are_copies(lm):
    """What was learned is really copied; the read-only options are shared."""
    contender = RecipeContender(lm, Recipe.parse("token-recycling"), 8)
    contender.run([PROMPTS[0]])
    contender.freeze()
    table = contender._frozen["draft"].successors.keys.copy()
    contender.thaw()
    contender.run([PROMPTS[1]])
    assert (contender._frozen["draft"].successors.keys == table).all()
    assert (contender.methods["draft"].successors.keys != table).any()
    assert contender.methods["draft"].options is contender._frozen["draft"].options


# ------------------------------------------------------------------------------------------------------- the sums


def test_figures_follow_from_the_clock_and_the_ids(lm):
    found = measure(lm, DRAFTS, PROMPTS[:2], warmup=[], max_new_tokens=11, rounds=3, clock=Clock())
    plain = found.rows()[0]
    assert [row.name for row in found.rows()] == ["plain", *DRAFTS]
    for row in found.rows():
        assert row.tokens == 22 and row.prompts == 2 and row.identical == 2 and not row.differences
        assert row.tokens_per_second.median == row.tokens_per_second.low == row.tokens_per_second.high == 22 / 4
        assert (row.ratio.low, row.ratio.median, row.ratio.high) == (1, 1, 1)
        assert row.first_token_ms == 1000
        samples = [sample for done in found.rounds for sample in done[row.name].values()]
        passes = sum(len(passes) for sample in samples for passes in sample.per_pass)
        assert row.tokens_per_pass == pytest.approx(3 * 20 / passes)
        assert row.ms_per_pass == pytest.approx(1000 * 3 * 2 / passes)
        assert row.kv_bytes > 0 and row.peak_bytes > 0
    assert plain.tokens_per_pass == 1 and plain.acceptance is None and plain.cold_tokens_per_pass is None


def test_ratios_are_paired_by_round_and_split_by_workload():
    log = []
    plain = Scripted("plain", [2, 2, 4, 4, 8, 8], log)
    other = Scripted("other", [1, 1, 4, 4, 2, 2], log)
    cases = [Case("a", "s", "friendly", "", (1,)), Case("b", "s", "hostile", "", (2,))]
    found = Measurement([plain, other], cases, [[0], [1]])
    found.rounds = [
        {one.name: {batch: one.run([[batch]]) for batch in range(2)} for one in (plain, other)} for _ in range(3)
    ]
    found.rounds[1]["other"][1] = replace(found.rounds[1]["other"][1], seconds=1.0)
    speed, ratio = found.speed("other")
    assert speed.median == 8 / 4 and speed.high == 8 / 2  # rounds of 2, 5 and 4 seconds
    assert (ratio.low, ratio.median, ratio.high) == (8 / 5, 2, 4)
    assert found.speed("other", "friendly")[1].median == 2 and found.speed("other", "friendly")[1].low == 1
    assert found.speed("other", "hostile")[1].low == 2
    row = found.rows()[1]
    assert set(row.ratio_by_workload) == {"friendly", "hostile"}
    assert row.acceptance == 2 / 3 and row.tokens_per_pass == 3 / 2 and row.kv_bytes == 64


def test_the_token_of_the_prompts_own_pass_is_no_token_of_a_pass():
    sample = Sample([[1, 2, 3], [4]], [[(3, 1)], []], [[False] * 3, [False]], 1.0, 1.0, 0)
    assert tokens_per_pass([sample]) == 2
    assert tokens_per_pass([]) is None


def test_prompts_of_a_batch_are_of_one_workload_and_outputs_keep_their_place(lm):
    cases = [Case(str(i), "s", "friendly" if i % 2 else "hostile", "", tuple(ids)) for i, ids in enumerate(PROMPTS)]
    found = measure(lm, [DRAFTS[0]], cases, warmup=[], max_new_tokens=6, rounds=1, batch_size=2)
    assert found.batches == [[0, 2], [1, 3]]
    for index, ids in enumerate(PROMPTS):
        for name in ("plain", DRAFTS[0]):
            sample, row = found.output(name, index)
            assert sample.token_ids[row] == greedy(lm, ids, 6)


# ---------------------------------------------------------------------------------------------- equality of outputs


def test_all_texts_of_a_prompt_count_and_what_they_share_counts_once(lm):
    threads, same = "group-think:thinkers=3", "latr:group=4,tau_abs=1"  # the second never forks: four equal texts
    found = measure(lm, [threads, same], PROMPTS[:2], warmup=[], max_new_tokens=12, rounds=1, clock=Clock())
    plain, group, latr = found.rows()
    assert (plain.branches, group.branches, latr.branches) == (0, 3, 4)
    written = 0
    for output in generate(lm, PROMPTS[:2], threads, max_new_tokens=12):
        beginnings = {tuple(b.token_ids[:n]) for b in output.branches for n in range(1, 13)}
        written += len(beginnings)
    assert (plain.tokens, group.tokens, latr.tokens) == (24, written, 24) and 24 < written <= 72
    assert group.ratio.median == written / 24 and latr.ratio.median == 1
    assert group.tokens_per_pass == (written - 2) / 22 and latr.tokens_per_pass == 1


def test_lossless_recipes_are_identical_to_greedy(lm):
    found = measure(lm, DRAFTS, PROMPTS, warmup=[], max_new_tokens=16, rounds=1)
    assert [row.identical for row in found.rows()] == [4, 4, 4]
    assert found.output("plain", 1)[0].token_ids == [greedy(lm, PROMPTS[1], 16)]


def test_a_difference_is_counted_and_its_logit_gap_reported(lm):
    right = greedy(lm, PROMPTS[0], 6)
    wrong = [*right[:3], (right[3] + 1) % 97, *right[4:]]
    liar = Scripted("liar", [1.0], [], new=wrong)
    found = measure(lm, [], PROMPTS[:1], warmup=[], max_new_tokens=6, rounds=3, peers=[liar])
    row = found.rows()[1]
    assert row.identical == 0 and len(row.differences) == 1
    difference = row.differences[0]
    assert (difference.position, difference.plain, difference.other) == (3, right[3], wrong[3])
    with torch.no_grad():
        logits = lm.model(torch.tensor([PROMPTS[0] + right[:3]])).logits[0, -1]
    assert difference.gap == pytest.approx(float(logits[right[3]] - logits[wrong[3]]), abs=1e-4)
    assert not difference.near_tie and difference.gap > 1e-3


def test_a_near_tie_is_seen(lm):
    right = greedy(lm, PROMPTS[0], 2)
    with torch.no_grad():
        logits = lm.model(torch.tensor([PROMPTS[0] + right[:1]])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    found = measure(
        lm, [], PROMPTS[:1], warmup=[], max_new_tokens=2, rounds=1, peers=[Scripted("p", [1], [], [right[0], second])]
    )
    found.near_tie = float(logits.max() - logits[second]) + 1e-3
    assert found.rows()[1].near_ties == 1


def test_an_output_that_ends_early_differs_where_it_ends(lm):
    right = greedy(lm, PROMPTS[0], 4)
    found = measure(
        lm, [], PROMPTS[:1], warmup=[], max_new_tokens=4, rounds=1, peers=[Scripted("p", [1], [], right[:2])]
    )
    difference = found.rows()[1].differences[0]
    assert (difference.position, difference.plain, difference.other, difference.gap) == (2, right[2], None, None)


def test_logit_gap_is_that_of_a_full_pass(lm):
    ids, new = PROMPTS[2], [7, 8]
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids + new])).logits[0, -1]
    assert logit_gap(lm, ids, new, 11, 12) == pytest.approx(float(logits[11] - logits[12]), abs=1e-4)


# ------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_keeps_what_everyone_had_done(lm):
    # Its log: a warm-up run, freeze; thaw, two runs of round 1; thaw, the first run of round 2. The next is broken off.
    stopper = Scripted("stopper", [1.0], [], stop_at=2 + 3 + 2)
    found = measure(lm, [], PROMPTS[:2], warmup=[], max_new_tokens=3, rounds=3, peers=[stopper])
    assert not found.complete and len(found.rounds) == 2
    assert [len(batches) for _, batches in found.paired()] == [2, 1]
    row = found.rows()[1]
    assert row.tokens == 8 and row.prompts == 2


def test_ctrl_c_before_the_first_counted_run_leaves_no_rows(lm):
    found = measure(lm, [], PROMPTS[:1], warmup=[], rounds=1, peers=[Scripted("stopper", [1.0], [], stop_at=0)])
    assert not found.complete and found.rows() == []


def test_other_errors_are_not_swallowed(lm):
    class Broken(Scripted):
        def run(self, prompts):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure(lm, [], PROMPTS[:1], warmup=[], rounds=1, peers=[Broken("b", [1], [])])


# ------------------------------------------------------------------------------------------------------- the rest


def test_progress_counts_every_run(lm):
    steps = []
    measure(lm, [DRAFTS[0]], PROMPTS[:2], warmup=[PROMPTS[3]], max_new_tokens=3, rounds=2, progress=steps.append)
    assert [step.done for step in steps] == [*range(12), 12] and {step.total for step in steps} == {12}
    assert steps[4].stage == "round 1 of 2" and steps[-1].stage == "done"


def test_progress_may_be_a_bar_of_rich(lm):
    from rich.progress import Progress

    bar = Progress(disable=True)
    measure(lm, [], PROMPTS[:1], warmup=[], max_new_tokens=2, rounds=1, progress=bar)
    assert bar.tasks[0].finished and bar.tasks[0].total == 2


@pytest.mark.parametrize("option", ["max_new_tokens", "rounds", "batch_size"])
def test_counts_below_one_are_refused(lm, option):
    with pytest.raises(OptionError, match=option):
        measure(lm, [], PROMPTS, **{option: 0})


def test_bad_prompts_are_refused_before_anything_runs(lm):
    for prompts, words in (([], "no prompts"), ([[]], "empty"), ([[1] * 510], "past"), (["text"], "no tokenizer")):
        with pytest.raises(InputError, match=words):
            cases_of(lm, prompts, 5)
    with pytest.raises(RecipeError, match="do not compose"):
        measure(lm, ["keyformer + recent"], PROMPTS)


# ------------------------------------------------------------------------------------------------------- peers


def test_transformers_is_measured_on_the_same_weights(lm):
    peers, absent = peers_of(lm, 12)
    assert [peer.name for peer in peers] == ["transformers generate", "transformers prompt lookup (10)"]
    assert peers[1].config.prompt_lookup_num_tokens == 10
    assert peers[0].model is lm.model and "llama-cpp-python is not installed" in absent[0]
    found = measure(lm, [], PROMPTS, warmup=[], max_new_tokens=12, rounds=1, peers=peers)
    for row in found.rows()[1:]:
        assert row.kind == "peer" and row.identical == 4 and row.tokens == 48
    assert found.rows()[1].tokens_per_pass == 1 and found.rows()[2].tokens_per_pass > 1


def test_a_peer_obeys_end_tokens_and_times_the_first_token(lm):
    right = greedy(lm, PROMPTS[0], 8)
    peer = TransformersPeer(lm.model, [right[4]], 8, clock=Clock())
    assert isinstance(peer.config, GenerationConfig)
    sample = peer.run([PROMPTS[0]])
    assert sample.token_ids == [right[: right.index(right[4]) + 1]]
    assert (sample.first_token_seconds, sample.seconds) == (1, 2)
    with pytest.raises(InputError, match="one prompt at a time"):
        peer.run(PROMPTS)


def test_llama_cpp_is_read_token_by_token():
    class Engine:
        def reset(self):
            self.fresh = True

        def generate(self, ids, **options):
            assert self.fresh and options["temp"] == 0
            yield from [ids[0] + 1, 9, 3, 4]

    sample = LlamaCppPeer(Engine(), [3], 8, Clock()).run([[5, 6]])
    assert sample.token_ids == [[6, 9, 3]] and sample.passes == 2
    assert (sample.first_token_seconds, sample.seconds) == (1, 2)
    assert LlamaCppPeer(Engine(), [], 2, Clock()).run([[5, 6]]).token_ids == [[6, 9]]
