"""What a server is told once, when it starts; every limit stands here."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenary.core.errors import InputError, OptionError

_SHORTEST_KEY = 16


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Parameters
    ----------
    model : str
        A catalogue name, a folder, a ``.gguf`` file or a hub id.
    name : str
        What requests call it; by default the catalogue's name, or that of the folder or file.
    host, port : str, int
        Where it listens; port 0 takes a free one.
    api_key : str, optional
        Every route but ``/health`` and the playground's files asks for it.
    drain : float
        Seconds that running requests are given after SIGTERM.
    deadline : float
        Seconds for a request; a client may ask for less.
    max_wait : float
        Seconds after which a request of which no text was begun is refused.
    max_body : int
        Bytes.
    max_headers : int
        Header lines.
    max_header_bytes : int
        Bytes of all of them.
    max_in_flight : int
        Requests at a time; one more is refused.
    max_jobs : int
        Texts at a time, running and waiting: a request may ask for several.
    max_connections : int
        Open connections.
    max_prompt_bytes : int
        Of all prompts of a request together, before they are tokenized.
    max_schema_bytes : int
        Of a JSON schema.
    max_new_tokens : int
        Most tokens a text where a request does not say.
    receive_seconds : float
        In which the headers, and again the body, must have come.
    send_seconds : float
        In which a client must take what is written to it.
    keep_alive : float
        Seconds that an idle connection is kept.
    silence : float
        Seconds without an event after which a stream says that it lives.
    grace : float
        Seconds past its deadline after which a text is given up without the worker's word.
    stall : float
        Seconds without a sign of life after which a worker with work to do is killed.
    playground : bool
        Serve the page at ``/``.
    engine : str
        ``module:function`` that makes the engine in the worker; see `worker`.
    engine_options : dict
        Its arguments, plain JSON.
    backend : {"local", "ray"}
        Where the engine runs: in a worker process here, or in replicas on Ray Serve.
    replicas : int
        On Ray: models that are loaded.
    address : str, optional
        Of the Ray cluster; without one a cluster is started here and stopped at the end.
    gpus : float
        On Ray: GPUs a replica.
    """

    model: str = "smollm2"
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    drain: float = 30.0
    deadline: float = 60.0
    max_wait: float = 30.0
    max_body: int = 2_000_000
    max_headers: int = 256
    max_header_bytes: int = 65_536
    max_in_flight: int = 128
    max_jobs: int = 256
    max_connections: int = 512
    max_prompt_bytes: int = 262_144
    max_schema_bytes: int = 65_536
    max_new_tokens: int = 512
    receive_seconds: float = 10.0
    send_seconds: float = 30.0
    keep_alive: float = 5.0
    silence: float = 5.0
    grace: float = 5.0
    stall: float = 120.0
    playground: bool = True
    engine: str = "tokenary.serve.worker:load_engine"
    engine_options: dict[str, Any] = field(default_factory=dict)
    backend: Literal["local", "ray"] = "local"
    replicas: int = 1
    address: str | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise OptionError("port", self.port, "a number from 0 to 65535")
        for name in (
            "drain", "deadline", "max_wait", "receive_seconds", "send_seconds", "keep_alive", "silence", "grace",
            "stall",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise OptionError(name.replace("_", "-"), getattr(self, name), "a number above 0")
        for name in ("max_body", "max_in_flight", "max_jobs", "max_prompt_bytes", "max_new_tokens", "replicas"):
            if getattr(self, name) < 1:
                raise OptionError(name.replace("_", "-"), getattr(self, name), "an integer at least 1")
        if self.backend not in ("local", "ray"):
            raise OptionError("engine", self.backend, "local or ray")
        if self.backend == "local" and (self.replicas > 1 or self.address is not None or self.gpus):
            raise OptionError("engine", self.backend, "ray, where replicas, address or gpus are given")
        if self.gpus < 0:
            raise OptionError("gpus", self.gpus, "a number at least 0")
        if self.api_key is None and not is_loopback(self.host):
            raise OptionError("host", self.host, "a loopback address, or --api-key-file with a key for all who call")

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        from tokenary.core.errors import UnknownNameError
        from tokenary.models import find

        if self.name:
            return self.name
        path = Path(self.model).expanduser()
        if path.exists():
            return path.stem if path.is_file() else path.name
        try:
            return find(self.model).name
        except UnknownNameError:  # a hub id
            return self.model


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(path: str | os.PathLike[str]) -> str:
    """Read an API key from a file: its only line.

    Raises
    ------
    InputError
        If there is no such file, or no key of at least 16 printable ASCII characters in it.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read the key file {path}: {getattr(error, 'strerror', '') or 'no UTF-8'}") from None
    if len(text) < _SHORTEST_KEY or not text.isascii() or not text.isprintable() or " " in text:
        raise InputError(f"{path} holds no key: one line of at least {_SHORTEST_KEY} ASCII characters, no spaces")
    return text
