"""The parts between the pipes, without HTTP: the worker's loop, a stream of events, a pool that restarts workers."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from running import HERE

from tokenary.serve.errors import ApiError
from tokenary.serve.pool import Pool
from tokenary.serve.protocol import Done, Failed, Job, Progress, TokenLogprob, pack
from tokenary.serve.settings import Settings
from tokenary.serve.stream import Stream, joined
from tokenary.serve.worker import Worker, pack_cancel, pack_job, read_line


def job(id="a", text="hello", **more):
    return Job(id=id, prompt=list(text.encode()), **more)


def done(id, finish="stop"):
    return Done(id, finish, 1, 1, 0, 0, 0, 0, 0.0, 0.0, 0.0)


def told(engine, *lines):
    """What a worker says to these lines."""
    out = io.BytesIO()
    worker = Worker(engine, out)
    worker.read(io.BytesIO(b"".join(lines)))
    worker.run()
    return [event for line in out.getvalue().splitlines() for event in read_line(line)]


class Scripted(FakeEngine):
    """An engine to which messages come between its steps, as from another process."""

    def __init__(self, after: dict[int, bytes]) -> None:
        super().__init__()
        self.after, self.turns = after, 0

    def step(self):
        events = super().step()
        self.turns += 1
        if self.turns in self.after:
            self.worker._lines.put(self.after.pop(self.turns))
        return events


def scripted(first: bytes, after: dict[int, bytes]):
    out = io.BytesIO()
    engine = Scripted(after)
    worker = engine.worker = Worker(engine, out)
    worker._lines.put(first)
    worker.run()
    return [event for line in out.getvalue().splitlines() for event in read_line(line)]


def test_a_cancelled_job_ends_before_the_next_step():
    events = scripted(pack_job(job(text="!endless", max_new_tokens=1000)), {3: pack_cancel("a"), 4: b""})
    assert [type(event) for event in events] == [Progress] * 3 + [Done]
    assert events[-1].finish == "cancelled" and events[-1].new_tokens == 3


def test_jobs_run_together_and_others_go_on():
    lines = scripted(
        pack_job(job("a", "!endless", max_new_tokens=900)),
        {1: pack_job(job("b", "xyz")), 5: pack_cancel("a"), 6: b""},
    )
    assert "".join(event.text for event in lines if event.id == "b" and isinstance(event, Progress)) == "xyz"
    assert [event.finish for event in lines if isinstance(event, Done)] == ["stop", "cancelled"]


def test_what_an_engine_refuses_is_told():
    (refused,) = told(FakeEngine(), pack_job(job(text="!refuse")))
    assert refused == Failed("a", 422, "the engine refuses this job")


LOGPROBS = st.none() | st.lists(
    st.builds(TokenLogprob, st.floats(-9, 0), st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 0))))
)
EVENTS = st.one_of(
    st.builds(
        Progress, st.text(), st.lists(st.integers(0, 99)), st.lists(st.booleans()), st.text(), LOGPROBS,
        st.none() | st.lists(st.floats(0, 1)),
    ),
    st.builds(done, st.text(), st.sampled_from(["stop", "length"])),
    st.builds(Failed, st.text(), st.integers(400, 599), st.text()),
)  # fmt: skip


@given(EVENTS)
def test_events_survive_the_wire(event):
    line = pack([event, event])
    assert line.index(b"\n") == len(line) - 1 and read_line(line) == [event, event]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=300), st.integers(1, 300))
def test_a_stream_loses_nothing_however_slowly_it_is_read(passes, eager):
    """However many passes wait, the texts are whole, in order, and the queue is short."""
    jobs = [job(str(number)) for number in range(3)]

    async def run():
        stream, texts, ids = Stream(jobs, lambda ids: None), ["", "", ""], [[], [], []]

        async def take():
            number, event = await stream.next(1)
            if isinstance(event, Progress):
                texts[number] += event.text
                ids[number] += event.token_ids
                assert len(event.token_ids) == len(event.from_draft) == len(event.logprobs)
            return event

        for at, (number, text) in enumerate(passes):
            stream.put(Progress(str(number), [at], [True], text, [TokenLogprob(-1.0, [])], [1.0]))
            assert len(stream._events) <= 64 + 3
            if at % eager == 0:
                await take()
        for one in jobs:
            stream.put(done(one.id))
        while not stream.ended:
            await take()
        return texts, ids

    texts, ids = asyncio.run(run())
    for number in range(3):
        assert texts[number] == "".join(text for at, text in passes if at == number)
        assert ids[number] == [at for at, (of, _) in enumerate(passes) if of == number]


def test_joined_passes_keep_what_one_of_them_tells():
    one, other = (
        Progress("a", [1], [True], "x", None, [1.0]),
        Progress("a", [2], [False], "y", [TokenLogprob(-1, [])], [0.5]),
    )
    assert joined(one, other) == Progress("a", [1, 2], [True, False], "xy", [TokenLogprob(-1, [])], [0.5])
    assert joined(one, one).logprobs is None


def pooled(check, **options):
    """Run a check on a pool of the double."""

    async def run():
        engine = {key: options.pop(key) for key in ("delay", "log", "load", "broken") if key in options}
        pool = Pool(Settings(model="fake", **{"engine": "fake_engine:create", "engine_options": engine, **options}))
        await pool.start()
        try:
            await check(pool)
        finally:
            await pool.stop()
        assert pool.state == "stopped" and pool.pid is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        asyncio.run(run())


async def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.02)


async def rest(stream):
    events = []
    while not stream.ended:
        found = await stream.next(10)
        assert found is not None
        events.append(found[1])
    return events


def test_a_pool_starts_a_dead_worker_again():
    async def check(pool):
        with pytest.raises(ApiError, match="not ready"):
            pool.submit([job()])
        await until(lambda: pool.state == "ready")
        first = pool.pid
        stream = pool.submit([job("a", "!endless", max_new_tokens=4000), job("b", "!silent")])
        await stream.next(10)
        os.kill(first, signal.SIGKILL)
        ends = [event for event in await rest(stream) if not isinstance(event, Progress)]
        assert [(event.id, event.status) for event in sorted(ends, key=lambda event: event.id)] == [
            ("a", 503),
            ("b", 503),
        ]
        assert pool.jobs == 0 and pool.state == "dead"
        await until(lambda: pool.state == "ready")
        assert pool.pid != first and pool.restarts == 1
        text = "".join(event.text for event in await rest(pool.submit([job()])) if isinstance(event, Progress))
        assert text == "hello" and pool.resident_bytes > 1_000_000

    pooled(check)


def test_a_worker_that_hangs_is_killed():
    async def check(pool):
        await until(lambda: pool.state == "ready")
        events = await rest(pool.submit([job(text="!hang")]))
        assert [event.status for event in events] == [503]
        await until(lambda: pool.state == "ready")

    pooled(check, stall=1.0)


def test_all_jobs_of_a_request_or_none():
    async def check(pool):
        await until(lambda: pool.state == "ready")
        held = pool.submit([job(str(number), "!silent") for number in range(3)])
        with pytest.raises(ApiError) as caught:
            pool.submit([job("x"), job("y")])
        assert caught.value.status == 429 and pool.jobs == 3
        held.close()
        held.close()
        assert pool.jobs == 0
        assert len(await rest(pool.submit([job("x"), job("y")]))) == 2 * 7

    pooled(check, max_jobs=4)


def test_a_model_that_cannot_be_loaded():
    async def check(pool):
        assert await asyncio.wait_for(pool.refused, 20) == "no such model"

    pooled(check, broken="no such model")


def test_a_worker_that_dies_whenever_it_loads():
    async def check(pool):
        assert "died 3 times" in await asyncio.wait_for(pool.refused, 20)

    pooled(check, engine="fake_engine:there_is_no_such_function")


def test_a_worker_does_not_outlive_its_parent(tmp_path):
    log = tmp_path / "log"
    code = (
        "import asyncio, os, sys\n"
        "from tokenary.serve.pool import Pool\n"
        "from tokenary.serve.protocol import Job\n"
        "from tokenary.serve.settings import Settings\n"
        "async def main():\n"
        f"    options = {{'delay': 0.01, 'log': {str(log)!r}}}\n"
        "    pool = Pool(Settings(model='fake', engine='fake_engine:create', engine_options=options))\n"
        "    await pool.start()\n"
        "    while pool.state != 'ready': await asyncio.sleep(0.01)\n"
        "    pool.submit([Job('a', list(b'!endless'), max_new_tokens=10**6)])\n"
        "    print(pool.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    env = os.environ | {"PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as parent:
        pid = int(parent.stdout.readline())
        worker = psutil.Process(pid)
        parent.kill()
    worker.wait(10)


def test_lines_that_only_a_worker_writes():
    line = json.dumps({"ready": {"kind": "causal", "context_length": 1, "vocab_size": 2, "fingerprint": ""}})
    assert read_line(line.encode())[0].vocab_size == 2
    assert read_line(b'{"refused": "no"}')[0].message == "no"
