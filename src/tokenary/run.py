"""Text in, text out: a model, a recipe and some prompts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe
from tokenary.decode.base import Loop, Proposer, Trace
from tokenary.decode.sampling import Sampler
from tokenary.hf.packing import pack_linears
from tokenary.hf.target import Target, attached, check_causal
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

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens a second after the first."""
        after = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / after if after > 0 else 0.0


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
    """

    text: str
    token_ids: list[int]
    trace: Trace
    stats: Stats

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        parts = {"trace": asdict(self.trace), "stats": asdict(self.stats)}
        return {"text": self.text, "token_ids": self.token_ids, **parts}


@dataclass(frozen=True)
class Piece:
    """Text that one pass added to one sequence.

    Parameters
    ----------
    row : int
        Which prompt.
    text : str
        New text; a character that is not complete yet waits for the next piece.
    token_ids : list of int
        New tokens.
    from_draft : list of bool
        Which of them came from a draft.
    finish : str or None
        Why the sequence ended, if it did.
    """

    row: int
    text: str
    token_ids: list[int]
    from_draft: list[bool]
    finish: str | None


def _build(lm: LM, recipe: Recipe) -> dict[str, Any]:
    """Construct the methods of a recipe, or take those that this model already warmed up."""
    if recipe not in lm.warm:
        methods = recipe.build()
        if "draft" in methods:
            methods["draft"].prepare(lm.vocab_size, lm.tokenizer)
        lm.warm[recipe] = methods
    return lm.warm[recipe]


class Generation:
    """One batch under way. Iterate to run it a pass at a time; stop iterating to cancel; `outputs` at any time.

    Parameters
    ----------
    lm : LM
        The model.
    prompts : sequence of str or of token ids
        Strings are user messages, put through the chat template where the model has one.
    recipe : str, Recipe or None
        Methods to use; what they learned stays with `lm`.
    max_new_tokens : int
        At least 1.
    sampler : Sampler
        Greedy or sampling.
    raw : bool
        Continue plain text, without a chat template.
    stop : sequence of str
        Texts that end a sequence.
    first_row : int
        Number of the first prompt, which names its random numbers.
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
        first_row: int = 0,
    ) -> None:
        if max_new_tokens < 1:
            raise OptionError("max_new_tokens", max_new_tokens, "an integer at least 1")
        self.lm, self.recipe = lm, Recipe.parse(recipe)
        check_causal(lm.model)
        methods = _build(lm, self.recipe)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        ids = lm.encode(texts, raw=raw) if texts else [list(map(int, prompt)) for prompt in prompts]
        if len(ids) != len(prompts):
            raise InputError("prompts are either all texts or all token ids")
        for number, row in enumerate(ids, start=1):
            if not row:
                raise InputError(f"prompt {number} is empty")
            if len(row) + max_new_tokens > lm.context_length:
                raise InputError(
                    f"prompt {number} has {len(row)} tokens; with max_new_tokens={max_new_tokens} that is past"
                    f" {lm.name}'s context of {lm.context_length}"
                )
        keep = methods.get("keep")
        self._target = Target(lm.model, None if keep is None else keep.attach(lm.model.config, lm.dtype))
        proposer: Proposer | None = methods.get("draft")
        self._stop = tuple(stop)
        self._loop = Loop(
            self._target,
            ids,
            _Shifted(sampler, first_row),
            max_new_tokens,
            lm.eos_token_ids,
            proposer,
            self._stops if self._stop else None,
        )
        self._began = 0.0
        self._first = self._last = [0.0] * len(ids)
        self._shown = [(0, 0)] * len(ids)  # tokens whose text was shown, and where decoding starts

    def __iter__(self) -> Iterator[Piece]:
        count = len(self._loop.sequences)
        self._first, self._last = [0.0] * count, [0.0] * count
        self._began = time.perf_counter()
        with attached(self.lm.model):
            for emissions in self._loop:
                now = time.perf_counter() - self._began
                for emission in emissions:
                    row = emission.row
                    self._first[row] = self._first[row] or now
                    self._last[row] = now
                    text = self._new_text(row, emission.finish is not None)
                    yield Piece(row, text, emission.token_ids, emission.from_draft, emission.finish)

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
            text = "" if self.lm.tokenizer is None else self.lm.decode(sequence.new_ids)
            made.append(Output(text, sequence.new_ids, sequence.trace, stats))
        return made

    def _new_text(self, row: int, last: bool) -> str:
        """Text that is new since the last call, up to the last complete character."""
        if self.lm.tokenizer is None:
            return ""
        ids, (shown, start) = self._loop.sequences[row].new_ids, self._shown[row]
        # Decode from a few tokens back, since a tokenizer may join a token to the one before it.
        before, text = self.lm.decode(ids[start:shown]), self.lm.decode(ids[start:])
        if text.endswith("\ufffd") and not last:
            return ""
        self._shown[row] = (len(ids), max(0, shown - 4) if last else shown)
        return text[len(before) :]

    def _stops(self, row: int, ids: Sequence[int]) -> bool:
        """Whether the newest tokens complete a stop text."""
        new = self._loop.sequences[row].new_ids
        tail = self.lm.decode(new[-(max(map(len, self._stop)) + 4) :])
        return any(text in tail for text in self._stop)


@dataclass(frozen=True)
class _Shifted:
    """A sampler whose rows are counted from `first`, so that batches of one call draw different numbers."""

    sampler: Sampler
    first: int

    @property
    def greedy(self) -> bool:
        return self.sampler.greedy

    def __call__(self, logits: torch.Tensor, rows: Sequence[int], histories: Sequence[Sequence[int]]) -> list[int]:
        return self.sampler(logits, [row + self.first for row in rows], histories)


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
    sampler = Sampler(temperature, top_k, top_p, seed)
    batches = [
        Generation(lm, rows[at : at + batch_size], chosen, max_new_tokens, sampler, raw, stop, at)
        for at in range(0, len(rows), batch_size)
    ]
    outputs: list[Output] = []
    for number, batch in enumerate(batches):
        for piece in batch:
            if on_piece is not None:
                on_piece(Piece(piece.row + number * batch_size, *list(vars(piece).values())[1:]))
        outputs += batch.outputs
    return outputs


def stream(lm: LM, prompt: str, recipe: str | Recipe | None = None, **options: Any) -> Iterator[Piece]:
    """Generate one text piece by piece; stop iterating to cancel. Options as `generate`'s."""
    sampler = Sampler(*(options.pop(name, default) for name, default in _SAMPLING))
    yield from Generation(lm, [prompt], recipe, options.pop("max_new_tokens", 128), sampler, **options)


_SAMPLING = (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("seed", 0))
