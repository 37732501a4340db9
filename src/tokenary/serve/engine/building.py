"""What takes long to make, such as the matcher of a schema, is made in a thread, while others write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")


class Builder:
    """A thread that makes one thing after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "builder")
        self._futures: dict[Hashable, Future[Any]] = {}

    def take(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """Return what is made under a name, once it is there; None until then. Raises what making it raised."""
        if key not in self._futures:
            self._futures[key] = self._thread.submit(make)
        return self._futures.pop(key).result() if self._futures[key].done() else None

    def keep(self, keys: Collection[Hashable]) -> None:
        """Forget what nobody waits for any more: all but these."""
        for key in self._futures.keys() - set(keys):
            self._futures.pop(key).cancel()

    def wait(self, seconds: float) -> None:
        """Wait until something is there, if anything is being made."""
        wait(self._futures.values(), seconds, FIRST_COMPLETED)
