"""The record of a comparison, whatever it compares: plain JSON, written and read whole."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import psutil

from tokenary.core.claim import device_name, versions
from tokenary.core.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1


@dataclass(frozen=True)
class ComparisonRecord(ABC):
    """A record, and its files ``results.json`` and ``report.html``.

    Parameters
    ----------
    record : dict
        Plain JSON types, with ``schema``, ``tool``, ``complete`` and ``warnings`` at least.

    Attributes
    ----------
    tool : str
        The command that makes such records.
    """

    record: dict[str, Any]
    tool: ClassVar[str]

    @property
    def complete(self) -> bool:
        """False if it was interrupted."""
        return self.record["complete"]

    @property
    def warnings(self) -> list[str]:
        """What the reader should know before trusting the figures."""
        return self.record["warnings"]

    def to_json(self) -> dict[str, Any]:
        """Return the record, plain JSON types."""
        return self.record

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ``results.json``.

        Raises
        ------
        InputError
            The file is not there, or is no record of this tool and version.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("tool") != cls.tool or record.get("schema") != SCHEMA:
            raise InputError(f"{path} is no record of {cls.tool} (version {SCHEMA})")
        return cls(record)

    def write(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``results.json`` and ``report.html``, each to a temporary name first; return their paths.

        Raises
        ------
        InputError
            The folder cannot be written, or the disk is full; nothing half-written is left.
        """
        text = json.dumps(self.record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        results, report = write_texts(Path(folder), {"results.json": text, "report.html": self.page()})
        return results, report

    @abstractmethod
    def table(self) -> Table:
        """Return the table for a terminal."""

    @abstractmethod
    def page(self) -> str:
        """Return the report as one HTML page."""


def write_texts(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write text files under temporary names, then rename them all.

    Raises
    ------
    InputError
        One line on what the system refused.
    """
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with temporary[name].open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        for name in files:
            os.replace(temporary[name], folder / name)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return [folder / name for name in files]


@dataclass(frozen=True)
class Start:
    """When a measurement began.

    Parameters
    ----------
    at : datetime
        By the calendar.
    clock : float
        By the clock that measures, in seconds.
    load : float, optional
        Of the machine, the mean of the minute before, where the system tells.
    """

    at: datetime.datetime
    clock: float
    load: float | None

    @classmethod
    def now(cls) -> Self:
        """Start."""
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        return cls(datetime.datetime.now(datetime.UTC), time.perf_counter(), load)

    def head(self, tool: str, complete: bool, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return what every record begins with: what made it, when, with which model, machine and versions."""
        import torch

        return {
            "schema": SCHEMA,
            "tool": tool,
            "date": self.at.isoformat(timespec="seconds"),
            "minutes": round((time.perf_counter() - self.clock) / 60, 2),
            "complete": complete,
            "model": dict(model),
            "machine": {
                "device": device_name(),
                "system": platform.platform(terse=True),
                "cores": os.cpu_count(),
                "memory_bytes": psutil.virtual_memory().total,
                "threads": torch.get_num_threads(),
                "load_average": self.load,
            },
            "versions": versions(),
        }

    def warnings(self) -> list[str]:
        """Say so where other work was going on."""
        cores = os.cpu_count() or 1
        if self.load is None or self.load <= 0.75 * cores:
            return []
        return [f"the machine was busy when the run began (load {self.load:.1f} on {cores} cores): times are long"]


def plain_json(value: Any) -> Any:
    """Tuples to lists, numbers that JSON lacks to None."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
