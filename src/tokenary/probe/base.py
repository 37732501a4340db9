"""What a probe is, and what it reports."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tokenary.core.method import Method
from tokenary.models.lm import LM

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Table:
    """Rows to read.

    Parameters
    ----------
    title : str
        One line.
    columns : sequence of str
        Headings.
    rows : sequence
        As many cells each; numbers stay numbers, None is an empty cell.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Report:
    """What a probe found.

    Parameters
    ----------
    slug : str
        The probe.
    model : str
        Name of the model.
    figures : mapping
        Plain JSON types; a figure that the data cannot give is None, and a note says why.
    tables : sequence of Table
        The same for people.
    notes : sequence of str
        What a reader must know before believing a figure.
    """

    slug: str
    model: str
    figures: Mapping[str, Any]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types.

        Raises
        ------
        ValueError
            A figure is not finite or not of a JSON type.
        """
        whole = {
            "slug": self.slug,
            "model": self.model,
            "figures": self.figures,
            "tables": [vars(table) for table in self.tables],
            "notes": list(self.notes),
        }
        return dict(json.loads(json.dumps(whole, allow_nan=False)))


class Probe(Method):
    """Base of all probes. An instance holds options only: everything else is made anew for every run.

    Attributes
    ----------
    toy_options : mapping
        Options with which a run on a toy net takes a second or two.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def run(self, lm: LM, seed: int = 0, progress: Progress | None = None) -> Report:
        """Probe a model.

        Parameters
        ----------
        lm : LM
            A causal language model with its tokenizer; stays as it was.
        seed : int
            Names every random choice.
        progress : callable, optional
            Called with (done, total).

        Raises
        ------
        UnsupportedModelError
            The probe does not fit the model.
        """


def watched(items: Sequence[Any], progress: Progress | None) -> Iterable[Any]:
    """Yield the items, telling how many are done."""
    for done, item in enumerate(items):
        yield item
        if progress is not None:
            progress(done + 1, len(items))
