"""CharBench: four questions about the characters of words, and whether tokens explain the wrong answers.

Counting (how many different characters; how often one occurs) and position (where one occurs first, last) are asked of
words of 4 to 10 letters, as many of each length, no word twice. Correctness is then correlated with properties of the
word, of the answer and of the tokens, among them the length of the token that holds the answer; at equal word length
too, since long words have long tokens.

Added to the paper: closed scoring, for models that do not follow instructions; silence about correlations where a model
is no better than the most frequent answer; partial correlation and logistic regression; intervals; and the same words
cut otherwise (``override``), which tests a cause instead of a correlation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import UnsupportedModelError
from tokenary.models.lm import LM
from tokenary.probe.base import Probe, Progress, Report
from tokenary.probe.charbench.analysis import analyse, paired
from tokenary.probe.charbench.items import TASKS, Item, generate
from tokenary.probe.charbench.prompts import Prompter
from tokenary.probe.charbench.scoring import Asker, Scoring
from tokenary.probe.charbench.segmentation import Cut, characters, cut, features, resplit
from tokenary.probe.charbench.tables import tables
from tokenary.probe.charbench.words import Source, words_of

CARD = Card(
    slug="charbench",
    cls="CharBench",
    room="probe",
    slot="probe",
    title="CharBench: Evaluating the Role of Tokenization in Character-Level Tasks",
    summary="asks how many and where characters are in words, and whether tokens explain the errors",
    paper="2508.02591",
    year=2025,
    code="omriuz/CharBench",
    requires=("kv-cache",),
)


class CharBench(Probe):
    """Asks a model about characters.

    Parameters
    ----------
    words : int
        Questions of each task, at most; 7 or more, one of each length. The paper has 43,750.
    text : {"prose", "wikipedia", "german", "strings"}
        Where the words come from: a novel, English Wikipedia (a download), German, or shuffled letters.
    scoring : {"closed", "open", "both"}
        ``closed``: the number from 0 to 10 of the highest likelihood. ``open``: what the model writes, greedily.
    raw : bool
        Plain text instead of the model's chat template.
    shots : int
        Worked examples in the prompt.
    override : {"none", "characters", "spaces", "token"}
        Ask everything once more with words cut otherwise: one token a character; spaces between the letters; or, in
        positions, the token that holds the answer in two, beside the same done to another token of the word.
    resamples : int
        Of the bootstrap.
    batch : int
        Prompts a pass.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {"words": 14, "resamples": 20}

    def __init__(
        self,
        words: Annotated[int, Field(ge=7, le=43_750)] = 350,
        text: Source = "prose",
        scoring: Literal["closed", "open", "both"] = "closed",
        raw: bool = False,
        shots: Annotated[int, Field(ge=0, le=4)] = 0,
        override: Literal["none", "characters", "spaces", "token"] = "none",
        resamples: Annotated[int, Field(ge=0, le=100_000)] = 1000,
        batch: Annotated[int, Field(ge=1, le=1024)] = 16,
    ) -> None:
        self.words, self.text, self.raw, self.shots = words, text, raw, shots
        self.override, self.resamples, self.batch = override, resamples, batch
        self.modes: tuple[Scoring, ...] = ("closed", "open") if scoring == "both" else (scoring,)

    def run(self, lm: LM, seed: int = 0, progress: Progress | None = None) -> Report:
        """Ask, score and analyse.

        Raises
        ------
        UnsupportedModelError
            The model fills masks, has no tokenizer, or its tokens do not spell words.
        """
        if lm.kind != "causal":
            raise UnsupportedModelError(f"{lm.name} does not write from left to right")
        prompter = Prompter(lm, self.raw, self.shots)
        items = generate(words_of(self.text, seed), self.words, seed)
        cuts = {item: found for item in items if (found := cut(prompter.vocabulary, item.word)) is not None}
        if {item.task for item in cuts} != set(TASKS):
            raise UnsupportedModelError(f"the tokens of {lm.name} do not spell the words")
        anew = {task: self._arms(prompter, [item for item in cuts if item.task == task], cuts) for task in TASKS}
        questions = len(cuts) * len(self.modes) + sum(len(ways) for arms in anew.values() for ways in arms.values())
        asker = Asker(prompter, self.batch, progress, questions)
        figures: dict[str, Any] = {
            "text": self.text,
            "prompt": "raw" if prompter.raw else "chat",
            "shots": self.shots,
            "questions": len(cuts),
            "words_left_out": len(items) - len(cuts),
            "scoring": {mode: {} for mode in self.modes},
            "override": {} if self.override != "none" else None,
        }
        for task in TASKS:
            asked = [item for item in cuts if item.task == task]
            described = [features(item, cuts[item]) for item in asked]
            usual = {item: {"usual": list(cuts[item].ids)} for item in asked}
            for mode in self.modes:
                answers = asker.ask(task, mode, usual)["usual"]
                analysed = analyse(asked, described, list(answers.values()), seed, self.resamples)
                figures["scoring"][mode][task] = analysed | {"answers": list(answers.values())}
            if self.override != "none":
                first = dict(zip(asked, figures["scoring"][self.modes[0]][task]["answers"], strict=True))
                figures["override"][task] = self._overridden(asker, task, anew[task], first)
        return Report("charbench", lm.name, figures, tables(figures), self._notes(figures, items))

    def _arms(
        self, prompter: Prompter, items: Sequence[Item], cuts: Mapping[Item, Cut]
    ) -> dict[Item, dict[str, Sequence[int]]]:
        """Give the words of one task in the other ways that `override` names; items without such are left out."""
        found: dict[Item, dict[str, Sequence[int]]] = {}
        for item in items if self.override != "none" else ():
            if self.override == "spaces":
                found[item] = {"spaces": prompter.spaced(item.word)}
            elif self.override == "characters":
                if (single := characters(prompter.vocabulary, item.word)) is not None:
                    found[item] = {"characters": single.ids}
            elif (both := resplit(prompter.vocabulary, cuts[item], item)) is not None:
                found[item] = {"answer's token": both[0].ids, "other token": both[1].ids}
        return found

    def _overridden(
        self,
        asker: Asker,
        task: str,
        arms: Mapping[Item, Mapping[str, Sequence[int]]],
        first: Mapping[Item, int | None],
    ) -> dict[str, Any]:
        """Ask the same questions with other tokens, and compare question by question."""
        answers = asker.ask(task, self.modes[0], arms, spaced=self.override == "spaces") if arms else {}
        found = {}
        for arm, given in answers.items():
            before = np.array([first[item] == item.gold for item in given])
            after = np.array([answer == item.gold for item, answer in given.items()])
            found[arm] = paired(before, after)
        return found

    def _notes(self, figures: Mapping[str, Any], items: Sequence[Item]) -> list[str]:
        asked = len(items) // len(TASKS)
        notes = []
        if asked < self.words - self.words % 7:
            notes.append(f"the words of this text suffice for {asked} questions of each task, as many of each length")
        if figures["words_left_out"]:
            notes.append(f"{figures['words_left_out']} words that the tokens cannot spell are left out")
        for mode, found in figures["scoring"].items():
            weak = [task for task in TASKS if not found[task]["above_majority"]]
            if weak:
                notes.append(
                    f"{mode} scoring: not above the most frequent answer by two standard errors in {', '.join(weak)};"
                    " correlations there would say nothing about the model and are left out"
                )
        return notes
