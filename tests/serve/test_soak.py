"""Many clients at once, some of them rude, and a worker that is killed under them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time

import httpx
import psutil
from running import Process

CLIENTS, ROUNDS, ASKED = 64, 3, 3
MEMORY = 48 << 20  # how much a round more may hold


class Client:
    """One client: asks one thing after the other, and checks that each answer is its own."""

    def __init__(self, http: httpx.AsyncClient, number: int, tally: dict[str, int]) -> None:
        self.http, self.number, self.tally = http, number, tally
        self.random = random.Random(number)

    async def run(self, turn: int) -> None:
        for at in range(ASKED):
            kind = self.random.choice([self.whole, self.streamed, self.left, self.several, self.bad, self.large])
            outcome = await kind(f"client {self.number} turn {turn} asks {at}")
            self.tally[outcome] = self.tally.get(outcome, 0) + 1

    async def post(self, **body):
        return await self.http.post("/v1/completions", json=body)

    async def whole(self, text: str) -> str:
        answer = await self.post(prompt=text)
        if answer.status_code == 503:
            return "lost"
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == text
        return "whole"

    async def several(self, text: str) -> str:
        answer = await self.post(prompt=[text, text[::-1]], n=2, model="fake+token-recycling")
        if answer.status_code == 503:
            return "lost"
        assert [choice["text"] for choice in answer.json()["choices"]] == [text, text, text[::-1], text[::-1]]
        return "whole"

    async def streamed(self, text: str, leave: int = 10**9) -> str:
        got, error = "", ""
        body = {"prompt": text, "stream": True, "max_tokens": 3000}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 503:
                return "lost"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    error = event.get("error", {}).get("message", error)
                    got += event["choices"][0]["text"] if "choices" in event else ""
                if len(got) > leave:
                    return "left"
        assert text.startswith(got) and (got == text or "worker died" in error), (got, error)
        return "lost" if error else "whole"

    async def left(self, text: str) -> str:
        return await self.streamed(f"!endless {text}" * 20, self.random.randint(1, 60))

    async def bad(self, text: str) -> str:
        bodies = [b"", b"{", b"[" * 50_000, b'{"prompt": 3}', b'{"prompt": "x", "n": 99}', b"\xff"]
        answer = await self.http.post(
            "/v1/completions", content=self.random.choice(bodies), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422
        return "refused"

    async def large(self, text: str) -> str:
        assert (await self.post(prompt="x" * 300_000)).status_code == 413
        return "refused"


def figure(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def test_nothing_is_lost_or_crossed_and_everything_is_freed():
    with Process(engine_options={"delay": 0.002}, max_jobs=512) as server:
        parent = psutil.Process(server.popen.pid)
        resident, tally = [], {}

        async def one_round(turn: int) -> None:
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
                clients = [Client(http, number, tally) for number in range(CLIENTS)]
                working = asyncio.gather(*(client.run(turn) for client in clients))
                if turn == 1:
                    await asyncio.sleep(0.3)
                    (worker,) = parent.children()
                    os.kill(worker.pid, signal.SIGKILL)
                await working

        for turn in range(ROUNDS):
            asyncio.run(one_round(turn))
            end = time.monotonic() + 30
            while server.health() != 200 or figure(server.url, "tokenary_texts_running"):
                assert time.monotonic() < end, "texts run on, or the worker did not come back"
                time.sleep(0.05)
            assert figure(server.url, "tokenary_requests_in_flight") == 0
            resident.append(parent.memory_info().rss)
            assert tally.get("lost", 0) == 0 or turn >= 1
        assert tally["whole"] > CLIENTS and tally["left"] > 5 and tally["refused"] > 20
        assert tally["lost"] > 0 and figure(server.url, "tokenary_worker_restarts") == 1
        assert resident[-1] - resident[0] < MEMORY, resident
        assert len(parent.children()) == 1 and parent.num_fds() < 40
