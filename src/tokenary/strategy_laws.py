"""The laws of strategies: what every loop must keep, whatever it writes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from tokenary.core.decoding import Decoding, Emission, Running
from tokenary.core.laws import (
    LawFunction,
    Make,
    NotApplicable,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.sampling import Chooser, Sampler
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.strategy import Strategy, Task
from tokenary.hf.target import attached
from tokenary.models.lm import LM
from tokenary.models.text_diffusion import build
from tokenary.models.tiny import tiny_lm

VOCAB, NEW = 13, 20
PROMPTS = [substream(0, "strategy prompt", n).integers(0, VOCAB, n).tolist() for n in (11, 4, 19)]
SAMPLERS = (Sampler(), Sampler(temperature=1.2, top_p=0.95, seed=3))


class Plain:
    """The ordinary loop, one token a pass, for strategies that only choose tokens."""

    def __init__(self, task: Task, chooser: Chooser) -> None:
        self.task, self.chooser = task, chooser
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(task.prompts)]
        self.branches: list[list[Decoding]] = [[] for _ in task.prompts]
        self.peak_bytes = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        task, target, live = self.task, self.task.target(), list(self.sequences)
        logits = target.prefill(task.prompts)
        while True:
            chosen = self.chooser(logits, [s.index for s in live], [s.ids for s in live])
            for sequence, token in zip(live, chosen, strict=True):
                sequence.ids.append(token)
                if token in task.end_tokens or (task.stops is not None and task.stops(sequence.index, sequence.ids)):
                    sequence.finish = "stop"
                elif len(sequence.new_ids) == task.max_new_tokens:
                    sequence.finish = "length"
            yield [Emission(s.index, [t], [False], s.finish) for s, t in zip(live, chosen, strict=True)]
            rows = [row for row, sequence in enumerate(live) if sequence.finish is None]
            if not rows:
                return
            target.select_rows(rows)
            live = [live[row] for row in rows]
            logits = target.score(TokenTree.roots([sequence.ids[-1] for sequence in live]))[:, 0]
            target.commit([[0]] * len(live))


def toy(method: Strategy) -> LM:
    """Return a toy net that a strategy can run on, once it is prepared for it."""
    if "diffusion" in method.card.requires:
        raise NotApplicable("it needs a model of the kind diffusion")
    lm = tiny_any_subset() if "any-subset" in method.card.requires else tiny_lm(vocab=VOCAB)
    method.prepare(lm.model, None)
    return lm


def tiny_any_subset() -> LM:
    """Return a random any-subset net, whose mask token is none of the prompts'."""
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "context": 64}
    model = build(objective="any-subset", vocab=VOCAB + 1, **sizes).eval()
    model.config.mask_token_id = VOCAB
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # else it says nearly the same of every position
    return LM("tiny-any-subset", model, None, "", "random weights")


def ready(lm: LM) -> contextlib.AbstractContextManager[None]:
    """Let a causal net use our attention inside the block; the others keep their own."""
    return attached(lm.model) if lm.kind == "causal" else contextlib.nullcontext()


def start(
    method: Strategy,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    sampler: Sampler = SAMPLERS[1],
    new: int = NEW,
    end_tokens: Sequence[int] = (),
    stops: Callable[[int, Sequence[int]], bool] | None = None,
) -> tuple[LM, Running]:
    """Return a toy net and the loop of a strategy over it, to be run inside `ready`."""
    lm = toy(method)
    task = Task(lm.model, None, prompts, sampler, new, end_tokens, stops)
    return lm, method.loop(task) if method.owns_loop else Plain(task, method.chooser(task))


def run(
    method: Strategy,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    sampler: Sampler = SAMPLERS[1],
    new: int = NEW,
    end_tokens: Sequence[int] = (),
    stops: Callable[[int, Sequence[int]], bool] | None = None,
) -> Running:
    """Run a strategy on a toy net to the end."""
    lm, loop = start(method, prompts, sampler, new, end_tokens, stops)
    with ready(lm):
        for _ in loop:
            pass
    return loop


