"""Group Think: thinkers that read each other list more different things in the same steps than independent ones."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.sampling import Sampler
from tokenary.decode.base import Loop
from tokenary.decode.group_think import GroupThink, encode, header
from tokenary.hf.strategy import Task
from tokenary.hf.target import Target, attached
from tokenary.run import load

#: What counts as an item of each list: common names, singular, longer ones first where one holds another.
ITEMS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
LIST = "List as many different {what} as you can, separated by commas."
COUNTER = "Together we list {what}, separated by commas. Continue the list from where the group is now."

Groups = list[list[list[str]]]  # for each prompt, for each thread: the valid items in the order of writing


def find_items(what: str, text: str) -> list[str]:
    """Return the valid items of a list in a text, repeats included, in the order of writing."""
    names = "|".join(map(re.escape, ITEMS[what]))
    return re.findall(rf"\b({names})(?:s|es)?\b", re.sub(r"(\w)ies\b", r"\1y", text.lower()))


def distinct(groups: Groups) -> np.ndarray:
    """Different valid items that the threads of each prompt wrote together."""
    return np.array([len({item for thread in threads for item in thread}) for threads in groups])


def repeats(groups: Groups) -> float:
    """Share of all valid mentions that name an item a second time."""
    mentions = sum(len(thread) for threads in groups for thread in threads)
    return 1 - float(distinct(groups).sum()) / mentions if mentions else 0.0


def shared(groups: Groups) -> float:
    """Share of the threads' different items that another thread has too: duplicate work between thinkers."""
    own = sum(len(set(thread)) for threads in groups for thread in threads)
    return 1 - float(distinct(groups).sum()) / own if own else 0.0


