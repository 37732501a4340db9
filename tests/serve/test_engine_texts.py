"""Texts, stop texts, schemas, and loops of other kinds, through the engine."""

import json
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PIECE, Told, job, run

import tokenary
from tokenary.core.sampling import Sampler
from tokenary.models.text_diffusion import build
from tokenary.models.tiny import tiny_lm
from tokenary.run import Generation
from tokenary.serve import engine as engine_room
from tokenary.serve.engine import Engine, EngineOptions
from tokenary.serve.engine.choosing import Schemas
from tokenary.serve.engine.text_stream import TextStream
from tokenary.serve.protocol import Job
from tokenary.strategy_laws import tiny_any_subset

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"said": {"enum": ["yes", "no"]}},
        "required": ["said"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def stories():
    return tokenary.load("stories260k", dtype="float32")


PIECES = [bytes([byte]) for byte in "é€a".encode()] + [b"ab", b"b", b"\xff", b"", b"aab"]


@given(st.lists(st.sampled_from(range(len(PIECES))), max_size=30), st.lists(st.text("abé", max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_a_stream_of_text_is_the_text_up_to_the_first_stop(tokens, stops):
    def decode(ids):
        return b"".join(PIECES[id] for id in ids).decode(errors="replace")

    stream, shown = TextStream(decode, stops), ""
    for at, token in enumerate(tokens, start=1):
        text = decode(tokens[:at])
        places = [text.find(stop) for stop in stops if stop and stop in text]
        assert stream.add(token) == bool(places)
        shown += stream.take()
        if places:
            assert shown == text[: min(places)] and not stream.take(last=True)
            return
        whole = text.rstrip("\ufffd")
        assert whole.startswith(shown)
        held = whole[len(shown) :]  # nothing more is held back than may begin a stop text
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert shown + stream.take(last=True) == decode(tokens)


def story(lm, id, text, **given):
    return Job(str(id), lm.encode([text], raw=True)[0], **{"max_new_tokens": 40, **given})


def written(lm, text, **given):
    return tokenary.generate(lm, text, max_new_tokens=40, raw=True, **given)[0]


def test_texts_are_those_of_generate_up_to_a_stop_text(stories):
    whole = written(stories, "Once upon a time").text
    stop = whole[30:34]
    jobs = [
        story(stories, "plain", "Once upon a time"),
        story(stories, "stop", "Once upon a time", stop=["never", stop]),
        story(stories, "draft", "Once upon a time", stop=[stop], recipe="token-recycling:nodes=8"),
        story(stories, "warm", "The cat", temperature=1.0, seed=4),
    ]
    told = run(Engine(stories), *jobs)
    assert told.text("plain") == whole and told.done["plain"].finish == "length"
    for name in ("stop", "draft"):
        assert told.text(name) == whole[: whole.index(stop)] and told.done[name].finish == "stop"
    assert told.tokens("draft") == told.tokens("stop")
    assert told.text("warm") == written(stories, "The cat", temperature=1.0, seed=4).text


def test_what_was_held_back_comes_when_a_job_is_cancelled(stories):
    whole = written(stories, "Once upon a time").text
    engine, told = Engine(stories), Told()
    engine.submit(story(stories, "a", "Once upon a time", stop=[whole[:60] + "never"]))
    for _ in range(12):
        told.take(engine.step())
    assert told.text("a") == ""
    engine.cancel("a")
    told.take(engine.step())
    assert len(told.tokens("a")) == 12 and told.text("a") and whole.startswith(told.text("a"))


def test_a_text_keeps_the_schema_of_its_job(stories):
    pytest.importorskip("llguidance")
    plain = story(stories, "plain", "Once upon a time")
    jobs = [
        story(stories, f"{name} {recipe}", "Once", schema=schema, recipe=recipe, temperature=temperature, seed=1)
        for recipe in ("", "token-recycling:nodes=6")
        for name, schema, temperature in (("greedy", SCHEMA, 0.0), ("warm", SCHEMA, 1.0), ("free", None, 1.0))
    ]
    told = run(Engine(stories), plain, *jobs, story(stories, "bad", "Once", schema='{"type": 3}'))
    assert told.text("plain") == written(stories, "Once upon a time").text
    for each in jobs:
        if each.schema is not None:
            assert told.done[each.id].finish == "stop"
            assert told.text(each.id) in ('{"said": "yes"}', '{"said": "no"}')
    for name in ("greedy", "warm", "free"):  # drafts change nothing
        assert told.tokens(f"{name} ") == told.tokens(f"{name} token-recycling:nodes=6")
    assert told.failed["bad"].status == 422 and "schema" in told.failed["bad"].message


@pytest.mark.parametrize(
    ("schema", "said"), [('"/etc/passwd"', "JSON object"), ("{", "no JSON"), ('{"type": "integer", "enum": ["a"]}', "")]
)
def test_a_schema_that_is_none_is_refused(stories, schema, said):
    pytest.importorskip("llguidance")
    told = run(Engine(stories), story(stories, "a", "Once", schema=schema))
    assert told.failed["a"].status == 422 and said in told.failed["a"].message


def test_a_dead_end_fails_one_job_alone(stories):
    """No token may come, and the text must not end: that sequence fails, its neighbours go on."""
    pytest.importorskip("llguidance")
    lm = replace(stories, warm={})
    engine, told = Engine(lm), Told()
    for each in (story(lm, "bad", "Once", schema=SCHEMA), story(lm, "good", "Once upon a time")):
        engine.submit(each)
    for _ in range(3):
        told.take(engine.step())
    (lane,) = engine._lanes.values()
    chooser = next(chooser for chooser in lane._choosers.of.values() if not isinstance(chooser, Sampler))
    chooser._matchers[0].accepts = lambda token: False
    chooser._matchers[0].complete = lambda: False
    while not engine.idle:
        told.take(engine.step())
    assert told.failed["bad"].status == 422 and "no token continues" in told.failed["bad"].message
    assert told.text("good") == written(stories, "Once upon a time").text


# -------------------------------------------------------------------------------------------- loops of other kinds


def expected(lm, each):
    generation = Generation(lm, [each.prompt], each.recipe, each.max_new_tokens, Sampler(each.temperature, seed=1))
    list(generation)
    return generation.outputs[0]


@pytest.mark.parametrize("recipe", ["latr:group=3", "awrs:particles=3", "group-think:thinkers=2"])
def test_a_loop_of_its_own_runs_beside_the_others(recipe):
    lm = tiny_lm(vocab=97)
    own = [job(n, 12, recipe=recipe, max_new_tokens=10, temperature=1.0, seed=1) for n in range(2)]
    streaming = job("streams", max_new_tokens=60)
    engine, told = Engine(lm, EngineOptions(piece=PIECE)), Told()
    for each in (streaming, *own):
        engine.submit(each)
    while not engine.idle:
        told.take(engine.step())
        assert all(len(lane.works) == 1 for lane in engine._lanes.values())
    for each in own:
        output = expected(lm, each)
        assert told.tokens(each.id) == output.token_ids
        assert told.done[each.id].finish == output.stats.finish and told.done[each.id].kv_bytes > 0
    assert told.tokens("streams") == expected(lm, streaming).token_ids


@pytest.mark.parametrize("recipe", ["", "latr:group=3", "awrs:particles=3", "group-think:thinkers=2"])
def test_a_loop_reads_a_long_prompt_in_passes_of_its_own(recipe):
    prompt = job("long", 2100).prompt
    passes = Generation(tiny_lm(context=4096), [prompt], recipe, 2, Sampler(1.0, seed=1)).passes()
    assert [next(passes), next(passes)] == [[], []] and next(passes)


def built_while_others_write(monkeypatch, patched, wanted, lm=None):
    """Hold a build until others have had ten more steps; return what was told, and those steps."""
    lm, gate, told, steps = lm or tiny_lm(), threading.Event(), Told(), []
    owner, name = patched
    make = getattr(owner, name)

    def slow(*args, **kwargs):
        assert gate.wait(20)
        return make(*args, **kwargs)

    engine = Engine(lm)
    engine.submit(job("streams", 5, max_new_tokens=30))
    while not told.progress["streams"]:
        told.take(engine.step())
    monkeypatch.setattr(owner, name, slow)
    engine.submit(wanted)
    engine.submit(job("beside", 6, max_new_tokens=3))  # it overtakes the one that waits
    for _ in range(10):
        steps.append(engine.step())
        told.take(steps[-1])
    assert not told.progress[wanted.id] and told.done["beside"].new_tokens == 3
    assert all("streams" in {event.id for event in events} for events in steps)
    gate.set()
    while not engine.idle:
        told.take(engine.step())
    assert told.done["streams"].new_tokens == 30
    return told


def test_tokens_of_others_come_while_a_schema_is_compiled(monkeypatch, stories):
    wanted = story(stories, "kept", "Once", schema='{"type": "boolean"}')
    told = built_while_others_write(monkeypatch, (Schemas, "compile"), wanted, stories)
    assert told.text("kept") in ("true", "false")


def test_tokens_of_others_come_while_a_recipe_is_built(monkeypatch):
    wanted = job("drafted", 12, recipe="token-recycling:nodes=4")
    told = built_while_others_write(monkeypatch, (engine_room, "build"), wanted)
    assert told.tokens("drafted") == run(Engine(tiny_lm()), replace(wanted, recipe="")).tokens("drafted")


def test_a_build_that_nobody_waits_for_any_more_is_forgotten(monkeypatch):
    gate, made = threading.Event(), []
    monkeypatch.setattr(engine_room, "build", lambda lm, recipe: gate.wait(20) and made.append(recipe))
    engine = Engine(tiny_lm())
    for name in ("a", "b"):
        engine.submit(job(name, recipe=f"prompt-lookup:nodes={ord(name) - 90}"))
        engine.step()
        engine.cancel(name)
        (told,) = engine.step()  # without a word of the thread
        assert told.finish == "cancelled" and engine.idle
    gate.set()
    assert not engine._builder._futures and len(made) <= 1


def tiny_diffusion():
    lm = tiny_any_subset()
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "context": 64}
    lm.model = build(objective="diffusion", vocab=14, **sizes).eval()
    lm.model.config.mask_token_id = 13
    return lm


@pytest.mark.parametrize("recipe", ["", "local-leap", "any-subset-ar"])
def test_models_that_fill_masks_tell_what_is_settled(recipe):
    lm = tiny_any_subset() if recipe == "any-subset-ar" else tiny_diffusion()
    each = Job("a", [1, 2, 3, 13, 5], recipe, 20, temperature=1.0, seed=1)
    told = run(Engine(lm), each, replace(each, id="b", logprobs=1))
    output = expected(lm, each)
    assert told.tokens("a") == output.token_ids and 13 not in output.token_ids
    assert told.done["a"].finish == output.stats.finish and told.done["a"].passes == output.trace.passes
    assert told.failed["b"].status == 422


def test_a_solo_job_can_be_cancelled_and_the_next_one_begins():
    lm = tiny_lm()
    before, engine, told = lm.model.config._attn_implementation, Engine(lm), Told()
    own = [job(n, 12, recipe="latr:group=3", max_new_tokens=10, temperature=1.0, seed=1) for n in range(2)]
    for each in own:
        engine.submit(each)
    for _ in range(5):
        told.take(engine.step())
    engine.cancel("0")
    while not engine.idle:
        told.take(engine.step())
    assert told.done["0"].finish == "cancelled" and told.tokens("1") == expected(lm, own[1]).token_ids
    assert lm.model.config._attn_implementation == before
