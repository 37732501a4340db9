"""Text in, text out: a model, a recipe and some prompts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tokenary.core.decoding import Decoding, Emission, Running, Trace
from tokenary.core.errors import InputError, OptionError, RecipeError, UnsupportedModelError
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Chooser, Sampler
from tokenary.decode.any_subset_ar import ASSD
from tokenary.decode.base import Loop
from tokenary.decode.denoise import Denoise
from tokenary.hf.packing import pack_linears
from tokenary.hf.strategy import Strategy, Task
from tokenary.hf.target import attached, check_causal
from tokenary.models import LM
from tokenary.models import load as load_plain


def load(
    name: str | os.PathLike[str] = "smollm2",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    optimize: bool = True,
    progress: bool = False,
) -> LM:
    """Load a language model, ready to run; see `tokenary.models.load`.

    Parameters
    ----------
    name : str or path
        A catalogue name, a folder, a ``.gguf`` file or a hub id.
    dtype : str or torch.dtype
        ``"auto"`` is bfloat16 where the machine has instructions for it, else float32.
    device : str or torch.device, optional
        By default the GPU where there is one.
    optimize : bool
        Pack the linear layers for the CPU's matrix kernels; the model is then for inference only.
    progress : bool
        Show a progress bar while weights are fetched.
    """
    lm = load_plain(name, dtype=dtype, device=device, progress=progress)
    if optimize:
        pack_linears(lm.model)
    return lm


@dataclass(frozen=True)
class Stats:
    """What a generation cost.

    Parameters
    ----------
    prompt_tokens, new_tokens : int
        Of this sequence.
    seconds : float
        From the start of its batch to its last token.
    first_token_seconds : float
        From the start of its batch to its first token.
    kv_bytes : int
        Most bytes of keys, values and bookkeeping that the batch held between passes.
    finish : str
        ``stop`` (end token or stop text), ``length``, or ``cancelled``.
    recipe : str
        Canonical text of the recipe.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    first_token_seconds: float
    kv_bytes: int
    finish: str
    recipe: str

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the prompt's reading included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Branch:
    """One of several sequences that were written for a prompt.

    Parameters
    ----------
    text : str
        Without special tokens.
    token_ids : list of int
        Its new tokens.
    log_weight : float
        An importance weight or a log-probability, in nats; the method says which.
    finish : str
        ``stop``, ``length``, ``pruned`` or ``cancelled``.
    given : int
        Tokens at its beginning that the model did not choose, such as a header.
    """

    text: str
    token_ids: list[int]
    log_weight: float
    finish: str
    given: int = 0