def texts(loop: Running) -> list[Decoding]:
    """All answers and the branches that were not pruned; of an answer that joins several branches, these alone."""
    found = []
    for answer, row in zip(loop.sequences, loop.branches, strict=True):
        joins = len(row) > 1 and answer.new_ids == [token for text in row for token in text.new_ids]
        found += [text for text in row if text.finish != "pruned"] + [answer] * (not joins)
    return found


def same(found: Running, expected: Running, what: str, rows: Sequence[int] | None = None) -> None:
    """Demand that the answers and branches of two loops are equal; `rows` of the second one, where given."""
    chosen = range(len(expected.sequences)) if rows is None else rows
    require(len(found.sequences) == len(chosen), f"{what}: {len(found.sequences)} answers instead of {len(chosen)}")
    for at, row in enumerate(chosen):
        for kind, left, right in (
            ("answer", [found.sequences[at]], [expected.sequences[row]]),
            ("branches", found.branches[at], expected.branches[row]),
        ):
            name = f"{what}: {kind} of prompt {row}"
            same_tokens([text.new_ids for text in left], [text.new_ids for text in right], name)
            ends = [text.finish for text in left], [text.finish for text in right]
            require(ends[0] == ends[1], f"{name}: ended by {ends[0]} instead of {ends[1]}")
            for one, other in zip(left, right, strict=True):
                weights = one.log_weight, other.log_weight
                alike = weights[0] == weights[1] or abs(weights[0] - weights[1]) < 1e-3
                require(alike, f"{name}: weight {weights[0]} instead of {weights[1]}")


# ---------------------------------------------------------------------------------------------------- the laws


def a_batch_is_its_prompts(make: Make) -> None:
    """Answers and branches of a batch are those that its prompts give one by one, also where they end apart."""
    for sampler in SAMPLERS:
        ends = tuple(run(make(), sampler=sampler).sequences[0].new_ids[5:6])
        for end_tokens in ((), ends):
            batch = run(make(), sampler=sampler, end_tokens=end_tokens)
            for row, prompt in enumerate(PROMPTS):
                named = replace(sampler, first_row=row)
                alone = run(make(), [prompt], named, end_tokens=end_tokens)
                same(alone, batch, f"alone against batch, temperature {sampler.temperature}", [row])


def the_same_seed_gives_the_same_text(make: Make) -> None:
    """Two fresh instances write the same, and so does one instance twice."""
    for sampler in SAMPLERS:
        method = make()
        first = run(method, sampler=sampler)
        same(run(make(), sampler=sampler), first, "two instances")
        same(run(method, sampler=sampler), first, "one instance twice")


def nothing_of_earlier_texts_shows(make: Make) -> None:
    """An instance that wrote other texts, or was cancelled, writes what a fresh one writes."""
    fresh = run(make())
    method = make()
    run(method, [[1, 2, 3], [4] * 7])
    same(run(method), fresh, "after other texts")
    lm, loop = start(method, [[5, 6]] * 4)
    with ready(lm):
        for passes, _ in enumerate(loop):
            if passes == 3:
                break
    same(run(method), fresh, "after a cancelled run")


def emissions_make_every_text(make: Make) -> None:
    """The emissions, applied in their order, give every answer and branch, and say how each one ended."""
    lm, loop = start(make())
    made: dict[tuple[int, int | None], dict[int, int]] = {}
    ended: dict[tuple[int, int | None], str | None] = {}
    with ready(lm):
        for emissions in loop:
            before = {key: dict(tokens) for key, tokens in made.items()}
            for emission in emissions:
                key = emission.row, emission.branch
                name = f"prompt {key[0]}, branch {key[1]}"
                count = len(emission.token_ids)
                require(len(emission.from_draft) == count, f"{name}: {count} tokens, marks {emission.from_draft}")
                if emission.copy_of is not None:
                    source = emission.row, emission.copy_of
                    require(source in before, f"{name} copies branch {emission.copy_of}, of which nothing was emitted")
                    made[key], ended[key] = dict(before[source]), None
                grown = emission.finish == "pruned" or ended.get(key) is None
                require(grown, f"{name}: tokens {emission.token_ids} after it ended")
                tokens = made.setdefault(key, {})
                places = range(len(tokens), len(tokens) + count) if emission.at is None else emission.at
                tokens.update(zip(places, emission.token_ids, strict=True))
                ended[key] = emission.finish
    for row, answer in enumerate(loop.sequences):
        named: dict[int | None, Decoding] = {None: answer, **dict(enumerate(loop.branches[row]))}
        require({key[1] for key in made if key[0] == row} <= named.keys(), f"prompt {row}: emissions of no branch")
        for branch, text in named.items():
            name = f"prompt {row}, branch {branch}"
            tokens = made.get((row, branch), {})
            require(sorted(tokens) == list(range(len(tokens))), f"{name}: places {sorted(tokens)}")
            same_tokens([[tokens[at] for at in sorted(tokens)]], [text.new_ids], name)
            said = ended.get((row, branch))
            require(said == text.finish, f"{name}: emitted as ended by {said}, it is {text.finish}")


