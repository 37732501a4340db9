"""A real server on loopback over the double of the engine, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tokenary.core.spelling import CHAR_OF
from tokenary.serve.app import Service
from tokenary.serve.server import Server, listen
from tokenary.serve.settings import Settings
from tokenary.serve.text import Text

HERE = Path(__file__).parent
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def byte_backend() -> Tokenizer:
    """Bytes are their own ids, 256 ends."""
    backend = Tokenizer(BPE({CHAR_OF[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Decoder()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return backend


@functools.cache
def byte_tokenizer() -> Any:
    """The same for transformers, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_backend(), eos_token="<end>", chat_template=TEMPLATE)


class LightTokenizer:
    """As much of it as completions need: transformers takes seconds to import."""

    chat_template = None

    def __init__(self) -> None:
        self.backend_tokenizer = byte_backend()

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


class Running:
    """A server in a thread."""

    def __init__(self, service: Service, url: str, server: Server) -> None:
        self.service, self.url, self.server = service, url, server

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def wait(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.02)

    def healthy(self) -> bool:
        return httpx.get(f"{self.url}/health").status_code == 200

    def ask(self, prompt: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"prompt": prompt, **more}, timeout=30)


@contextlib.contextmanager
def running(
    options: dict[str, Any] | None = None, /, *, ready: bool = True, text: Text | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve the double with these options, unless the settings, which are the rest, name another engine."""
    double = {"model": "fake", "port": 0, "engine": "fake_engine:create", "drain": 5.0}
    made = Settings(**{**double, **settings}, engine_options=options or {})
    service = Service(made, text=text or Text(byte_tokenizer, made.max_prompt_bytes))
    server = Server(service)
    with pytest.MonkeyPatch.context() as patch, listen(made.host, 0) as found:
        patch.setenv("PYTHONPATH", str(HERE))  # the worker imports the double
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[found])), daemon=True)
        thread.start()
        it = Running(service, f"http://127.0.0.1:{found.getsockname()[1]}", server)
        try:
            it.wait(lambda: server.started)
            if ready:
                it.wait(it.healthy, 60)
            yield it
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def log_lines(path: Path) -> list[dict[str, Any]]:
    """What the engine's double wrote down."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


#: Like `tokenary serve`, but for what takes seconds to import: the methods, a model's tokenizer, the engine.
CODE = """
import json, sys
from running import LightTokenizer
from tokenary import models
from tokenary.serve import recipes
from tokenary.serve.server import run
from tokenary.serve.settings import Settings
recipes.methods = lambda kind: []
models.load_tokenizer = lambda model: LightTokenizer()
run(Settings(**json.loads(sys.argv[1])))
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, **settings):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = {"model": "fake", "port": port, "engine": "fake_engine:create", **settings}
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(options)], env=env, stderr=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        end = time.monotonic() + 60
        while self.health() != 200:
            assert self.popen.poll() is None and time.monotonic() < end, self.popen.stderr.read()
            time.sleep(0.05)
        return self

    def __exit__(self, *error):
        self.popen.kill()
        self.popen.wait()
        self.popen.stderr.close()

    def health(self):
        try:
            return httpx.get(f"{self.url}/health").status_code
        except httpx.HTTPError:
            return 0

    def stream(self, tokens):
        asked = {"prompt": "!endless ", "max_tokens": tokens, "stream": True}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=asked, timeout=30)
