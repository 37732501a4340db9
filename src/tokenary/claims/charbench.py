"""CharBench: where a character stands is harder to tell inside a long token, and only for who reads tokens.

Two small models learn the same questions about the same words; one reads BPE tokens, its twin letters. What the length
of the token that holds the answer does to the twin, which never sees that token, is the work of length and position
alone. The twin's training ends where it is as accurate as the other on words that are in neither training nor test,
since a model without errors shows no dependence on anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tokenary.claims.small_lm import small_lm, train
from tokenary.core.claim import Claim, Figure, Outcome
from tokenary.core.seeding import substream
from tokenary.data import enwik8, prose
from tokenary.hf.tokenizer import Vocabulary
from tokenary.models.text_diffusion.corpus import clean_wikipedia
from tokenary.probe.charbench import CharBench
from tokenary.probe.charbench.analysis import analyse, between, paired
from tokenary.probe.charbench.items import NUMBERS, POSITION, TASKS, Item, generate, gold
from tokenary.probe.charbench.segmentation import Cut, cut, features, resplit
from tokenary.probe.charbench.statistics import above_majority, length_only, majority, slopes
from tokenary.probe.charbench.words import shuffled_letters, word_pool, words_of
from tokenary.run import load
from tokenary.tokenize.training import train_bpe

_BARE = r"[\p{L}\p{M}]+|[^\p{L}\p{M}]+"  # words are asked about without the space before them, and learned so
METHOD, TWIN = "tokens", "letters, as accurate"
CONSTANT = ("majority answer", "length-only answer")
ASKED = 8  # questions a word in training
MIX = (1, 1, 3, 3)  # how often each task is trained


def run(
    seed: int = 0,
    training: int = 0,
    steps: int = 4000,
    batch: int = 64,
    hidden: int = 128,
    layers: int = 3,
    vocab: int = 4096,
    tests: int = 3500,
    text: Literal["wikipedia", "prose"] = "wikipedia",
    asked: Literal["english", "others"] = "english",
    real: int = 378,
    resamples: int = 400,
) -> Outcome:
    """Train both models on questions about half of the words, and see which of the other questions each gets right.

    Each model is trained once, and errors are those over questions: how much another training would differ, this does
    not say. The held-out run asks the same two models.

    Parameters
    ----------
    seed : int
        Of the questions of the test.
    training : int
        Seed of weights, of what is trained on, and of the words that are not.
    steps, batch : int
        Of training, words of 8 questions each; both models get the same, the twin only as many as it needs.
    hidden, layers : int
        Of the models.
    vocab : int
        Of the BPE.
    tests : int
        Questions of each task at most, about words that were not trained on.
    text : {"wikipedia", "prose"}
        Where words and BPE come from.
    asked : {"english", "others"}
        Test on words of the same text, or on shuffled letters and on German words, half of the figure each.
    real : int
        Questions of each task that SmolLM2-135M is asked, for the details; 0 for none.
    resamples : int
        Of the bootstrap.
    """
    trained = _trained(training, steps, batch, hidden, layers, vocab, text)
    parts = _parts(trained, asked, tests, seed)
    for part in parts:
        part.predicted = {METHOD: trained.method.answers(part.items), TWIN: trained.twin.answers(part.items)}
    where = [part for part in parts if part.asks_where]
    names = (METHOD, TWIN, "random", *CONSTANT)
    drawn = _bootstrap(where, names, seed, resamples)

    def figure(name: str) -> Figure:
        return Figure(name, float(np.mean([part.slope(name) for part in where])), float(drawn[name].std(ddof=1)))

    shown = figure(METHOD)
    if not all(above_majority(part.correct(arm), part.golds) for part in where for arm in (METHOD, TWIN)):
        shown = Figure(METHOD, float("nan"), shown.spread)  # errors of a model that only guesses say nothing
    return Outcome(
        method=shown,
        baseline=figure(TWIN),
        controls=tuple(figure(name) for name in names[2:]),
        n=sum(len(part.items) for part in where),
        runs=1,
        paired_spread=float((drawn[METHOD] - drawn[TWIN]).std(ddof=1)),
        details={
            "words": {"trained": len(trained.learned), "held_out": len(trained.held)},
            "accuracy_on_check": trained.accuracy,
            "step_of_twin": trained.step,
            "slopes": {part.name: {name: part.slope(name) for name in names} for part in where},
            "token_split_in_two": {part.name: _overridden(trained, part) for part in where},
            "tasks": {part.name: part.details(seed, resamples) for part in parts},
            "smollm2": _real(real, seed) if real else None,
        },
    )


@dataclass(frozen=True)
class _Trained:
    """Both models, and the words: trained on, and kept for the test."""

    vocabulary: Vocabulary
    method: _Reader
    twin: _Reader
    step: int
    accuracy: dict[str, float]
    learned: list[str]
    seen: frozenset[str]
    held: list[str]


@functools.lru_cache(maxsize=1)
def _trained(training: int, steps: int, batch: int, hidden: int, layers: int, vocab: int, text: str) -> _Trained:
    """Train both models; a function of its arguments alone, kept for the held-out run."""
    texts = [prose()] if text == "prose" else list(clean_wikipedia(enwik8(30_000_000)))
    words = word_pool(texts)
    order = substream(training, "charbench claim", "words").permutation(len(words))
    half, more = len(words) // 2, 3 * len(words) // 5
    learned, checks, held = ([words[i] for i in part] for part in (order[:half], order[half:more], order[more:]))
    vocabulary = Vocabulary(train_bpe(texts[: max(1, len(texts) // 4)], vocab, pattern=_BARE).tokenizer)
    letters = {char: i for i, char in enumerate(sorted({char for word in learned for char in word}))}
    check = [item for item in generate(checks, 350, training) if item.task in POSITION]

    tokens = len(vocabulary.spellings)
    method = _Reader(tokens, lambda word: _cut(vocabulary, word).ids, letters, training, hidden, layers)
    method.learn(_questions(learned, batch, training), steps)
    wanted = method.accuracy(check)
    unknown = len(letters)
    spell = functools.partial(map, lambda char: letters.get(char, unknown))
    twin = _Reader(unknown + 1, lambda word: tuple(spell(word)), letters, training, hidden, layers)
    step = twin.learn(
        _questions(learned, batch, training), steps, lambda step: step % 20 == 0 and twin.accuracy(check) >= wanted
    )
    accuracy = {METHOD: wanted, TWIN: twin.accuracy(check)}
    return _Trained(vocabulary, method, twin, step, accuracy, learned, frozenset(learned + checks), held)


def _cut(vocabulary: Vocabulary, word: str) -> Cut:
    found = cut(vocabulary, word)
    assert found is not None, "a byte-level vocabulary spells everything"
    return found


@dataclass
class _Part:
    """The questions of one task about one kind of words, and what each model answered."""

    name: str
    items: list[Item]
    cuts: list[Cut]
    borders: np.random.Generator
    predicted: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.golds = np.array([item.gold for item in self.items])
        self.lengths = np.array([len(item.word) for item in self.items])
        self.described = [features(item, made) for item, made in zip(self.items, self.cuts, strict=True)]
        self.asks_where = self.items[0].task in POSITION
        if self.asks_where:
            self.targets = np.array([features["target_token_length"] for features in self.described])
            pairs = zip(self.items, self.cuts, strict=True)
            self.random_targets = np.array([_random_target(item, len(made.ids), self.borders) for item, made in pairs])

    def correct(self, name: str) -> np.ndarray:
        """Whether each answer of an arm, or a constant answer, is right, (N,) of 0 and 1."""
        if name == "majority answer":
            return (self.golds == majority(self.golds)).astype(np.float64)
        if name == "length-only answer":
            return (self.golds == length_only(self.golds, self.lengths)).astype(np.float64)
        return (self.predicted[METHOD if name == "random" else name] == self.golds).astype(np.float64)

    def slope(self, name: str, drawn: np.ndarray | slice = slice(None)) -> float:
        """Accuracy a letter of the token that holds the answer, at equal word length; ``random``: at random borders."""
        targets = self.random_targets if name == "random" else self.targets
        found = slopes(self.correct(name)[drawn], self.lengths[drawn], targets[drawn])
        return float("nan") if found is None else float(found[1])

    def details(self, seed: int, resamples: int) -> dict[str, Any]:
        """What the probe says of each model."""
        told = {
            arm: analyse(self.items, self.described, numbers.tolist(), seed, min(resamples, 200))
            for arm, numbers in self.predicted.items()
        }
        kept = ("n", "accuracy", "error", "majority_accuracy", "length_only_accuracy", "r", "given_word_length")
        shown: dict[str, Any] = {arm: {key: one[key] for key in kept} for arm, one in told.items()}
        if self.asks_where:
            for arm in told:
                given = slopes(self.correct(arm), self.lengths, self.golds, self.targets)
                shown[arm]["accuracy_a_letter_given_gold"] = None if given is None else float(given[2])
                shown[arm]["by_target_token_length"] = told[arm]["by"]["target_token_length"]
        right = {arm: self.correct(arm) for arm in told}
        return shown | {"jaccard_of_errors": between(right, told)["jaccard"]}


def _random_target(item: Item, tokens: int, stream: np.random.Generator) -> float:
    """Length of the piece that holds the answer, were the word cut into as many pieces anywhere."""
    inner = sorted(stream.choice(np.arange(1, len(item.word)), min(tokens, len(item.word)) - 1, replace=False))
    edges = [0, *inner, len(item.word)]
    place = int(np.searchsorted(edges, item.gold, side="right"))
    return float(edges[place] - edges[place - 1])


def _parts(trained: _Trained, asked: str, tests: int, seed: int) -> list[_Part]:
    """The test: four tasks of every kind of words."""
    groups = {"english": generate(trained.held, tests, seed)}
    if asked == "others":
        german = [word for word in words_of("german") if word not in trained.seen]
        dealt = [item for deal in range(len(TASKS)) for item in generate(german, tests, seed, deal)]
        groups = {"strings": generate(shuffled_letters(trained.held, seed), tests, seed), "german": dealt}
    parts = []
    for group, items in groups.items():
        for task in TASKS:
            some = [item for item in items if item.task == task]
            stream = substream(seed, "charbench claim", "borders", group, task)
            cuts = [_cut(trained.vocabulary, item.word) for item in some]
            parts.append(_Part(f"{group}, {task}", some, cuts, stream))
    return parts


def _questions(words: Sequence[str], batch: int, seed: int) -> Iterator[list[list[Item]]]:
    """Draw questions to learn from, without end: words, and several tasks and characters of each."""
    stream = substream(seed, "charbench claim", "train")
    mix = np.repeat(np.arange(len(TASKS)), MIX)
    while True:
        rows = []
        for word in (words[i] for i in stream.integers(0, len(words), batch)):
            kinds, places = stream.choice(mix, ASKED), stream.integers(0, len(word), ASKED)
            row = [(TASKS[kind], word[place] if kind else "") for kind, place in zip(kinds, places, strict=True)]
            rows.append([Item(task, word, char, gold(task, word, char)) for task, char in row])
        yield rows


class _Reader:
    """A small LM that reads a word and then questions about it, one token each: a task with its character.

    The answer is one token too, predicted behind its question. It is not read: so the next question, for which it might
    be a hint, is answered as if it stood alone.

    Parameters
    ----------
    size : int
        Tokens that words are made of.
    spell : callable
        From a word to its tokens.
    letters : mapping
        Numbers of the characters that can be asked for; others share one more.
    seed, hidden, layers : int
        Of the model.
    """

    def __init__(
        self,
        size: int,
        spell: Callable[[str], Sequence[int]],
        letters: Mapping[str, int],
        seed: int,
        hidden: int,
        layers: int,
    ) -> None:
        self.spell, self.letters, self.size = functools.cache(spell), letters, size
        self.first = size + len(TASKS) * (len(letters) + 1)
        self.model = small_lm(seed, self.first + len(NUMBERS), layers=layers, hidden=hidden, context=64)

    def learn(
        self,
        questions: Iterator[list[list[Item]]],
        steps: int,
        enough: Callable[[int], bool] = lambda step: False,
    ) -> int:
        """Train until `enough`, which is asked before each step, or to the end; return the steps done."""
        done = 0

        def fed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            nonlocal done
            while done < steps and not enough(done):
                rows = next(questions)
                ids, ends = self._batch([(self.spell(row[0].word), row) for row in rows])
                golds = torch.tensor([[self.first + item.gold for item in row] for row in rows])
                done += 1
                yield ids, torch.full_like(ids, -100).scatter(1, ends, golds)

        train(self.model, fed(), steps)
        return done

    @torch.inference_mode()
    def answers(self, items: Sequence[Item], words: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """Return the likeliest number for each question, (N,), with other tokens for the words if they are given."""
        words = [self.spell(item.word) for item in items] if words is None else words
        found = []
        for at in range(0, len(items), 500):
            pairs = zip(words[at : at + 500], items[at : at + 500], strict=True)
            ids, ends = self._batch([(word, [item]) for word, item in pairs])
            hidden = self.model.base_model(input_ids=ids).last_hidden_state[torch.arange(len(ids)), ends[:, 0] - 1]
            found.append(self.model.get_output_embeddings()(hidden)[:, self.first :].argmax(-1))
        return torch.cat(found).numpy()

    def accuracy(self, items: Sequence[Item]) -> float:
        """Return the share of right answers."""
        return float(np.mean(self.answers(items) == np.array([item.gold for item in items])))

    def _question(self, item: Item) -> int:
        return (
            self.size
            + TASKS.index(item.task) * (len(self.letters) + 1)
            + self.letters.get(item.char, len(self.letters))
        )

    def _batch(self, rows: Sequence[tuple[Sequence[int], Sequence[Item]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, N), left-aligned, and behind which place each question ends (B, K)."""
        texts = [[*word, *map(self._question, items)] for word, items in rows]
        ends = [[len(word) + number + 1 for number in range(len(items))] for word, items in rows]
        width = max(map(len, texts)) + 1
        return torch.tensor([text + [0] * (width - len(text)) for text in texts]), torch.tensor(ends)


