"""AWRS: adaptive weighted rejection sampling (Lipkin et al. 2025, arXiv 2504.05410).

Masking asks a constraint about every token of the vocabulary. Here tokens are tested in an order of sampling without
replacement until one is accepted, which has exactly the masked distribution after a handful of tests. With more than
one particle, a little more work estimates without bias the mass Z of all accepted tokens; a particle's weight is the
product of its Z, and resampling by weight undoes what constraining one token at a time distorts.

    P(x) = p(x) 1{x accepted} / Z,   Z = sum of p(x) over accepted x
    w   <- w * Z_hat * critic(text) / critic(text before);   resample where (sum w)^2 / sum w^2 < ess * particles
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.seeding import substream
from tokenary.decode.awrs.constraint import (
    AnyText,
    ConstraintError,
    Matcher,
    PredicateMatcher,
    Vocabulary,
    compile_grammar,
    grammar_matcher,
    judge,
)
from tokenary.decode.awrs.sampler import Draw, awrs, by_probability, first_accepted, without_replacement
from tokenary.decode.awrs.smc import SMC
from tokenary.hf.strategy import Strategy, Task

CARD = Card(
    slug="awrs",
    cls="AWRS",
    room="decode",
    slot="choose",
    title="Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling",
    summary="answers that satisfy a regex, JSON schema, grammar or predicate, with a few checks a token instead of |V|",
    paper="2504.05410",
    year=2025,
    code="genlm/genlm-control",
    requires=("kv-cache",),
)


@dataclass
class Counts:
    """Constraint evaluations since the last start.

    Parameters
    ----------
    per_token : list of int
        Tokens (and ends of text) that were tested for each token that was drawn.
    """

    per_token: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens drawn."""
        return len(self.per_token)

    @property
    def checks(self) -> int:
        """Tokens tested."""
        return sum(self.per_token)

    @property
    def mean(self) -> float:
        """Tests a token."""
        return self.checks / max(1, self.tokens)


class AWRS(Strategy):
    """Constrained decoding by adaptive weighted rejection sampling.

    The constraint speaks of the whole answer, not of the prompt. Without one every text is accepted. With one particle
    the tokens are chosen in the ordinary loop, with any drafts, and the first try is the token that sampling with the
    same seed would take without a constraint. At temperature 0 there is no distribution to be true to: tokens are then
    tested in order of probability and the likeliest accepted one is taken. An answer that reaches ``max_new_tokens``
    ends unfinished; with particles, the end of the text is forced there and counts as a draw.

    Parameters
    ----------
    regex : str
        A regular expression that the answer matches as a whole; no look-around, no anchors.
    json : str
        A JSON schema, or the path of a file that holds one.
    grammar : str
        Path of a file with a context-free grammar in the Lark language, or the grammar itself.
    predicate : callable
        Python only. Says of the text so far ``"dead"`` (nothing can save it), ``"alive"`` (it must go on) or
        ``"complete"`` (it may end here, it may go on); False and True are short for dead and complete. A character of
        which not all bytes are there yet is shown as U+FFFD at the end.
    particles : int
        1 constrains each token for itself; more run a particle filter (sequential Monte Carlo), N sequences a prompt.
    ess : float
        Resample below this share of effective particles, in [0, 1]; 0 never does.
    estimator : {"auto", "recursive", "geometric"}
        Of the mass of the accepted tokens.
    max_rejects : int
        Tokens that may be rejected for one draw; 0 for no bound but the vocabulary. A bound makes weights too small.
    critic : callable
        Python only, for particles: a score of the text so far, at least 0, that multiplies its weight.

    Attributes
    ----------
    counts : Counts
        Constraint evaluations since the last start.
    """

    def __init__(
        self,
        regex: Annotated[str, Field(json_schema_extra={"remote": True})] = "",
        json: str = "",
        grammar: str = "",
        predicate: SkipJsonSchema[Callable[..., Any]] | Literal[""] = "",
        particles: Annotated[int, Field(ge=1, le=1024, json_schema_extra={"remote": 8})] = 1,
        ess: Annotated[float, Field(ge=0, le=1)] = 0.5,
        estimator: Literal["auto", "recursive", "geometric"] = "auto",
        max_rejects: Annotated[int, Field(ge=0)] = 0,
        critic: SkipJsonSchema[Callable[..., Any]] | Literal[""] = "",
    ) -> None:
        if sum(map(bool, (regex, json, grammar, predicate))) > 1:
            raise OptionError("regex", regex, "one constraint: regex, json, grammar or predicate")
        if critic and particles == 1:
            raise OptionError("particles", particles, "at least 2, where a critic weighs them")
        self._grammar = ""
        if regex:
            self._grammar = compile_grammar("regex", regex)
        elif json:
            self._grammar = compile_grammar("json", _inline("json", json, json.lstrip().startswith(("{", "true"))))
        elif grammar:
            self._grammar = compile_grammar("grammar", _inline("grammar", grammar, "start:" in grammar))
        self._predicate, self._critic = predicate or None, critic or None
        self.particles, self.ess, self.estimator, self.max_rejects = particles, ess, estimator, max_rejects
        self.owns_loop = particles > 1
        self.counts = Counts()
        self.vocabulary: Vocabulary | None = None
        self._matcher: Matcher = AnyText()

    def prepare(self, model: PreTrainedModel, tokenizer: Any | None) -> None:
        """Compile the constraint for a tokenizer.

        Raises
        ------
        UnsupportedModelError
            Without a tokenizer whose tokens are bytes.
        ConstraintError
            If no text satisfies the constraint.
        """
        if not (self._grammar or self._predicate or self._critic):
            return
        if tokenizer is None:
            raise UnsupportedModelError("a constraint speaks of text; this model has no tokenizer")
        self.bind(Vocabulary.of(tokenizer, model.config.get_text_config().vocab_size))

    def bind(self, vocabulary: Vocabulary) -> None:
        """Compile the constraint for tokens whose bytes are known; `prepare` does it for those of a tokenizer."""
        self.vocabulary = vocabulary
        if self._grammar:
            self._matcher = grammar_matcher(self._grammar, vocabulary)
        elif self._predicate:
            if judge(self._predicate, b"") == "dead":
                raise ConstraintError("no text satisfies the predicate: it says that the empty text is dead")
            self._matcher = PredicateMatcher(self._predicate, vocabulary)

    def matcher(self) -> Matcher:
        """Return a matcher of the constraint at the empty answer, once `prepare` was called."""
        return self._matcher.copy()

    def chooser(self, task: Task) -> Choice:
        """Return what chooses the tokens of the ordinary loop."""
        return Choice(self, task)

    def loop(self, task: Task) -> SMC:
        """Return the particle filter.

        Raises
        ------
        OptionError
            At temperature 0, where particles have no distribution.
        """
        if task.sampler.greedy:
            raise OptionError("particles", self.particles, "1 at temperature 0; particles need one above, such as 1")
        counts = Counts()

        def start() -> list[Matcher]:
            self.counts = counts
            return [self.matcher() for _ in task.prompts]

        def draw(probabilities: np.ndarray, matcher: Matcher, stream: np.random.Generator) -> Draw:
            test = Tester(matcher, task.end_tokens)
            drawn = awrs(probabilities, test, stream, self.estimator, self.max_rejects)
            counts.per_token.append(test.checks)
            return drawn

        return SMC(task, start, draw, self.particles, self.ess, self.vocabulary, self._critic)


