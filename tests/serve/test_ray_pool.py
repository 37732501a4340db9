"""Replicas on Ray Serve behind the same door: routing, death, leaving, and the same answers over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import threading
import time
from collections import Counter

import httpx
import pytest
from running import HERE, Running, byte_tokenizer, log_lines
from typer.testing import CliRunner

from tokenary.cli.app import app
from tokenary.core.errors import OptionError, TokenaryError
from tokenary.serve.protocol import Done, Failed, Job, Progress
from tokenary.serve.ray_pool import RayPool, Slot, choose
from tokenary.serve.ray_replica import Replica
from tokenary.serve.settings import Settings
from tokenary.serve.worker import Refused

installed = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not installed, reason="Ray is not installed: pip install 'tokenary[ray]'")


DOUBLE = {"engine": "fake_engine:create", "engine_options": {}, "max_jobs": 8, "stall": 60.0}


def job(id="a", text="hello", **more):
    return Job(id=id, prompt=list(text.encode()), **more)


def slot(ready=True, **lanes):
    return Slot("x", ready, Counter(lanes))


def test_a_text_goes_where_its_lane_has_room():
    busy, idle, away = slot(a=3, b=2), slot(b=1), slot(ready=False)
    assert choose([idle, busy, away], "a", 8) is busy  # its lane is there
    assert choose([busy, idle, away], "b", 8) is idle  # both have one
    assert choose([busy, idle, away], "c", 8) is idle  # none has one
    assert choose([idle, busy, away], "a", 3) is idle  # its batch is full
    assert choose([slot(a=1, b=7), idle], "a", 8) is not idle and choose([slot(a=1, b=8), idle], "a", 8) is idle


def test_what_settings_refuse():
    if installed:
        with pytest.raises(OptionError, match="host:port"):
            RayPool(Settings(backend="ray", address="ray://127.0.0.1:1"))
    for wrong in ({"replicas": 2}, {"address": "auto"}, {"backend": "slurm"}, {"backend": "ray", "replicas": 0}):
        with pytest.raises(OptionError):
            Settings(**wrong)


def test_the_command_line_hands_it_over(monkeypatch):
    import tokenary.serve.server as module

    got = []
    monkeypatch.setattr(module, "run", got.append)
    arguments = ["serve", "--engine", "ray", "--replicas", "3", "--address", "auto", "--gpus", "0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (made,) = got
    assert (made.backend, made.replicas, made.address, made.gpus) == ("ray", 3, "auto", 0.5)
    if installed:
        assert isinstance(module._pool(made), RayPool)


def test_without_ray_it_says_what_to_install(monkeypatch):
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TokenaryError, match=r"pip install 'tokenary\[ray\]'"):
        RayPool(Settings(backend="ray"))


def test_a_replica_whose_engine_hangs_ends_itself(monkeypatch):
    exits = []
    monkeypatch.setattr("tokenary.serve.ray_replica.SIGN", 0.05)
    monkeypatch.setattr("os._exit", exits.append)

    async def check():
        replica = Replica({**DOUBLE, "stall": 0.4})
        life = replica.life()
        assert (await anext(life)).vocab_size == 257
        fine = [event async for events in replica.write([job()]) for event in events]
        assert text(fine) == "hello"
        hanging = asyncio.create_task(anext(replica.write([job("b", "!hang")])))
        async for said in life:
            assert said > 1_000_000 and not exits
        assert exits == [1]
        hanging.cancel()

    asyncio.run(asyncio.wait_for(check(), 20))


def test_a_replica_that_cannot_load():
    async def check():
        replica = Replica({**DOUBLE, "engine_options": {"broken": "out of weights"}})
        assert [said async for said in replica.life()] == [Refused("out of weights")]
        (failed,) = [event async for events in replica.write([job()]) for event in events]
        assert failed.status == 503

    asyncio.run(check())


@needs_ray
def test_a_cluster_that_is_not_there():
    async def check():
        pool = RayPool(Settings(backend="ray", address="127.0.0.1:1"))
        await pool.start()
        assert "cannot reach the Ray cluster 127.0.0.1:1" in await asyncio.wait_for(pool.refused, 30)
        await pool.stop()

    asyncio.run(check())


class Loop:
    """An event loop in a thread, with a pool of two replicas of the double."""

    def __init__(self, log) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        options = {"delay": 0.01, "log": str(log)}
        self.settings = Settings(
            model="fake", port=0, backend="ray", replicas=2, engine="fake_engine:create", engine_options=options,
            max_jobs=64,
        )  # fmt: skip
        self.log = log
        self.pool = self.run(self._begin())

    async def _begin(self):
        pool = RayPool(self.settings)
        await pool.start()
        return pool

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def wait(self, condition, seconds=30.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.02)

    def settle(self):
        """Wait until all calls are over: the last word of a text comes a moment before the end of its call."""
        self.wait(lambda: sum(slot.load for slot in self.pool.slots) == 0)

    def write(self, *jobs):
        async def work():
            return await rest(self.pool.submit(jobs))

        return self.run(work())


async def rest(stream):
    events = []
    while not stream.ended:
        found = await stream.next(20)
        assert found is not None
        events.append(found[1])
    return events


def text(events, id="a"):
    return "".join(event.text for event in events if isinstance(event, Progress) and event.id == id)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))  # the replicas import the double
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            it = Loop(tmp_path_factory.mktemp("ray") / "log")
            it.wait(lambda: all(slot.ready for slot in it.pool.slots), 60)
            yield it
            it.run(it.pool.stop())
            assert it.pool.state == "stopped" and ray.is_initialized()  # the cluster was not its own
        finally:
            ray.serve.shutdown()
            ray.shutdown()


@needs_ray
def test_texts_of_a_request(two):
    events = two.write(job("a", "one"), job("b", "two words"), job("c", "!refuse"))
    assert text(events, "a") == "one" and text(events, "b") == "two words"
    ends = {event.id: event for event in events if not isinstance(event, Progress)}
    assert ends["a"].finish == ends["b"].finish == "stop"
    assert ends["c"] == Failed("c", 422, "the engine refuses this job")
    assert two.pool.jobs == 0 and two.pool.info.vocab_size == 257
    two.wait(lambda: two.pool.resident_bytes > 2_000_000)


@needs_ray
def test_who_leaves_is_cancelled_within_a_step(two):
    async def leave():
        stream = two.pool.submit([job("gone", "!endless", max_new_tokens=10**5)])
        await stream.next(10)
        stream.close()

    two.run(leave())
    assert two.pool.jobs == 0
    two.wait(lambda: any(line.get("cancel") == "gone" for line in log_lines(two.log)))
    lines = log_lines(two.log)
    at = next(at for at, line in enumerate(lines) if line.get("cancel") == "gone")
    assert not any("gone" in line.get("running", []) for line in lines[at:])
    two.settle()


@needs_ray
def test_recipes_part_and_meet(two):
    async def work():
        streams = [
            two.pool.submit([job(f"{recipe}{number}", "!endless", recipe=recipe, max_new_tokens=50)])
            for number in range(3)
            for recipe in ("one", "two")
        ]
        lanes = [dict(slot.lanes) for slot in two.pool.slots]
        for stream in streams:
            await rest(stream)
        return lanes

    two.settle()
    assert sorted(two.run(work()), key=str) == [{"one": 3}, {"two": 3}]


@needs_ray
def test_a_replica_that_dies(two):
    async def work():
        bad = two.pool.submit([job("bad", "!later-crash and some words", recipe="bad")])
        with_it = two.pool.submit([job("with", "!endless", recipe="bad", max_new_tokens=4000)])
        other = two.pool.submit([job("other", "!endless", recipe="good", max_new_tokens=100)])
        return [await rest(stream) for stream in (bad, with_it, other)]

    two.settle()
    before = two.pool.restarts
    bad, with_it, other = two.run(work())
    for events in (bad, with_it):
        assert isinstance(events[-1], Failed) and events[-1].status == 503
    assert isinstance(other[-1], Done) and len(text(other, "other")) == 100
    assert two.pool.state == "ready" and sum(slot.ready for slot in two.pool.slots) == 1
    assert text(two.write(job())) == "hello"  # by the other one
    two.wait(lambda: all(slot.ready for slot in two.pool.slots), 60)
    assert two.pool.restarts == before + 1
    assert [text(two.write(job(recipe=recipe))) for recipe in "abc"] == ["hello"] * 3


@needs_ray
def test_over_http_behind_the_same_limits(two, monkeypatch):
    import uvicorn

    from tokenary.serve import app as module
    from tokenary.serve.text import Text

    monkeypatch.setattr(module.recipes, "methods", lambda kind: [])
    service = module.Service(two.settings, two.pool, Text(byte_tokenizer, 1000))

    async def nothing():
        pass

    monkeypatch.setattr(two.pool, "start", nothing)
    monkeypatch.setattr(two.pool, "stop", nothing)
    from tokenary.serve.server import Server, listen

    server = Server(service)
    with listen("127.0.0.1", 0) as found:
        serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[found]), two.loop)
        it = Running(service, f"http://127.0.0.1:{found.getsockname()[1]}", server)
        two.wait(lambda: server.started)
        two.wait(it.healthy)
        answer = it.ask("some text", n=2).json()
        assert [choice["text"] for choice in answer["choices"]] == ["some text"] * 2
        with httpx.stream(
            "POST", f"{it.url}/v1/completions", json={"prompt": "hello", "stream": True}, timeout=30
        ) as got:
            events = [json.loads(line[6:]) for line in got.iter_lines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == "hello"
        assert it.ask("x" * 2000).status_code == 413 and it.ask("!refuse").status_code == 422
        assert "tokenary_worker_up 1.0" in httpx.get(f"{it.url}/metrics").text
        server.should_exit = True
        serving.result(20)
    assert isinstance(server, uvicorn.Server) and two.pool.jobs == 0