def _overridden(trained: _Trained, part: _Part) -> dict[str, Any]:
    """The same questions to the model of tokens, with the answer's token, or another of the word, cut in two."""
    pairs = zip(part.items, part.cuts, strict=True)
    made = [(item, both) for item, usual in pairs if (both := resplit(trained.vocabulary, usual, item)) is not None]
    if not made:
        return {}
    items, reader = [item for item, _ in made], trained.method
    golds = np.array([item.gold for item in items])
    usual, mine, other = (
        reader.answers(items, words) == golds
        for words in (None, [both[0].ids for _, both in made], [both[1].ids for _, both in made])
    )
    return {
        "answer's token": paired(usual, mine),
        "other token": paired(usual, other),
        "answer's over other": paired(other, mine),
    }


def _bootstrap(parts: Sequence[_Part], names: Sequence[str], seed: int, resamples: int) -> dict[str, np.ndarray]:
    """Slopes of each arm over resampled questions, the same draws for all arms: mean over parts, (resamples,)."""
    stream = substream(seed, "charbench claim", "bootstrap")
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(resamples):
        drawn = [stream.integers(0, len(part.items), len(part.items)) for part in parts]
        for name in names:
            found[name].append(float(np.mean([part.slope(name, at) for part, at in zip(parts, drawn, strict=True)])))
    return {name: np.array(values) for name, values in found.items()}