def texts_end_where_they_should(make: Make) -> None:
    """No text is longer than asked for; an end token ends a text and is its last token."""
    full = run(make())
    ends = tuple({text.new_ids[min(7, len(text.new_ids) - 1)] for text in full.sequences[:2]})
    for new, end_tokens in ((1, ()), (2, ()), (NEW, ends), (NEW - 1, ends[:1])):
        loop = run(make(), new=new, end_tokens=end_tokens)
        for text in texts(loop):
            name, ids = f"max_new_tokens={new}, ends {end_tokens}, prompt {text.index}", text.new_ids
            require(1 <= len(ids) <= new, f"{name}: {len(ids)} tokens")
            require(not set(ids[:-1]).intersection(end_tokens), f"{name}: goes on after an end token: {ids}")
            finish = "stop" if ids[-1] in end_tokens else "length"
            require(text.finish == finish, f"{name}: ended by {text.finish!r} with {ids}")
            require(finish == "stop" or len(ids) == new, f"{name}: ended by length after {len(ids)} tokens")


def stops_are_honoured(make: Make) -> None:
    """A text ends as soon as ``stops`` says so of its prompt and tokens, and only then or at its full length."""

    def stops(row: int, ids: Sequence[int]) -> bool:
        new = len(ids) - len(PROMPTS[row])
        return list(ids[: len(PROMPTS[row])]) == PROMPTS[row] and new >= 3 and (ids[-1] + ids[-2]) % 4 == row

    for text in texts(run(make(), stops=stops)):
        lengths = range(text.n_prompt + 1, len(text.ids) + 1)
        first = next((length for length in lengths if stops(text.index, text.ids[:length])), None)
        name = f"prompt {text.index}: {text.new_ids}"
        require(first in (None, len(text.ids)), f"{name} goes on after stops said that it ends")
        require(text.finish == ("length" if first is None else "stop"), f"{name} ended by {text.finish!r}")


def prompts_are_left_alone(make: Make) -> None:
    """The prompt's lists of tokens are not changed, and every text begins with its prompt and says which it is."""
    given = copy.deepcopy(PROMPTS)
    loop = run(make(), given)
    require(given == PROMPTS, "the prompts were changed")
    require(len(loop.branches) == len(PROMPTS), f"branches of {len(loop.branches)} prompts")
    for row, prompt in enumerate(PROMPTS):
        for text in [loop.sequences[row], *loop.branches[row]]:
            require(
                text.ids is not given[row] and text.ids[: text.n_prompt] == prompt, f"a text of prompt {row} lost it"
            )
            require((text.index, text.n_prompt) == (row, len(prompt)), f"prompt {row}: {text.index}, {text.n_prompt}")


STRATEGY_LAWS: tuple[LawFunction, ...] = (
    a_batch_is_its_prompts,
    the_same_seed_gives_the_same_text,
    nothing_of_earlier_texts_shows,
    emissions_make_every_text,
    texts_end_where_they_should,
    stops_are_honoured,
    prompts_are_left_alone,
    options_are_checked_and_fixed,
    the_recipe_survives_json,
)