@dataclass(frozen=True)
class Output:
    """One generated text.

    Parameters
    ----------
    text : str
        Without special tokens.
    token_ids : list of int
        The tokens the model emitted, the end token included.
    trace : Trace
        Passes, drafted and accepted tokens.
    stats : Stats
        Cost.
    branches : tuple of Branch
        What the text was made from, where a method writes several sequences for one prompt.
    """

    text: str
    token_ids: list[int]
    trace: Trace
    stats: Stats
    branches: tuple[Branch, ...] = ()

    @property
    def written(self) -> int:
        """Tokens that the model chose: of all branches, where there are some; what several begin with counts once."""
        if not self.branches:
            return len(self.token_ids) - self.trace.given
        total = 0
        before: list[int] = []
        for branch in sorted(self.branches, key=lambda branch: branch.token_ids):
            ids = branch.token_ids
            shared = next((at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            total += len(ids) - max(shared, branch.given)
            before = ids
        return total

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        parts = {"trace": asdict(self.trace), "stats": asdict(self.stats)}
        branches = {"branches": [asdict(branch) for branch in self.branches]} if self.branches else {}
        return {"text": self.text, "token_ids": self.token_ids, **parts, **branches}


@dataclass(frozen=True)
class Piece:
    """Text that one pass added to one sequence.

    Parameters
    ----------
    row : int
        Which prompt.
    text : str
        New text, as far as all before it is there; a character that is not complete yet waits for the next piece.
    token_ids : list of int
        New tokens.
    from_draft : list of bool
        Which of them came from a draft.
    finish : str or None
        Why the sequence ended, if it did.
    branch : int or None
        Which branch of the prompt; None for the answer itself.
    copy_of : int or None
        The branch starts anew as a copy of this one, as that was before this piece.
    at : list of int or None
        Where the tokens were placed, counted from the end of the prompt; None where they were appended.
    """

    row: int
    text: str
    token_ids: list[int]
    from_draft: list[bool]
    finish: str | None
    branch: int | None = None
    copy_of: int | None = None
    at: list[int] | None = None


def build(lm: LM, recipe: Recipe) -> dict[str, Any]:
    """Construct the methods of a recipe and get them ready for a model, keyed by slot.

    Raises
    ------
    UnsupportedModelError
        If one of them is made for another kind of model, or does not work with this one.
    """
    _fits(lm, recipe)
    methods = recipe.build()
    for method in methods.values():
        if isinstance(method, Strategy):
            method.prepare(lm.model, lm.tokenizer)
    if "draft" in methods:
        methods["draft"].prepare(lm.vocab_size, lm.tokenizer)
    for slot in ("keep", "read"):
        if slot in methods:
            methods[slot].prepare(lm.model)
    return methods


def _build(lm: LM, recipe: Recipe) -> dict[str, Any]:
    """Take the methods that this model already warmed up, or build them."""
    if recipe not in lm.warm:
        lm.warm[recipe] = build(lm, recipe)
    return lm.warm[recipe]


def _fits(lm: LM, recipe: Recipe) -> None:
    """Refuse methods that are made for another kind of model.

    Raises
    ------
    UnsupportedModelError
        Naming the method, and the kind of model it needs.
    """
    for step in recipe.steps:
        kinds = step.card.model_kinds
        if lm.kind not in kinds:
            raise UnsupportedModelError(
                f"{step.slug} works on {' or '.join(kinds)} models; {lm.name} is a model of the kind {lm.kind}"
            )


class Generation:
    """One batch under way. Iterate over its pieces, or `passes`, to run it; stop to cancel; `outputs` at any time.

    Parameters
    ----------
    lm : LM
        The model.
    prompts : sequence of str or of token ids
        Strings are user messages, put through the chat template where the model has one.
    recipe : str, Recipe or None
        Methods to use; what they learned stays with `lm`.
    max_new_tokens : int
        At least 1; or 0, where every prompt has masks to fill.
    sampler : Sampler
        Greedy or sampling.
    raw : bool
        Continue plain text, without a chat template.
    stop : sequence of str
        Texts that end a sequence.
    """

    def __init__(
        self,
        lm: LM,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        recipe: str | Recipe | None,
        max_new_tokens: int,
        sampler: Sampler,
        raw: bool = False,
        stop: Sequence[str] = (),
    ) -> None:
        if max_new_tokens < 0:
            raise OptionError("max_new_tokens", max_new_tokens, "an integer at least 1")
        self.lm, self.recipe = lm, Recipe.parse(recipe).for_writing()
        self._mask = getattr(lm.model.config, "mask_token_id", None)
        _fits(lm, self.recipe)
        methods = _build(lm, self.recipe)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        ids = lm.encode(texts, raw=raw) if texts else [list(map(int, prompt)) for prompt in prompts]
        if len(ids) != len(prompts):
            raise InputError("prompts are either all texts or all token ids")
        for number, row in enumerate(ids, start=1):
            if not row:
                raise InputError(f"prompt {number} is empty")
            if not max_new_tokens and self._mask not in row:
                raise OptionError("max_new_tokens", max_new_tokens, f"at least 1: prompt {number} has nothing to fill")
            if len(row) + max_new_tokens > lm.context_length:
                raise InputError(
                    f"prompt {number} has {len(row)} tokens; with max_new_tokens={max_new_tokens} that is past"
                    f" {lm.name}'s context of {lm.context_length}"
                )
        self._stop = tuple(stop)
        self._loop = self._make_loop(methods, ids, max_new_tokens, sampler)
        self._began = 0.0
        self._first = self._last = [0.0] * len(ids)
        self._shown: dict[tuple[int, int | None], tuple[int, int]] = {}  # tokens whose text was shown, decoding start

    def _make_loop(self, methods: dict[str, Any], ids: list[list[int]], new: int, sampler: Sampler) -> Running:
        """Return the ordinary loop, or that of a method that brings its own."""
        lm = self.lm
        task = task_of(lm, methods, ids, new, sampler, self._stops if self._stop else None)
        strategies = [method for method in methods.values() if isinstance(method, Strategy)]
        owner = next((method for method in strategies if method.owns_loop), None)
        if owner is not None:
            if "draft" in methods:
                raise RecipeError(f"{owner.card.slug} writes with a loop of its own, which takes no drafts")
            return owner.loop(task)
        if lm.kind == "diffusion":
            return Denoise(task, methods.get("unmask"), methods.get("window"))
        if lm.kind == "any-subset":
            return ASSD(k=1).loop(task)  # a token a pass
        check_causal(lm.model)
        chooser: Chooser = strategies[0].chooser(task) if strategies else sampler
        return Loop(task.target(), ids, chooser, new, task.end_tokens, methods.get("draft"), task.stops)

    def __iter__(self) -> Iterator[Piece]:
        for pieces in self.passes():
            yield from pieces

    def passes(self) -> Generator[list[Piece], None, None]:
        """Run, and yield what each pass added: nothing, where it read a piece of a long prompt."""
        count = len(self._loop.sequences)
        self._first, self._last = [0.0] * count, [0.0] * count
        self._began = time.perf_counter()
        with attached(self.lm.model) if self.lm.kind == "causal" else contextlib.nullcontext():
            for emissions in self._loop:
                now = time.perf_counter() - self._began
                for row in {emission.row for emission in emissions}:
                    self._first[row], self._last[row] = self._first[row] or now, now
                yield [Piece(text=self._new_text(emission), **vars(emission)) for emission in emissions]

    @property
    def sequences(self) -> list[Decoding]:
        """The answers under way, in the order of the prompts."""
        return self._loop.sequences

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys, values and bookkeeping held between two passes so far."""
        return self._loop.peak_bytes

    @property
    def outputs(self) -> list[Output]:
        """What was generated so far, in the order of the prompts."""
        made = []
        for row, sequence in enumerate(self._loop.sequences):
            stats = Stats(
                prompt_tokens=sequence.n_prompt,
                new_tokens=len(sequence.new_ids),
                seconds=self._last[row],
                first_token_seconds=self._first[row],
                kv_bytes=self._loop.peak_bytes,
                finish=sequence.finish or "cancelled",
                recipe=str(self.recipe),
            )
            branches = tuple(
                Branch(self._text(b.new_ids), b.new_ids, b.log_weight, b.finish or "cancelled", b.trace.given)
                for b in self._loop.branches[row]
            )
            made.append(Output(self._text(sequence.new_ids), sequence.new_ids, sequence.trace, stats, branches))
        return made

    def _text(self, ids: list[int]) -> str:
        return "" if self.lm.tokenizer is None else self.lm.decode(ids)

    def _new_text(self, emission: Emission) -> str:
        """Text that is new since the last call, up to the last complete character."""
        key, last = (emission.row, emission.branch), emission.finish is not None
        if self.lm.tokenizer is None:
            return ""
        sequence: Decoding = self._loop.sequences[emission.row]
        if emission.branch is not None:
            sequence = self._loop.branches[emission.row][emission.branch]
        if emission.copy_of is not None:
            self._shown[key] = self._shown.get((emission.row, emission.copy_of), (0, 0))
        ids, (shown, start) = sequence.new_ids, self._shown.get(key, (0, 0))
        if self._mask in ids:  # filled in any order: what stands before the first mask is settled
            ids = ids[: ids.index(self._mask)]
            if len(ids) == shown:
                return ""
        # Decode from a few tokens back, since a tokenizer may join a token to the one before it.
        before, text = self.lm.decode(ids[start:shown]), self.lm.decode(ids[start:])
        if text.endswith("\ufffd") and not last:
            return ""
        self._shown[key] = (len(ids), max(0, shown - 4) if last else shown)
        return text[len(before) :]

    def _stops(self, row: int, ids: Sequence[int]) -> bool:
        """Whether the newest tokens of a sequence complete a stop text."""
        new = ids[self._loop.sequences[row].n_prompt :]
        tail = self.lm.decode(new[-(max(map(len, self._stop)) + 4) :])
        return any(text in tail for text in self._stop)


def task_of(
    lm: LM,
    methods: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    stops: Callable[[int, Sequence[int]], bool] | None = None,
) -> Task:
    """Return what a loop is asked to do with the methods of a recipe, by their slots; see `Task`."""
    keep, read, store = (methods.get(slot) for slot in ("keep", "read", "store"))
    return Task(
        model=lm.model,
        tokenizer=lm.tokenizer,
        prompts=prompts,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        end_tokens=lm.eos_token_ids,
        stops=stops,
        policies=None if keep is None else lambda: keep.attach(lm.model.config, lm.dtype),
        readers=None if read is None else lambda: read.attach(lm.model.config),
        stores=None if store is None else lambda: store.attach(lm.model.config),
    )


def generate(
    lm: LM,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    recipe: str | Recipe | Iterable[str] | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    on_piece: Callable[[Piece], None] | None = None,
) -> list[Output]:
    """Generate a text for every prompt.

    Parameters
    ----------
    lm : LM
        From `load`.
    prompts : str, sequence of str, or sequence of token ids
        Strings are user messages, put through the chat template where the model has one.
    recipe : str, Recipe or None
        For example ``"token-recycling + keyformer:keep=50%"``; None decodes plainly.
    max_new_tokens : int
        Most tokens a prompt.
    temperature : float
        0 is greedy.
    top_k, top_p : int, float
        Restrict sampling; 0 and 1 do not.
    seed : int
        Of sampling. The same seed gives the same text, whatever the batch or the drafts.
    raw : bool
        Continue plain text, without a chat template.
    stop : sequence of str
        Texts that end a generation.
    batch_size : int
        Prompts that run together.
    on_piece : callable, optional
        Called with every `Piece` as it comes, `row` counted over all prompts.

    Returns
    -------
    list of Output
        In the order of the prompts.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError, InputError, UnsupportedModelError
        Before any work is done.
    """
    if batch_size < 1:
        raise OptionError("batch_size", batch_size, "an integer at least 1")
    rows: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    chosen = Recipe.parse(recipe)
    batches = [
        Generation(
            lm,
            rows[at : at + batch_size],
            chosen,
            max_new_tokens,
            Sampler(temperature, top_k, top_p, seed, at),
            raw,
            stop,
        )
        for at in range(0, len(rows), batch_size)
    ]
    outputs: list[Output] = []
    for number, batch in enumerate(batches):
        for piece in batch:
            if on_piece is not None:
                on_piece(replace(piece, row=piece.row + number * batch_size))
        outputs += batch.outputs
    return outputs


def stream(lm: LM, prompt: str, recipe: str | Recipe | None = None, **options: Any) -> Iterator[Piece]:
    """Generate one text piece by piece; stop iterating to cancel. Options as `generate`'s."""
    sampler = Sampler(*(options.pop(name, default) for name, default in _SAMPLING))
    yield from Generation(lm, [prompt], recipe, options.pop("max_new_tokens", 128), sampler, **options)


_SAMPLING = (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("seed", 0))