def _real(questions: int, seed: int) -> dict[str, Any]:
    """What the probe says of SmolLM2, with four worked examples."""
    report = CharBench(words=questions, scoring="both", raw=True, shots=4).run(load("smollm2"), seed)
    kept = ("n", "accuracy", "error", "invalid", "majority_accuracy", "above_majority", "r")
    scoring = report.figures["scoring"]
    return {
        "notes": list(report.notes),
        **{
            mode: {task: {key: one[key] for key in kept} for task, one in tasks.items()}
            for mode, tasks in scoring.items()
        },
    }


CLAIM = Claim(
    slug="charbench",
    statement="Asked where a character stands in unseen words of equal length, a small LM over BPE tokens loses at"
    " least 2 points of accuracy more a letter of the token that holds it than an equally accurate one over letters",
    metric="change of accuracy a letter of the token that holds the answer, at equal word length",
    direction="lower",
    threshold=0.02,
    effect="difference",
    run=run,
    variation="the same models asked about shuffled letters, and about German words with umlauts",
    held_out={"asked": "others", "real": 0},
    model="smollm2",
    minutes=13,
    fast={"steps": 60, "batch": 64, "hidden": 64, "layers": 2, "vocab": 1024, "tests": 350, "text": "prose", "real": 0}
    | {"resamples": 40},
)
