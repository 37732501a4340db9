"""The laws of routing between models: those of every strategy."""

from __future__ import annotations

from tokenary.core.laws import LawFunction
from tokenary.strategy_laws import STRATEGY_LAWS

LAWS: dict[str, tuple[LawFunction, ...]] = {"strategy": STRATEGY_LAWS}
