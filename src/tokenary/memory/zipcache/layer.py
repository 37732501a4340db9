"""What one layer stores: segments of every sequence of a batch, and the queries that the next ones are judged by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenary.memory.base import PerRow, StoreLayer, StorePolicy
from tokenary.memory.zipcache.quantizers import Scheme
from tokenary.memory.zipcache.saliency import Chooser
from tokenary.memory.zipcache.segment import Segment, attend


@dataclass(frozen=True, eq=False)
class Row:
    """What is held of one sequence: its segments, and queries of probes that are still to be used."""

    segments: tuple[Segment, ...] = ()
    seen: int = 0  # tokens observed
    planned: int = 0  # tokens whose probes are known
    probes: frozenset[int] = frozenset()  # those of the segment to come
    at: tuple[int, ...] = ()  # which tokens the queries belong to
    queries: Tensor | None = None  # (Hq, len(at), D)
    scaling: float = 1.0

    @property
    def stored(self) -> int:
        """Tokens in segments."""
        return sum(segment.shape[1] for segment in self.segments)


class ZipLayer(StoreLayer):
    """Segments of every sequence of a batch in one layer.

    Parameters
    ----------
    policy : StorePolicy
        Says how many new tokens are stored together.
    bits : tuple of int
        Of salient and of other tokens.
    schemes : tuple of str
        Of keys and of values.
    chooser : Chooser
        Which tokens are salient.
    """

    def __init__(
        self, policy: StorePolicy, bits: tuple[int, int], schemes: tuple[Scheme, Scheme], chooser: Chooser
    ) -> None:
        super().__init__(policy)
        self.bits, self.schemes, self.chooser = bits, schemes, chooser
        self.observes = chooser.asks
        self._rows: PerRow[Row] = PerRow()

    @property
    def nbytes(self) -> int:
        """Bytes of the segments, each once, and of the queries."""
        segments = {id(segment): segment for row in self._rows.values() for segment in row.segments}
        queries = {id(row.queries): row.queries.nbytes for row in self._rows.values() if row.queries is not None}
        return sum(queries.values()) + sum(segment.nbytes for segment in segments.values())

    @property
    def bits_per_value(self) -> float:
        """Bits that one stored number takes, with its part of scales, offsets and sets; nan if none is."""
        segments = [segment for row in self._rows.values() for segment in row.segments]
        numbers = sum(segment.numbers for segment in segments)
        return 8 * sum(segment.nbytes for segment in segments) / numbers if numbers else float("nan")

    def observe(self, row: int, query_states: Tensor, scaling: float) -> None:
        """Remember the queries of the prompt and, of later tokens, those of probes."""
        state = self._rows.get(row, Row())
        new = range(state.seen, state.seen + query_states.shape[1])
        chosen = list(new)
        if state.segments:
            while state.planned < new.stop:
                more = self.chooser.probes_of(state.planned, self.policy.interval)
                state = replace(state, planned=state.planned + self.policy.interval, probes=state.probes.union(more))
            chosen = [at for at in new if at in state.probes]
        if chosen:
            found = query_states.index_select(1, torch.tensor(chosen, device=query_states.device) - state.seen)
            queries = found if state.queries is None else torch.cat([state.queries, found], dim=1)
            state = replace(state, at=(*state.at, *chosen), queries=queries, scaling=scaling)
        self._rows[row] = replace(state, seen=new.stop)

    def take(self, row: int, keys: Tensor, values: Tensor, prompt: bool) -> int:
        """Store the prompt, or every full `interval` of later tokens."""
        n_open, width, taken = keys.shape[1], self.policy.interval, 0
        if prompt and n_open and not self._rows.get(row, Row()).segments:
            width = n_open
        while n_open - taken >= width:
            part = slice(taken, taken + width)
            self._store(row, keys[:, part], values[:, part])
            taken += width
        return taken

    def _store(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Make a segment of tokens (Hkv, n, D)."""
        state = self._rows.get(row, Row())
        first, context, queries = state.stored, keys, None
        stop = first + keys.shape[1]
        if state.queries is not None:
            probes = set(self.chooser.probes_of(first, keys.shape[1]))
            asked = [number for number, at in enumerate(state.at) if at in probes]
            queries = state.queries[:, asked]
            context = keys if not first else torch.cat([self.read(row)[0], keys], dim=1)
            later = [number for number, at in enumerate(state.at) if at >= stop]
            left = state.queries[:, later] if later else None
            state = replace(state, queries=left, at=tuple(state.at[number] for number in later))
        salient = self.chooser.choose(first, context, queries, state.scaling)
        segment = Segment.of(keys, values, salient, self.bits, self.schemes)
        self._rows[row] = replace(
            state,
            segments=(*state.segments, segment),
            planned=max(state.planned, stop),
            probes=frozenset(at for at in state.probes if at >= stop),
        )

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values stored, (Hkv, N, D), in the order of the tokens."""
        keys, values = zip(*(segment.read() for segment in self._rows[row].segments), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def attend(
        self, row: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend to what is stored, in the form it is stored in, and to open tokens."""
        segments = self._rows.get(row, Row()).segments
        return attend(segments, query, keys, values, mask, scale)
