"""One haystack under many memories: its prompt is read as few times as possible.

Three kinds of methods leave the reading of a prompt as it is: keep policies and stores, which reduce at its end, and
readers that choose only behind it. One prefill over a full cache serves them all, and all of them look on; then each
keep policy and store reduces a copy of the cache, and each reader reads the cache itself. Whoever turns out to attend
to the prompt in its own way reads it anew, alone.

A question is scored as a draft that is rolled back, so that the next one finds the memory as it was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenary.bench.haystack import Haystack, Question
from tokenary.core.errors import TokenaryError
from tokenary.core.tree import TokenTree
from tokenary.hf.cache import PassInfo, TokenLayer
from tokenary.hf.target import Target, attached
from tokenary.memory.base import KeepLayer, KeepPolicy, ReadLayer, StoreLayer
from tokenary.memory.read_base import PartialRead
from tokenary.models import LM

Methods = dict[str, Any]
States = dict[str, list[Any]]
SLOTS = ("keep", "read", "store")


@dataclass(frozen=True)
class Answers:
    """What one memory made of one haystack.

    Parameters
    ----------
    losses : tuple of float
        Nats a token, one a question.
    right : tuple of (float or None)
        Share of what was hidden that greedy decoding would write; None where only the loss counts.
    kv_bytes : int
        Bytes of keys, values and bookkeeping behind the prompt.
    read_tokens : float
        Most tokens that the query behind the prompt reads, itself included, mean over the layers.
    seconds : float
        Of its own reading of the prompt or reduction, and of the questions; a prompt that was shared is not counted.
    prompt_share : float or None
        Share of the prompt's pairs that were looked at, where a reader counts them (its layers' ``density``).
    """

    losses: tuple[float, ...]
    right: tuple[float | None, ...]
    kv_bytes: int
    read_tokens: float
    seconds: float
    prompt_share: float | None = None


@torch.inference_mode()
def read_haystack(
    lm: LM, haystack: Haystack, recipes: dict[str, Methods], told: Callable[[str], None] = lambda name: None
) -> Iterator[tuple[str, Answers | TokenaryError]]:
    """Ask every memory all questions of a haystack.

    Parameters
    ----------
    lm : LM
        The model, causal.
    haystack : Haystack
        What is read and asked.
    recipes : dict
        For each name the methods by slot (``keep``, ``read``, ``store``), ready for the model; none is a full cache.
    told : callable
        Called with a name before its work begins; with ``prompt`` before the shared reading.

    Yields
    ------
    str, Answers or TokenaryError
        Those that share the prompt first. A method that does not work with the model says so instead of answering.
    """
    told("prompt")
    shared = {name: states for name, methods in recipes.items() if _may_share(states := states_of(lm, methods))}
    whole, own = _read_prompt(lm, haystack, shared)
    full = whole.nbytes
    for name, states in shared.items():
        if name in own:
            continue
        told(name)
        try:
            yield name, _shared(lm, whole, haystack, states, recipes[name], full)
        except TokenaryError as error:
            yield name, error
        _install(whole, {})
    del whole
    for name in recipes:
        if name not in shared or name in own:
            told(name)
            try:
                yield name, _alone(lm, haystack, recipes[name])
            except TokenaryError as error:
                yield name, error


def _shared(lm: LM, whole: Target, haystack: Haystack, states: States, methods: Methods, full: int) -> Answers:
    """Let one memory go on behind a prompt that was read, and ask it."""
    began = time.perf_counter()
    if set(states) <= {"read"}:  # changes nothing of what is held
        _install(whole, states)
        return _asked(lm, whole, haystack, states, methods, full, began)
    target = _copied(whole)
    _install(target, states)
    target.cache.begin(PassInfo(prompt=True))  # nothing is new, but the prompt ends here
    target.cache.commit([[]])
    return _asked(lm, target, haystack, states, methods, target.nbytes - _bytes_of_readers(states), began)


def _alone(lm: LM, haystack: Haystack, methods: Methods) -> Answers:
    """Read the prompt for one memory only, and ask it."""
    began, states = time.perf_counter(), states_of(lm, methods)
    target = Target(lm.model, *(states.get(slot) for slot in SLOTS))
    with attached(lm.model):
        target.prefill([haystack.ids])
    return _asked(lm, target, haystack, states, methods, target.nbytes - _bytes_of_readers(states), began)


def states_of(lm: LM, methods: Methods) -> States:
    """Return fresh state for every layer, by slot."""
    made: States = {}
    for slot, method in methods.items():
        args = (lm.model.config, lm.dtype) if isinstance(method, KeepPolicy) else (lm.model.config,)
        made[slot] = method.attach(*args)
    return made


def _may_share(states: States) -> bool:
    """Whether the prompt may be read as with a full cache; of readers it is seen then."""
    return all(_looks_on(state) for found in states.values() for state in found if state is not None)


def _looks_on(state: Any) -> bool:
    if isinstance(state, KeepLayer):  # one that chooses in a way of its own may count the new tokens
        return not state.attends and type(state).keep is KeepLayer.keep
    return isinstance(state, StoreLayer) or (isinstance(state, ReadLayer) and not state.unrotated)


def _open_layers(target: Target) -> list[tuple[int, TokenLayer]]:
    """The layers that methods act on: those whose window does not bound them already."""
    return [(index, layer) for index, layer in enumerate(target.cache.token_layers) if layer.sliding_window is None]


def _install(target: Target, states: States) -> None:
    """Let layers be kept, read and stored by these states, and by nothing else."""
    for index, layer in _open_layers(target):
        layer.policy, layer.reader, layer.store = (states[slot][index] if slot in states else None for slot in SLOTS)


def _read_prompt(lm: LM, haystack: Haystack, others: dict[str, States]) -> tuple[Target, set[str]]:
    """Read the prompt over a full cache while others look on; return also who would have read it in its own way."""
    target, own = Target(lm.model), set[str]()
    for index, layer in _open_layers(target):
        found = {slot: {name: each[slot][index] for name, each in others.items() if slot in each} for slot in SLOTS}
        placed: list[Any] = [Onlookers(found[slot], own) for slot in SLOTS]
        layer.policy, layer.reader, layer.store = placed
    with attached(lm.model):
        target.prefill([haystack.ids])
    _install(target, {})
    return target, own


def _copied(whole: Target) -> Target:
    """A target with a cache of its own."""
    target = copy.copy(whole)
    target.cache = copy.deepcopy(whole.cache)
    return target


class Onlookers:
    """Stands where one policy, store or reader would, and shows a prompt to several; none of them changes anything yet.

    Parameters
    ----------
    states : dict of str to KeepLayer, StoreLayer, ReadLayer or None
        Of one layer, by name.
    own : set of str
        The names of those that cannot go on behind a prompt that was read for all: they attend to it in a way of their
        own, or do not work with the model. They are asked no more.
    """

    takes = attends = unrotated = False
    nbytes = 0

    def __init__(self, states: dict[str, Any], own: set[str]) -> None:
        self.states, self.own = {name: state for name, state in states.items() if state is not None}, own
        self.watching = {name: state for name, state in self.states.items() if getattr(state, "observes", False)}
        self.observes = bool(self.watching)

    def _tell(self, states: dict[str, Any], what: str, *shown: Any) -> None:
        for name, state in states.items():
            if name not in self.own:
                try:
                    if getattr(state, what)(*shown) is not None:
                        self.own.add(name)
                except TokenaryError:
                    self.own.add(name)

    def observe_prompt(self, row: int, query_states: Tensor, key_states: Tensor, scaling: float) -> None:
        """Show a piece of the prompt; see `KeepLayer.observe_prompt`."""
        self._tell(self.watching, "observe_prompt", row, query_states, key_states, scaling)

    def observe(self, row: int, query_states: Tensor, scaling: float) -> None:
        """Show queries; see `StoreLayer.observe`."""
        self._tell(self.watching, "observe", row, query_states, scaling)

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Ask readers whether they attend in a way of their own; see `ReadLayer.attend`."""
        self._tell(self.states, "attend", layer, query, key, value, mask, scale)

    def keep(self, row: int, held: int, n_new: int, prompt: bool) -> None:
        """Keep everything."""

    def take(self, row: int, keys: Tensor, values: Tensor, prompt: bool) -> int:
        """Store nothing."""
        return 0

    def room(self, row: int, held: int) -> None:
        """Any number."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """There is one row."""

    def join(self, other: Any, rows: int) -> None:
        """No other row joins."""


def _asked(
    lm: LM, target: Target, haystack: Haystack, states: States, methods: Methods, held: int, began: float
) -> Answers:
    """Ask all questions; `held` are the bytes of the cache, without those of readers, who learn while they read."""
    with attached(lm.model):
        scores = [_score(target, question) for question in haystack.questions]
    counted = [state.density for state in states.get("read", ()) if hasattr(state, "density")]
    return Answers(
        losses=tuple(loss for loss, _ in scores),
        right=tuple(right for _, right in scores),
        kv_bytes=held + _bytes_of_readers(states),
        read_tokens=_read_tokens(target, methods.get("read")),
        seconds=time.perf_counter() - began,
        prompt_share=sum(counted) / len(counted) if counted else None,
    )


def _bytes_of_readers(states: States) -> int:
    return sum(state.nbytes for state in states.get("read", ()) if state is not None)


def _score(target: Target, question: Question) -> tuple[float, float | None]:
    """Score one question; the target stays as it was."""
    answer = torch.tensor(question.answer)
    logits = target.score(TokenTree.chains([[*question.ids, *question.answer[:-1]]]))[0, -len(answer) :].float()
    target.commit([[]])
    losses = torch.nn.functional.cross_entropy(logits, answer.to(logits.device), reduction="none")
    return question.score(losses.tolist(), logits.argmax(-1).tolist())


def _read_tokens(target: Target, reader: Any) -> float:
    """Most tokens that the query behind the prompt reads, itself included, mean over the layers."""
    counts = []
    for layer in target.cache.token_layers:
        seen = layer.held[0] + 1
        if layer.reader is not None and isinstance(reader, PartialRead):
            seen = int(reader.most(torch.tensor([[seen]])))
        elif layer.sliding_window is not None:
            seen = min(seen, layer.sliding_window)
        counts.append(seen)
    return sum(counts) / len(counts)