def timing(seed: int = 0, thinkers: int = 4, budget: int = 64, rounds: int = 3) -> dict[str, float]:
    """Measure how many times faster N thinkers are than N ordinary runs of as many tokens.

    Wall clock of one prompt, runs in turns, medians; the first round is thrown away.
    """
    lm = load("smollm2")
    assert lm.tokenizer is not None
    prompt, sampler = lm.encode([LIST.format(what="animals")])[0], Sampler(temperature=0.7, seed=seed)
    headers = [encode(lm.tokenizer, header(n)) for n in range(thinkers)]
    new = budget - max(map(len, headers))

    def together() -> None:
        list(GroupThink(thinkers=thinkers, system=False).loop(Task(lm.model, lm.tokenizer, [prompt], sampler, budget)))

    def ordinary(batch: Sequence[list[int]]) -> None:
        list(Loop(Target(lm.model), [prompt + forced for forced in batch], sampler, new))

    def seconds(run: Callable[[], None]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def one_by_one() -> None:
        for forced in headers:
            ordinary([forced])

    ways = (together, one_by_one, lambda: ordinary(headers))
    with attached(lm.model):
        measured = [[seconds(way) for way in ways] for _ in range(rounds + 1)][1:]
    ours, apart, batched = map(statistics.median, zip(*measured, strict=True))
    return {
        f"{thinkers} thinkers over {thinkers} runs one by one": apart / ours,
        f"{thinkers} thinkers over {thinkers} runs in one batch": batched / ours,
    }


def run(
    seed: int = 0,
    thinkers: int = 4,
    budget: int = 64,
    seeds: int = 5,
    lists: int = 10,
    counter: bool = False,
) -> Outcome:
    """Count the different valid items of enumeration prompts, at temperature 0.7.

    Parameters
    ----------
    seed : int
        Names the random numbers.
    thinkers : int
        Threads a prompt.
    budget : int
        Tokens a thread, header included.
    seeds : int
        Runs of every prompt.
    lists : int
        Prompts.
    counter : bool
        Ask each thinker to go on where the group is.
    """
    lm = load("smollm2")
    assert lm.tokenizer is not None
    names = list(ITEMS)[:lists]
    prompts = lm.encode([(COUNTER if counter else LIST).format(what=what) for what in names])
    headers = [encode(lm.tokenizer, header(n)) for n in range(thinkers)]

    def found(rows: Sequence[Sequence[list[int]]]) -> Groups:
        texts = [[lm.decode(thread) for thread in threads] for threads in rows]
        return [[find_items(what, text) for text in row] for what, row in zip(names, texts, strict=True)]

    def group(number: int, **options: str) -> list[list[list[int]]]:
        sampler = Sampler(temperature=0.7, seed=number)
        with attached(lm.model):
            method = GroupThink(thinkers=thinkers, **options)  # type: ignore[arg-type]
            loop = method.loop(Task(lm.model, lm.tokenizer, prompts, sampler, budget, lm.eos_token_ids))
            list(loop)
        asked[:] = [sequence.ids[: sequence.n_prompt] for sequence in loop.sequences]
        return [[b.new_ids[len(h) :] for b, h in zip(row, headers, strict=True)] for row in loop.branches]

    def alone(starts: list[list[list[int]]], number: int) -> list[list[list[int]]]:
        flat, sampler = [ids for row in starts for ids in row], Sampler(temperature=0.7, seed=number)
        with attached(lm.model):
            loop = Loop(Target(lm.model), flat, sampler, budget, lm.eos_token_ids)
            list(loop)
        written = [sequence.new_ids for sequence in loop.sequences]
        return [written[at : at + thinkers] for at in range(0, len(written), thinkers)]

    def independent(number: int) -> list[list[list[int]]]:
        rows = alone([[prompt + forced for forced in headers] for prompt in asked], number)
        return [[ids[: budget - len(h)] for ids, h in zip(row, headers, strict=True)] for row in rows]

    asked: list[list[int]] = []  # the prompts with the system text of the method: the arms differ in visibility alone
    numbers = [seed * 1000 + i for i in range(seeds)]
    runs = {
        "group think": [group(number) for number in numbers],
        "slots without peers": [group(number, peers="none") for number in numbers],
        "independent": [independent(number) for number in numbers],
        "plain samples": [alone([[prompt] * thinkers for prompt in prompts], number) for number in numbers],
    }
    runs["none"] = [[row[:1] for row in rows] for rows in runs["plain samples"]]
    # The control: threads that were written in groups, put together at random with threads of other groups.
    written = runs["group think"]
    runs["random"] = [
        [[written[(i + n) % seeds][row][n] for n in range(thinkers)] for row in range(len(names))] for i in range(seeds)
    ]
    items = {name: [found(ids) for ids in arm] for name, arm in runs.items()}
    counts = {name: np.mean([distinct(groups) for groups in arm], axis=0) for name, arm in items.items()}  # by prompt

    def figure(name: str) -> Figure:
        return Figure.of(name, counts[name])

    def by_steps(arm: list[list[list[list[int]]]], steps: int) -> float:
        cut = [[[thread[:steps] for thread in threads] for threads in rows] for rows in arm]
        return float(np.mean([distinct(found(rows)) for rows in cut]))

    def pooled(arm: list[Groups]) -> Groups:
        return [threads for groups in arm for threads in groups]

    return Outcome(
        method=figure("group think"),
        baseline=figure("independent"),
        controls=tuple(map(figure, ("none", "random", "slots without peers", "plain samples"))),
        n=len(names),
        runs=seeds,
        paired_spread=standard_error(counts["group think"] - counts["independent"]),
        details={
            "repeated_mentions": {name: repeats(pooled(arm)) for name, arm in items.items()},
            "shared_between_threads": {name: shared(pooled(arm)) for name, arm in items.items()},
            "mentions": {
                name: sum(len(thread) for threads in pooled(arm) for thread in threads) / (seeds * len(names))
                for name, arm in items.items()
            },
            "distinct_after_steps": {
                str(steps): {name: by_steps(arm, steps) for name, arm in runs.items()}
                for steps in (budget // 4, budget // 2)
            },
            "by_list": {what: float(counts["group think"][i]) for i, what in enumerate(names)},
            "by_list_independent": {what: float(counts["independent"][i]) for i, what in enumerate(names)},
        },
    )


CLAIM = Claim(
    slug="group-think",
    statement="Four thinkers that read each other name at least 10% more different valid items in the same steps than "
    "four independent samples that start with the same headers",
    metric="different valid items a prompt after 64 tokens a thread",
    direction="higher",
    threshold=1.1,
    run=run,
    variation="eight thinkers, each asked to continue the list from where the group is",
    held_out={"thinkers": 8, "counter": True},
    minutes=12,
    fast={"seeds": 2, "lists": 2, "budget": 24},
    timing=timing,
)
