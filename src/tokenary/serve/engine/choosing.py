"""How each job of a lane chooses its tokens: by a sampler of its own, under a schema of its own."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from tokenary.core.errors import InputError, OptionError
from tokenary.core.sampling import Chooser
from tokenary.decode.awrs import AWRS
from tokenary.decode.awrs.constraint import Vocabulary
from tokenary.hf.strategy import Task
from tokenary.models import LM

_SCHEMAS = 32  # that are kept compiled


class Choosers:
    """One chooser for the sequences of a batch, each of which has its own.

    A chooser that fails, as where a constraint leaves no token, fails for its sequence alone.

    Attributes
    ----------
    of : dict
        The chooser of each sequence, by the index of the sequence; its own row is 0.
    failed : dict
        Errors by sequence; what is chosen after one means nothing.
    """

    def __init__(self) -> None:
        self.of: dict[int, Chooser] = {}
        self.failed: dict[int, Exception] = {}

    @property
    def greedy(self) -> bool:
        """Whether all choose the argmax."""
        return all(chooser.greedy for chooser in self.of.values())

    def __call__(self, logits: Tensor, rows: Sequence[int], histories: Sequence[Sequence[int]]) -> list[int]:
        """Choose from logits (n, V)."""
        return [self._one(logits[at], row, histories[at]) for at, row in enumerate(rows)]

    def _one(self, logits: Tensor, row: int, history: Sequence[int]) -> int:
        try:
            return self.of[row](logits[None], [0], [history])[0]
        except Exception as error:
            self.failed[row] = error
            return int(logits.argmax())


class Schemas:
    """JSON schemas as constraints, compiled once.

    Parameters
    ----------
    lm : LM
        Its tokens write the text.
    """

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, AWRS] = OrderedDict()

    def __contains__(self, schema: str) -> bool:
        return schema in self._compiled

    def add(self, schema: str, compiled: AWRS) -> None:
        """Keep what `compile` returned; the one not used for longest is let go."""
        self._compiled[schema] = compiled
        if len(self._compiled) > _SCHEMAS:
            self._compiled.popitem(last=False)

    def chooser(self, schema: str, task: Task) -> Chooser:
        """Return what chooses the tokens of a text that keeps a schema, which was added; one row."""
        self._compiled.move_to_end(schema)
        return self._compiled[schema].chooser(task)

    def compile(self, schema: str) -> AWRS:
        """Compile a schema; may run in a thread of its own, one at a time.

        Raises
        ------
        InputError, ConstraintError, UnsupportedModelError
            If it is no JSON schema, if no text keeps it, or without a tokenizer whose tokens are bytes.
        """
        try:
            given = json.loads(schema)
        except ValueError as error:
            raise InputError(f"the schema is no JSON: {error}") from None
        if not isinstance(given, dict):  # AWRS would take a plain string for the path of a file
            raise InputError("a schema is a JSON object")
        # Free white space would let a small model write blanks without end.
        space = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
        try:
            method = AWRS(json=json.dumps({"x-guidance": space} | given))
        except OptionError as error:
            raise InputError(f"the schema is not {error.expected}") from None
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self._lm.tokenizer, self._lm.vocab_size)
        method.bind(self._vocabulary)
        return method
