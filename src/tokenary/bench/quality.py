"""What the memory room costs in quality: how well the model predicts real text when it keeps, stores or reads less.

A text is split into a prompt of P tokens and the T real tokens that follow it. The prompt is read and reduced; then the
real tokens are fed (teacher forcing) and the negative log-likelihood of each, given those before it, is noted::

    nll = -1/T sum_t log p(x_t | x_<t)      nats a token;  perplexity = exp(nll);  bits = nll / ln 2

All policies see the same texts, so that their increase over a full cache is a paired difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenary.bench.progress import Reporter
from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe, Step
from tokenary.core.registry import method_class
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.models import LM
from tokenary.run import build

#: Tokens fed in one pass, where a policy has room for so many.
PIECE = 16
PLAIN = "plain"
#: The slots of a recipe that can cost quality.
MEMORY = ("keep", "read", "store")


@dataclass(frozen=True)
class Quality:
    """How well real text was predicted under one recipe.

    Parameters
    ----------
    recipe : str
        Canonical text; ``plain`` is the full cache.
    nll : tuple of float
        Nats a token, one mean a text.
    prompt_tokens, new_tokens : int
        P and T.
    kv_bytes : int
        Bytes of keys, values and bookkeeping held at the end of a text.
    prompt_kv_bytes : int
        The same after the prompt.
    """

    recipe: str
    nll: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    kv_bytes: int
    prompt_kv_bytes: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return statistics.fmean(self.nll)

    @property
    def stderr(self) -> float:
        """Standard error of the mean over texts; 0 for one text."""
        return stderr(self.nll)

    @property
    def perplexity(self) -> float:
        """exp(nats a token)."""
        return math.exp(self.mean)

    @property
    def bits(self) -> float:
        """Bits a token."""
        return self.mean / math.log(2)

    def increase(self, full: Quality) -> tuple[float, float]:
        """Return the mean over texts of the increase in nats a token over `full`, and its standard error."""
        differences = [own - other for own, other in zip(self.nll, full.nll, strict=True)]
        return statistics.fmean(differences), stderr(differences)

    def to_json(self, full: Quality) -> dict[str, Any]:
        """Return it as plain JSON types, beside the full cache; the perplexity's increase is in percent."""
        nats, error = self.increase(full)
        return {
            "recipe": self.recipe,
            "nll": self.mean,
            "stderr": self.stderr,
            "bits": self.bits,
            "perplexity": self.perplexity,
            "increase_nats": nats,
            "increase_stderr": error,
            "increase_percent": 100 * math.expm1(nats),
            "increase_percent_low": 100 * math.expm1(nats - error),
            "increase_percent_high": 100 * math.expm1(nats + error),
            "texts": len(self.nll),
            "kv_bytes": self.kv_bytes,
            "kv_share": self.kv_bytes / full.kv_bytes,
            "prompt_kv_share": self.prompt_kv_bytes / full.prompt_kv_bytes,
        }


