"""Counts the parts of a corpus with Ray Data, on this machine or a cluster; needs the extra ``ray``.

A part is a few numbers and a path, so that the files must stand under the same paths on every machine. Tokenizers and
measures are sent once, and built once in each worker. The counts come back and are added up here.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenary.core.errors import InputError, TokenaryError
from tokenary.core.files import one_line
from tokenary.tokenize.audit import Counted, Engine, Work, count_part
from tokenary.tokenize.corpus import Part


def ray_engine(address: str | None = None, cpus: int | None = None) -> Engine:
    """Return an engine for `audit`.

    Parameters
    ----------
    address : str, optional
        Of a running cluster (``auto``, ``ray://host:10001``, ``host:6379``); without one a local cluster is started,
        and stopped at the end.
    cpus : int, optional
        Cores of the local cluster; all by default.

    Raises
    ------
    TokenaryError
        Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise TokenaryError("the engine ray needs Ray: pip install 'tokenary[ray]'") from None

    def engine(works: Sequence[Work], done: Callable[[int], None]) -> Iterator[Counted]:
        own = not ray.is_initialized()
        if own:
            connect(ray, address, cpus)
        log = logging.getLogger("ray.data")
        level = log.level
        log.setLevel(logging.CRITICAL)  # it tells of every start and end on stderr
        try:
            yield from _counted(ray, works, done)
        except ray.exceptions.RayError as error:
            raise TokenaryError(f"Ray failed: {one_line(error)}") from error
        finally:
            log.setLevel(level)
            if own:
                ray.shutdown()

    return engine


def connect(ray: Any, address: str | None, cpus: int | None) -> None:
    """Reach a cluster, or start one here.

    Parameters
    ----------
    ray : module
        Ray.
    address : str or None
        As in `ray_engine`.
    cpus : int or None
        Cores of the local cluster; all by default.

    Raises
    ------
    TokenaryError
        If the cluster cannot be reached.
    """
    if address and ":" in address:  # Ray itself goes on trying for minutes
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise TokenaryError(f"cannot reach the Ray cluster {address}: {one_line(error)}") from None
    options: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="error", **options)
    except Exception as error:  # of many classes
        raise TokenaryError(f"cannot reach the Ray cluster {address or 'here'}: {one_line(error)}") from error


@functools.lru_cache(maxsize=1)
def _shared(reference: Any) -> tuple[list[Part], Any, Any]:
    """Parts, tokenizers and measures; a worker builds them once."""
    import ray

    return ray.get(reference)


def _counted(ray: Any, works: Sequence[Work], done: Callable[[int], None]) -> Iterator[Counted]:
    shared = ray.put(([work.part for work in works], works[0].tokenizers, works[0].measures))

    def count(row: dict[str, Any]) -> dict[str, Any]:
        parts, tokenizers, measures = _shared(shared)
        part = parts[row["part"]]
        try:
            return {"nbytes": part.nbytes, "found": count_part(Work(part, tokenizers, measures))}
        except TokenaryError as error:  # Ray keeps no more than the text of an error
            return {"nbytes": 0, "found": str(error)}

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"part": i} for i in range(len(works))]
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(count).iter_rows():
        if isinstance(row["found"], str):
            raise InputError(row["found"])
        done(row["nbytes"])
        yield row["found"]