class Choice:
    """Takes the first accepted token; it follows each answer, back and forth, through drafts."""

    greedy = False  # the likeliest token need not be accepted

    def __init__(self, method: AWRS, task: Task) -> None:
        self._method, self._sampler, self._ends = method, task.sampler, frozenset(task.end_tokens)
        self._lengths = [len(prompt) for prompt in task.prompts]
        self._matchers = [method.matcher() for _ in task.prompts]
        self._counts: Counts | None = None

    def __call__(self, logits: Tensor, rows: Sequence[int], histories: Sequence[Sequence[int]]) -> list[int]:
        """Choose from logits (n, V)."""
        if self._counts is None:
            self._counts = self._method.counts = Counts()
        scores = logits.float() if self._sampler.greedy else self._sampler.probabilities(logits).double()
        return [
            self._choose(values, row, history)
            for values, row, history in zip(scores.cpu().numpy(), rows, histories, strict=True)
        ]

    def _choose(self, scores: np.ndarray, row: int, history: Sequence[int]) -> int:
        answer = history[self._lengths[row] :]
        if not self._ends.isdisjoint(answer):  # a draft went past the end, which nobody will see
            return int(scores.argmax())
        matcher, sampler = self._matchers[row], self._sampler
        matcher.follow(answer)
        test = Tester(matcher, self._ends)
        if sampler.greedy:
            order = by_probability(scores)
        else:
            place = sampler.first_row + row, len(history)
            first = substream(sampler.seed, "sample", *place).random()
            order = without_replacement(scores, substream(sampler.seed, "awrs", *place, 0), first)
        token = first_accepted(order, test, self._method.max_rejects)
        assert self._counts is not None
        self._counts.per_token.append(test.checks)
        if token < 0:
            raise dead_end(matcher, test.checks, self._method.vocabulary)
        return token


class Tester:
    """Says whether a token may come next, and counts; an end token may where the text is complete."""

    def __init__(self, matcher: Matcher, ends: Container[int]) -> None:
        self.matcher, self.ends, self.checks = matcher, ends, 0

    def __call__(self, token: int) -> bool:
        """Test a token."""
        self.checks += 1
        return self.matcher.complete() if token in self.ends else self.matcher.accepts(token)


def dead_end(matcher: Matcher, checks: int, vocabulary: Vocabulary | None) -> ConstraintError:
    """Return the error of an answer that no token continues."""
    text = "" if vocabulary is None else vocabulary.text(matcher.tokens)
    return ConstraintError(f"none of {checks} tokens continues the answer {text[-60:]!r} under the constraint")


def _inline(option: str, source: str, inline: bool) -> str:
    """Return a text that is given itself or by the path of a file."""
    if inline:
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptionError(option, source, f"a readable file ({error})") from None