def stderr(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def sliding_texts(lm: LM, text: str, n_texts: int, length: int, shift: float = 0.0) -> list[list[int]]:
    """Cut evenly spaced pieces out of a long text; they do not overlap.

    Parameters
    ----------
    lm : LM
        With a tokenizer.
    text : str
        Plain text; no chat template is used.
    n_texts, length : int
        How many pieces, and tokens a piece. Each begins with the tokens that the tokenizer puts before any text.
    shift : float
        Moves every piece by this share, in [0, 1), of the free space between two of them: other pieces of the same
        text, for a held-out run.

    Raises
    ------
    InputError
        The text is too short, or the model has no tokenizer.
    """
    if n_texts < 1 or length < 2:
        raise OptionError("n_texts, length", (n_texts, length), "at least 1 and 2")
    if not 0 <= shift < 1:
        raise OptionError("shift", shift, "a number from 0 up to, not including, 1")
    if lm.tokenizer is None:
        raise InputError(f"{lm.name} has no tokenizer: pass token ids instead of text")
    body = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = lm.tokenizer(text, verbose=False)["input_ids"]
    before = len(whole) - len(body)
    lead = whole[:before] if whole[before:] == body else []
    own, stride = length - len(lead), len(body) // n_texts
    if stride < own:
        raise InputError(f"the text has {len(body)} tokens: too few for {n_texts} pieces of {own}")
    starts = [number * stride + int(shift * (stride - own)) for number in range(n_texts)]
    return [[*lead, *body[start : start + own]] for start in starts]


@torch.inference_mode()
def teacher_forced(
    lm: LM, recipe: str | Recipe | None, texts: Sequence[Sequence[int]], prompt_tokens: int, piece: int = PIECE
) -> tuple[Tensor, int, int]:
    """Read prompts, then feed the real tokens behind them in pieces that every policy has room for.

    Parameters
    ----------
    lm : LM
        The model.
    recipe : str, Recipe or None
        What it keeps, stores and reads is used, fresh; drafts change nothing here.
    texts : sequence of token ids
        One batch, all of one length P + T.
    prompt_tokens : int
        P.
    piece : int
        Most tokens a pass.

    Returns
    -------
    Tensor
        Negative log-likelihoods in nats, (B, T) float32.
    int, int
        Bytes held after the prompts, and at the end.

    Raises
    ------
    InputError
        Texts of different length, without a token behind the prompt, or past the context.
    """
    length = len(texts[0]) if texts else 0
    if not 0 < prompt_tokens < length or any(len(ids) != length for ids in texts):
        raise InputError(f"texts must be of one length, more than the {prompt_tokens} tokens of the prompt")
    if length > lm.context_length:
        raise InputError(f"texts of {length} tokens are past {lm.name}'s context of {lm.context_length}")
    methods = build(lm, memory_only(Recipe.parse(recipe)) or Recipe())
    keep, read, store = (methods.get(slot) for slot in MEMORY)
    rows, real = range(len(texts)), torch.tensor([list(ids) for ids in texts])
    with attached(lm.model):
        target = Target(
            lm.model,
            None if keep is None else keep.attach(lm.model.config, lm.dtype),
            None if read is None else read.attach(lm.model.config),
            None if store is None else store.attach(lm.model.config),
        )
        logits = target.prefill([ids[:prompt_tokens] for ids in texts])
        prompt_bytes = target.nbytes
        losses = [_nll(logits[:, None], real[:, prompt_tokens : prompt_tokens + 1])]
        at = prompt_tokens
        while at < length - 1:
            rooms = [room for row in rows if (room := target.room(row)) is not None]
            width = min(piece, length - 1 - at, *rooms)
            logits = target.score(TokenTree.chains([ids[at : at + width] for ids in real.tolist()]))
            target.commit([range(width) for _ in rows])
            losses.append(_nll(logits, real[:, at + 1 : at + 1 + width]))
            at += width
        return torch.cat(losses, dim=1), prompt_bytes, target.nbytes


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood (B, W) of tokens (B, W) under logits (B, W, V)."""
    return -logits.float().log_softmax(-1).gather(-1, ids.to(logits.device)[..., None])[..., 0].cpu()


def evaluate(
    lm: LM, recipe: str | Recipe | None, texts: Sequence[Sequence[int]], prompt_tokens: int, batch_size: int = 4
) -> Quality:
    """Measure how well texts are predicted under a recipe, `batch_size` texts at a time; see `teacher_forced`."""
    chosen = Recipe.parse(recipe)
    nll: list[float] = []
    prompt_bytes = end_bytes = 0
    for at in range(0, len(texts), batch_size):
        losses, prompt, end = teacher_forced(lm, chosen, texts[at : at + batch_size], prompt_tokens)
        nll += losses.mean(1).tolist()
        prompt_bytes, end_bytes = prompt_bytes + prompt, end_bytes + end
    return Quality(
        recipe=str(chosen),
        nll=tuple(nll),
        prompt_tokens=prompt_tokens,
        new_tokens=len(texts[0]) - prompt_tokens,
        kv_bytes=end_bytes // len(texts),
        prompt_kv_bytes=prompt_bytes // len(texts),
    )


def memory_only(recipe: Recipe) -> Recipe | None:
    """Return the part of a recipe that decides what is kept, stored and read of the past; None without one."""
    steps = tuple(step for step in recipe.steps if step.card.slot in MEMORY)
    return Recipe(steps) if steps else None


def _keeps(recipe: Recipe) -> bool:
    """Whether it is one keep policy with a budget to sweep over."""
    slots = [step.card.slot for step in recipe.steps]
    return slots == ["keep"] and "keep" in method_class(recipe.steps[0].slug).schema().get("properties", {})


def at_budget(recipe: Recipe, keep: str) -> Recipe:
    """Return a recipe of one keep policy with another budget."""
    (step,) = recipe.steps
    options = {name: value for name, value in step.options if name not in ("keep", "bytes")} | {"keep": keep}
    return Recipe((Step(step.slug, tuple(sorted(options.items()))),))


def sweep(
    lm: LM,
    recipes: Iterable[str | Recipe],
    texts: Sequence[Sequence[int]],
    prompt_tokens: int,
    budgets: Sequence[float] = (25, 50, 75),
    progress: Any = None,
) -> Iterator[tuple[str, Quality]]:
    """Measure keep policies over budgets, the controls *random* and *recent* always among them.

    Parameters
    ----------
    lm : LM
        The model.
    recipes : iterable of str or Recipe
        Those that keep, store or read less take part, as they are; a keep policy alone over the budgets too.
    texts, prompt_tokens
        As in `teacher_forced`; the full cache is computed once.
    budgets : sequence of float
        Percent of the prompt's tokens, in (0, 100].
    progress : callable or rich.progress.Progress, optional
        Told of every run.

    Yields
    ------
    str, Quality
        The policy (its recipe without the budget; first ``plain``, the full cache) and one point of its curve.

    Raises
    ------
    OptionError
        A budget out of range; at once.
    """
    for budget in budgets:
        if not 0 < budget <= 100:
            raise OptionError("budgets", budget, "percent above 0 and at most 100")
    given = [part for recipe in recipes if (part := memory_only(Recipe.parse(recipe))) is not None]
    curves: dict[str, dict[str, Recipe]] = {PLAIN: {PLAIN: Recipe()}}
    curves |= {str(part): {str(part): part} for part in given if not _keeps(part)}
    keeping = [part for part in given if _keeps(part)]
    for part in [*keeping, Recipe.parse("random"), Recipe.parse("recent")] if keeping else []:
        points = curves.setdefault(_without_budget(part), {})
        for recipe in (*(at_budget(part, f"{budget:g}%") for budget in budgets), *([part] if part in keeping else [])):
            points[str(recipe)] = recipe
    reporter = Reporter(progress, sum(map(len, curves.values())))

    def run() -> Iterator[tuple[str, Quality]]:
        for policy, points in curves.items():
            for text, recipe in points.items():
                reporter.start("quality", text)
                quality = evaluate(lm, recipe, texts, prompt_tokens)
                reporter.finish()
                yield policy, quality

    return run()


def _without_budget(recipe: Recipe) -> str:
    (step,) = recipe.steps
    return str(Step(step.slug, tuple(item for item in step.options if item[0] not in ("keep", "bytes"))))
