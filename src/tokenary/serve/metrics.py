"""Figures for Prometheus, in a registry of the application's own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tokenary.serve.base_pool import BasePool
from tokenary.serve.protocol import Done

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one application.

    Parameters
    ----------
    pool : BasePool
        Asked for its state when the figures are read.
    """

    def __init__(self, pool: BasePool) -> None:
        self.registry = CollectorRegistry()
        to: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tokenary_requests", "Requests answered.", ["route", "status"], **to)
        self.in_flight = Gauge("tokenary_requests_in_flight", "Requests that hold a place.", **to)
        self.seconds = Histogram(
            "tokenary_request_seconds", "From head to last byte.", ["route"], buckets=_SECONDS, **to
        )
        self.first = Histogram("tokenary_first_token_seconds", "Until a text's first token.", buckets=_SECONDS, **to)
        self.queued = Histogram("tokenary_queued_seconds", "Until a text was begun.", buckets=_SECONDS, **to)
        self.finished = Counter("tokenary_texts", "Texts that ended.", ["finish"], **to)
        self.prompt = Counter("tokenary_prompt_tokens", "Tokens of prompts.", **to)
        self.new = Counter("tokenary_new_tokens", "Tokens written.", **to)
        self.passes = Counter("tokenary_passes", "Passes after the prompts', summed over texts.", **to)
        self.drafted = Counter("tokenary_drafted_tokens", "Tokens drafted.", **to)
        self.accepted = Counter("tokenary_accepted_tokens", "Drafted tokens that were accepted.", **to)
        Gauge("tokenary_texts_running", "Texts that run or wait.", **to).set_function(lambda: pool.jobs)
        Gauge("tokenary_worker_up", "1 while the worker can take texts.", **to).set_function(
            lambda: float(pool.state == "ready")
        )
        Gauge("tokenary_worker_restarts", "How often the worker was started again.", **to).set_function(
            lambda: pool.restarts
        )
        Gauge("tokenary_worker_resident_bytes", "Memory of the worker.", **to).set_function(lambda: pool.resident_bytes)

    def done(self, event: Done) -> None:
        """Count a text that ended."""
        self.finished.labels(event.finish).inc()
        self.prompt.inc(event.prompt_tokens)
        self.new.inc(event.new_tokens)
        self.passes.inc(event.passes)
        self.drafted.inc(event.drafted)
        self.accepted.inc(event.accepted)
        self.first.observe(event.first_token_seconds)
        self.queued.observe(event.queued_seconds)

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)
