"""The engine on toy nets: a text depends on its job alone, whoever comes and goes beside it."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from tokenary.core.sampling import Sampler
from tokenary.models.tiny import tiny_lm
from tokenary.run import Generation
from tokenary.serve.engine import Engine, EngineOptions
from tokenary.serve.engine.batch import BatchLane
from tokenary.serve.protocol import Done, Job, Progress

RECIPES = [
    "",
    "token-recycling:nodes=8",
    "prompt-lookup",
    "keyformer:keep=50%,interval=8",
    "zipcache:interval=12",
    "token-select:read=8,sinks=2,local=6,chunk=4",
    "token-recycling:nodes=8 + keyformer:keep=50%,interval=8",
]
PIECE = 16


def job(id="a", length=20, **given):
    stream = random.Random(f"{id} {length}")
    return Job(id=str(id), prompt=[stream.randrange(97) for _ in range(length)], **{"max_new_tokens": 24, **given})


class Told:
    """What an engine told of each job."""

    def __init__(self):
        self.progress, self.done, self.failed = defaultdict(list), {}, {}

    def take(self, events):
        for event in events:
            assert event.id not in self.done and event.id not in self.failed, "an event after the last one"
            if isinstance(event, Progress):
                assert len(event.token_ids) == len(event.from_draft)
                self.progress[event.id].append(event)
            elif isinstance(event, Done):
                self.done[event.id] = event
            else:
                self.failed[event.id] = event

    def tokens(self, id):
        return [token for event in self.progress[id] for token in event.token_ids]

    def text(self, id):
        return "".join(event.text for event in self.progress[id])


def run(engine, *jobs, limit=3000):
    told = Told()
    for each in jobs:
        engine.submit(each)
    while not engine.idle:
        told.take(engine.step())
        limit -= 1
        assert limit, "the engine never comes to an end"
    return told


def alone(lm, each):
    return run(Engine(lm, EngineOptions(piece=PIECE)), each).tokens(each.id)


def mixed_jobs(stream, recipes, count):
    for number in range(count):
        sampled = {"temperature": stream.choice([0.0, 1.0]), "seed": stream.randrange(3), "choice": stream.randrange(3)}
        yield job(
            number,
            stream.choice([1, 5, 15, 33, 70]),
            recipe=stream.choice(recipes),
            max_new_tokens=stream.choice([1, 2, 9, 20, 30]),
            logprobs=stream.choice([None, 0, 2]),
            watch=stream.random() < 0.3,
            **sampled,
        )


def come_and_go(lm, recipes, seed, count=8):
    """Jobs that arrive and are cancelled at random moments; each against itself alone."""
    stream = random.Random(seed)
    jobs = list(mixed_jobs(stream, recipes, count))
    arrivals = sorted((stream.randrange(40), number) for number in range(count))
    cancelled = {stream.randrange(count): stream.randrange(60) for _ in range(3)}
    engine, told, step = Engine(lm, EngineOptions(max_batch=4, piece=PIECE)), Told(), 0
    while arrivals or not engine.idle:
        while arrivals and arrivals[0][0] <= step:
            engine.submit(jobs[arrivals.pop(0)[1]])
        for number, at in cancelled.items():
            if at == step:
                engine.cancel(str(number))
        told.take(engine.step())
        step += 1
    assert not told.failed and len(told.done) == count
    for each in jobs:
        expected, found = alone(lm, each), told.tokens(each.id)
        if told.done[each.id].finish == "cancelled":
            assert found == expected[: len(found)]
        else:
            assert found == expected, f"job {each.id} of {each.recipe or 'plain'}"
            assert told.done[each.id].finish == "length"
    return told


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe or "plain")
def test_a_text_depends_on_its_job_alone(recipe):
    lm = tiny_lm()
    if "zipcache" in recipe:  # rounding can turn the last digit into a whole step
        lm.model.double()
    told = come_and_go(lm, [recipe], seed=1)
    if "recycling" in recipe:
        assert sum(done.accepted for done in told.done.values()) > 10


@pytest.mark.parametrize("seed", range(2))
def test_so_it_does_with_lanes_of_other_recipes_beside_it(seed):
    come_and_go(tiny_lm(), [*RECIPES[:4], *RECIPES[5:]], seed, count=8)


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_so_it_does_with_sliding_layers_and_without_rotation(family):
    come_and_go(tiny_lm(family=family), ["", "keyformer:keep=50%,interval=8"], seed=4)


def test_it_is_the_text_that_generate_writes():
    lm = tiny_lm()
    for number, settings in enumerate([{}, {"temperature": 1.0, "seed": 5, "choice": 2}]):
        each = job(number, 50, **settings)
        sampler = Sampler(settings.get("temperature", 0.0), seed=5, first_row=settings.get("choice", 0))
        generation = Generation(lm, [each.prompt], None, 24, sampler)
        list(generation)
        assert alone(lm, each) == generation.outputs[0].token_ids


def test_an_idle_engine_leaves_the_model_as_it_was():
    lm = tiny_lm()
    before, engine = lm.model.config._attn_implementation, Engine(lm)
    for end in (lambda: None, lambda: engine.cancel("a")):
        engine.submit(job())
        engine.step()
        assert lm.model.config._attn_implementation != before
        end()
        run(engine)
        assert lm.model.config._attn_implementation == before


def test_newcomers_are_read_together_as_far_as_a_piece_goes():
    engine = Engine(tiny_lm(), EngineOptions(piece=40))
    lengths = {"a": 9, "b": 7, "c": 10, "d": 8, "e": 6, "long": 50, "f": 5}
    for name, length in lengths.items():
        engine.submit(job(name, length))
    steps = [engine.step() for _ in range(5)]
    first = [next(at for at, events in enumerate(steps) if name in {event.id for event in events}) for name in lengths]
    assert first == [0, 0, 0, 0, 1, 4, 3]  # 4 prompts of at most 10 tokens; the long one takes turns with another
    told = run(engine)
    for name, length in lengths.items():
        told.progress[name] = [event for events in steps for event in events if event.id == name] + told.progress[name]
        assert told.tokens(name) == alone(tiny_lm(), job(name, length))


def test_a_prompt_that_cannot_be_read_hurts_nobody_who_is_read_with_it(monkeypatch):
    from tokenary.hf.target import Target

    read, bad = Target.reading, job("bad", 7)

    def reading(target, prompts, chunk):
        if bad.prompt in prompts:
            raise ZeroDivisionError
        return read(target, prompts, chunk)

    monkeypatch.setattr(Target, "reading", reading)
    told = run(Engine(tiny_lm()), job("a"), bad, job("b", 5))
    assert told.failed["bad"].status == 500
    assert {name: told.tokens(name) for name in told.done} == {
        "a": alone(tiny_lm(), job("a")),
        "b": alone(tiny_lm(), job("b", 5)),
    }


def test_who_leaves_before_it_is_read_is_not_read():
    engine = Engine(tiny_lm(), EngineOptions(piece=40))
    for name in ("long", "a", "b"):
        engine.submit(job(name, 100 if name == "long" else 10))
    engine.step()
    engine.cancel("a")
    told = run(engine)
    assert told.done["a"].finish == "cancelled" and not told.tokens("a")
    assert told.tokens("b") == alone(tiny_lm(), job("b", 10))


# ------------------------------------------------------------------------------------------------ what is told


def test_log_probabilities_are_those_of_the_model():
    lm = tiny_lm()
    each = job("a", 30, logprobs=3, temperature=1.0, seed=2, recipe="token-recycling:nodes=8")
    told = run(Engine(lm), each, replace(each, id="b", logprobs=0), replace(each, id="c", logprobs=None))
    tokens = told.tokens("a")
    with torch.no_grad():
        logits = lm.model(torch.tensor([each.prompt + tokens])).logits[0, len(each.prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    found = [one for event in told.progress["a"] for one in event.logprobs]
    assert len(found) == len(tokens)
    for at, (token, one) in enumerate(zip(tokens, found, strict=True)):
        assert one.logprob == pytest.approx(float(expected[at, token]), abs=1e-4)
        best = expected[at].topk(3)
        assert [id for id, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(one.top == [] for event in told.progress["b"] for one in event.logprobs)
    assert all(event.logprobs is None for event in told.progress["c"])


def test_who_watches_sees_what_is_held():
    lm = tiny_lm()
    plain, kept = job("a", 40, watch=True), job("b", 40, watch=True, recipe="keyformer:keep=50%,interval=4")
    told = run(Engine(lm, EngineOptions(piece=PIECE)), plain, kept)
    so_far = 0
    for event in told.progress["a"]:
        so_far += len(event.token_ids)
        assert event.held == [1.0] * (40 + so_far)
    first = told.progress["b"][0].held
    assert len(first) == 41 and first[-1] == 1 and sum(first[:-1]) == pytest.approx(20)  # half of the prompt
    assert 0 < min(share for share in first if share) < 1  # heads hold different tokens
    last = told.progress["b"][-1].held
    assert len(last) == 64 and 20 <= sum(last[:-1]) <= 24
    assert told.done["b"].kv_bytes < told.done["a"].kv_bytes


def test_times_and_counts_are_told():
    ticks = iter(range(10**6))
    engine = Engine(tiny_lm(), EngineOptions(piece=PIECE), clock=lambda: next(ticks))
    told = run(engine, job("a", 40, recipe="token-recycling:nodes=8", seconds=1e9), job("b", 3, max_new_tokens=1))
    done = told.done["a"]
    assert (done.prompt_tokens, done.new_tokens, done.finish) == (40, 24, "length")
    assert done.drafted > 0 and done.accepted == sum(sum(event.from_draft) for event in told.progress["a"])
    assert done.passes + done.accepted == 23  # the prompt's own pass gave the first token
    assert 0 < done.queued_seconds < done.first_token_seconds < done.seconds
    assert told.done["b"].passes == 0 and told.done["b"].new_tokens == 1


# --------------------------------------------------------------------------------------------- who waits for whom


def test_a_long_prompt_does_not_stop_those_who_stream():
    engine = Engine(tiny_lm(), EngineOptions(piece=PIECE))
    engine.submit(job("a", 5, max_new_tokens=40))
    while not engine.step():
        pass
    engine.submit(job("b", 400))
    for _ in range(24):  # 25 pieces
        assert [event.id for event in engine.step()] == ["a"]
    assert {event.id for event in engine.step()} == {"a", "b"}


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = Engine(tiny_lm(), EngineOptions(piece=PIECE))
    engine.submit(job("long", 400))
    engine.submit(job("short", 10))
    assert not engine.step()
    assert [event.id for event in engine.step()] == ["short"]


def test_lanes_share_the_time_not_the_turns(monkeypatch):
    """One lane's turns take three times as long as the others': it gets a third of them."""
    clock, step = [0.0], BatchLane.step

    def slow(lane):
        clock[0] += 3.0 if "keep" in lane._methods else 1.0
        return step(lane)

    monkeypatch.setattr(BatchLane, "step", slow)
    engine = Engine(tiny_lm(), clock=lambda: clock[0])
    for each in (job("a", max_new_tokens=90, seconds=1e9), job("b", max_new_tokens=90, seconds=1e9, recipe="recent")):
        engine.submit(each)

    def turns(steps):
        found = [event.id for _ in range(steps) for event in engine.step()]
        return {id: found.count(id) for id in "abc"}

    counts = turns(40)
    assert 28 <= counts["a"] <= 32 and 8 <= counts["b"] <= 12
    engine.submit(job("c", seconds=1e9, recipe="prompt-lookup:nodes=1"))  # it does not make up for the past
    counts = turns(14)
    assert 5 <= counts["a"] <= 7 and 5 <= counts["c"] <= 7 and 1 <= counts["b"] <= 3


def test_cancelled_and_late_jobs_leave_at_once():
    clock = [0.0]
    engine, told = Engine(tiny_lm(), EngineOptions(max_batch=3, piece=PIECE), clock=lambda: clock[0]), Told()
    for name, seconds, length in (("a", 60, 5), ("b", 5, 5), ("c", 60, 400), ("d", 5, 5), ("e", 60, 5)):
        engine.submit(job(name, length, seconds=seconds))
    for _ in range(4):
        told.take(engine.step())
    assert told.progress["a"] and told.progress["b"] and not told.progress["c"]
    engine.cancel("c")  # while it is read
    engine.cancel("e")  # while it waits
    engine.cancel("nobody")
    clock[0] = 5.0  # b writes, d waits
    told.take(engine.step())
    assert {id: done.finish for id, done in told.done.items()} == {
        **dict.fromkeys("ce", "cancelled"),
        **dict.fromkeys("bd", "deadline"),
    }
    assert [work.job.id for work in engine._works()] == ["a"]
    engine.step()
    (lane,) = engine._lanes.values()
    assert len(lane._loop.batch) == len(lane._loop.target.lengths) == 1
    engine.cancel("a")
    told.take(engine.step())
    assert engine.idle and told.done["a"].finish == "cancelled" and not engine._lanes


def test_who_is_not_begun_in_time_is_refused():
    clock = [0.0]
    engine, told = Engine(tiny_lm(), EngineOptions(max_batch=1), clock=lambda: clock[0]), Told()
    for name, wait in (("begun", 3.0), ("refused", 3.0), ("patient", None)):
        engine.submit(job(name, wait=wait))
    for clock[0] in (0.0, 2.9, 3.0):
        assert not told.failed
        told.take(engine.step())
    assert told.failed["refused"].status == 429 and "3 s" in told.failed["refused"].message
    while not engine.idle:
        told.take(engine.step())
    assert set(told.done) == {"begun", "patient"}


def test_a_full_queue_refuses():
    engine = Engine(tiny_lm(), EngineOptions(max_batch=1, max_waiting=2))
    engine.submit(job(0))
    engine.step()
    told = run(engine, *(job(number) for number in (1, 2, 3)))
    assert set(told.done) == {"0", "1", "2"} and told.failed["3"].status == 429
    with pytest.raises(ValueError, match="under way"):
        engine.submit(job(0))
        engine.submit(job(0))


# ------------------------------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "keyformer + random"}, "both are the 'keep'"),
        ({"recipe": "token-select + keyformer"}, "unrotated keys"),
        ({"recipe": "keyformer:keep=-1"}, "keep"),
        ({"recipe": "keyformers"}, "did you mean"),
        ({"recipe": "local-leap"}, "diffusion"),
        ({"recipe": "triadic-suffix"}, "takes no part"),
        ({"recipe": "group-think + prompt-lookup"}, "drafted ahead"),
        ({"recipe": "group-think", "logprobs": 1}, "log-probabilities"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 500}, "the context has 512"),
        ({"length": 0}, "at least one token"),
        ({"schema": "{}"}, "byte-level"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_and_hurts_nobody(given, said):
    lm = tiny_lm()
    told = run(Engine(lm), job("before"), job("bad", **given), job("after"))
    assert told.failed["bad"].status == 422 and said in told.failed["bad"].message
    assert set(told.done) == {"before", "after"}
    assert told.tokens("after") == alone(lm, job("after"))


def test_a_wrong_token_is_refused():
    told = run(Engine(tiny_lm()), Job("a", [3, 97]))
    assert told.failed["a"].status == 422


def test_a_recipe_that_extends_the_context_may():
    each = job("a", 60, max_new_tokens=10, recipe="token-select:read=8,sinks=2,local=6,chunk=4")
    told = run(Engine(tiny_lm(context=64)), each, replace(each, id="b", recipe=""))
    assert told.done["a"].new_tokens == 10 and told.failed["b"].status == 422


def test_a_defect_fails_the_jobs_of_its_lane_and_no_others(monkeypatch, caplog):
    from tokenary.memory.recent import RecentLayer

    lm, calls = tiny_lm(), []
    secret = "of the prompt"

    def choose(self, row, held, kept):
        calls.append(row)
        raise ZeroDivisionError(secret)

    engine = Engine(lm, EngineOptions(piece=PIECE))
    with monkeypatch.context() as patch:
        patch.setattr(RecentLayer, "choose", choose)
        told = run(engine, job("a"), job("b", 40, recipe="recent:keep=4096"), job("c", 40, recipe="recent:keep=10"))
    assert set(told.done) == {"a", "b"} and told.failed["c"].status == 500 and calls
    assert secret not in told.failed["c"].message and secret not in caplog.text and "choose" in caplog.text
    assert run(engine, job("c", 40, recipe="recent:keep=10")).done["c"].finish == "length"


def test_a_defect_in_a_pass_fails_all_who_write_in_it(monkeypatch):
    engine, told = Engine(tiny_lm()), Told()
    for each in (job("a"), job("b"), job("other", recipe="recent")):
        engine.submit(each)
    for _ in range(6):
        told.take(engine.step())
    lane = next(lane for recipe, lane in engine._lanes.items() if not recipe.steps)
    monkeypatch.setattr(lane._loop.target, "score", None)
    while not engine.idle:
        told.take(engine.step())
    assert {id: each.status for id, each in told.failed.items()} == {"a": 500, "b": 500}
    assert set(told.done) == {"other"}
    assert run(engine, job("a")).tokens("a") == alone(tiny_lm(), job("a"))


def test_a_recipe_that_waits_for_a_lane_is_not_overtaken_for_ever():
    engine, told = Engine(tiny_lm(), EngineOptions(max_lanes=1)), Told()
    engine.submit(job("first"))
    engine.step()
    engine.submit(job("other", recipe="recent"))
    for number in range(60):  # as long as it waits, more jobs of the first recipe come
        engine.submit(job(number, max_new_tokens=3))
        told.take(engine.step())
        if told.progress["other"]:
            break
    assert told.progress["other"] and "0" not in told.done


def test_recipes_are_kept_in_bounds():
    lm = tiny_lm()
    engine = Engine(lm, EngineOptions(max_recipes=3, max_lanes=2))
    told = run(engine, *(job(n, recipe=f"prompt-lookup:nodes={n + 1}", max_new_tokens=3) for n in range(8)))
    assert len(told.done) == 8 and len(lm.warm) == 3
    assert list(map(str, lm.warm)) == [f"prompt-lookup:nodes={n + 1}" for n in (5, 6, 7)]
