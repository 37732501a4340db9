"""Runs the application on a socket: one process, slow heads are cut off, and SIGTERM lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenary.core.errors import InputError
from tokenary.serve.app import Service
from tokenary.serve.base_pool import LEAVING, BasePool
from tokenary.serve.pool import Pool
from tokenary.serve.settings import Settings

log = logging.getLogger("tokenary.serve")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Connection(H11Protocol):
    """A connection whose requests' heads must come in time, and which the application can break off."""

    head_seconds = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take data; the clock runs while a head has begun and is not complete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait_for_head()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self._abort()

    def _abort(self) -> None:
        self.transport.abort()


class Server(uvicorn.Server):
    """A server that drains.

    Parameters
    ----------
    service : Service
        What it serves.

    Attributes
    ----------
    failure : str
        Why it ended, if it had to.
    """

    def __init__(self, service: Service) -> None:
        settings = service.settings
        config = uvicorn.Config(
            service.gate,
            http=type("Connection", (Connection,), {"head_seconds": settings.receive_seconds}),
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=int(settings.keep_alive),
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=settings.max_header_bytes,
        )
        super().__init__(config)
        self.service, self.failure = service, ""
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and end when the service says that it can never answer."""
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._end_on_failure()))

    def stop(self) -> None:
        """Refuse new requests and end when the running ones have; called again, end now."""
        if self.service.gate.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.gate.draining = True
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        gate, until = self.service.gate, time.monotonic() + self.service.settings.drain
        log.info("shutting down: %d requests have up to %g s", gate.in_flight, self.service.settings.drain)
        while gate.in_flight and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.service.pool.give_up(LEAVING)
        self.should_exit = True

    async def _end_on_failure(self) -> None:
        self.failure = await asyncio.shield(self.service.failed)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGTERM and Ctrl-C, and exit as one who was asked to."""
        loop = asyncio.get_running_loop()
        try:
            for name in _SIGNALS:
                loop.add_signal_handler(name, self.stop)
        except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            with super().capture_signals():
                yield
            return
        try:
            yield
        finally:
            for name in _SIGNALS:
                loop.remove_signal_handler(name)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket to listen on.

    Raises
    ------
    InputError
        If the address is not free or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _pool(settings: Settings) -> BasePool:
    """Return what writes: a worker process here, or replicas on Ray Serve."""
    if settings.backend == "local":
        return Pool(settings)
    from tokenary.serve.ray_pool import RayPool

    return RayPool(settings)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    settings : Settings
        Everything.

    Raises
    ------
    InputError
        If the address is taken, or the model cannot be loaded.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    service = Service(settings, _pool(settings))
    server = Server(service)
    with listen(settings.host, settings.port) as found:
        host, port = found.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("%s on %s%s", service.desk.name, address, ", playground included" if settings.playground else "")
        asyncio.run(server.serve(sockets=[found]))
    if server.failure:
        raise InputError(server.failure)
