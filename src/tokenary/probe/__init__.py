"""What tokens hold, and where models break.

A `Probe` asks a model many small questions and returns a `Report`: figures in plain JSON types, tables to read, and
notes that say what the figures cannot. Methods are found by class name, for example ``tokenary.probe.CharBench``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokenary.core.registry import room_attribute

_HOME = {"Probe": "base", "Report": "base", "Table": "base"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tokenary.probe.{_HOME[name]}"), name)
    return room_attribute("probe", name)
