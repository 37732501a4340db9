"""The laws of denoising: masks are filled once and for good, whatever chooses them and whatever is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenary.core.laws import (
    LawFunction,
    Make,
    NotApplicable,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.method import Method
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.decode.denoise import Candidates, Denoise, Pass, Unmasker, Window, WindowState
from tokenary.hf.strategy import Task
from tokenary.models.text_diffusion import TextDiffusionModel, build

NEW, MASK = 24, 1
SAMPLERS = (Sampler(), Sampler(temperature=1.0, seed=3))


def net(vocab: int = 61, seed: int = 0) -> TextDiffusionModel:
    """Make a random bidirectional net that is sure of some tokens and unsure of others, in float32."""
    sizes: dict[str, int] = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "context": 128}
    model = build(seed=seed, vocab=vocab, **sizes).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        model.model.norm.weight.mul_(3)  # the logits of the small tied head are too near each other without it
    return model


def prompts_of(*lengths: int, vocab: int = 61, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens; every third one is a template with two gaps."""
    made = []
    for number, length in enumerate(lengths):
        ids = substream(seed, "denoise prompt", number).integers(3, vocab, length).tolist()
        if number % 3 == 2:
            ids[2:5] = [MASK] * 3
            ids[-3] = MASK
        made.append(ids)
    return made


RAGGED = prompts_of(17, 4, 30, 9)


def run(
    model: TextDiffusionModel,
    method: Method | None,
    prompts: Sequence[Sequence[int]],
    new: int = NEW,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    end_tokens: Sequence[int] = (),
) -> Denoise:
    """Run the loop to its end, with the method in its slot."""
    loop = loop_of(model, method, prompts, new, sampler, end_tokens)
    for _ in loop:
        pass
    return loop


def loop_of(
    model: TextDiffusionModel,
    method: Method | None,
    prompts: Sequence[Sequence[int]],
    new: int = NEW,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    end_tokens: Sequence[int] = (),
) -> Denoise:
    """Return the loop, with the method in its slot."""
    task = Task(model, None, prompts, sampler, new, end_tokens)
    unmasker = method if isinstance(method, Unmasker) else None
    return Denoise(task, unmasker, method if isinstance(method, Window) else None)


def texts(loop: Denoise) -> list[list[int]]:
    """All tokens of each sequence, prompt and answer."""
    return [sequence.ids for sequence in loop.sequences]


class WatchedUnmasker(Unmasker):
    """An unmasker whose every choice is held to what it was offered."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.block = inner, inner.block

    def unmask(self, candidates: Candidates) -> Tensor:
        """Choose, and check the choice."""
        confidence = candidates.confidence.clone()
        chosen = self.inner.unmask(candidates)
        require(torch.equal(confidence, candidates.confidence), "unmask changed the confidences it was shown")
        require(
            chosen.shape == confidence.shape and chosen.dtype == torch.bool,
            f"chosen is {chosen.dtype} {tuple(chosen.shape)} instead of bool {tuple(confidence.shape)}",
        )
        require(not bool((chosen & ~candidates.eligible).any()), f"pass {candidates.step}: chose what is no candidate")
        require(bool(chosen.any(1).all()), f"pass {candidates.step}: chose nothing")
        return chosen


class WatchedWindow(Window):
    """A window whose every plan is held to what a cache can serve."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.early_stop = inner, inner.early_stop

    def begin(self) -> WindowState:
        """Begin."""
        return _WatchedState(self.inner.begin())


class _WatchedState(WindowState):
    def __init__(self, inner: WindowState) -> None:
        self.inner = inner
        self.written: Tensor | None = None

    def plan(self, masked: Tensor, fresh: Tensor) -> Pass:
        """Plan, and check the plan."""
        before = masked.clone(), fresh.clone()
        found = self.inner.plan(masked, fresh)
        require(torch.equal(masked, before[0]) and torch.equal(fresh, before[1]), "plan changed what it was shown")
        every = torch.arange(len(masked))
        computed = every if found.computed is None else found.computed
        attended = every if found.attended is None else found.attended
        for what, positions in (("computed", computed), ("attended", attended)):
            ascending = bool((positions.diff() > 0).all())
            require(len(positions) and ascending, f"{what} positions {positions.tolist()} are not ascending")
        require(bool(masked[computed].any()), "no masked position is computed")
        first = int(masked.int().argmax())
        require(first in computed.tolist(), f"the first mask, at {first}, is not computed")
        self.written = torch.zeros_like(masked) if self.written is None else self.written
        self.written[computed] = True
        require(bool(self.written[attended].all()), "a position is attended to that was never computed")
        return found


def watched(method: Method) -> Method:
    """Wrap a method in its watch."""
    return WatchedUnmasker(method) if isinstance(method, Unmasker) else WatchedWindow(method)


# ---------------------------------------------------------------------------------------------------- the laws


def every_mask_is_filled_once(make: Make) -> None:
    """Every mask is filled exactly once, with a token, and no token of the prompt is changed."""
    model = net()
    for sampler in SAMPLERS:
        loop = loop_of(model, watched(make()), RAGGED, sampler=sampler)
        filled: list[list[int]] = [[] for _ in RAGGED]
        for emissions in loop:
            for emission in emissions:
                filled[emission.row] += emission.at or []
        for prompt, sequence, at in zip(RAGGED, loop.sequences, filled, strict=True):
            template = [*prompt, *[MASK] * NEW]
            gaps = [i - sequence.n_prompt for i, token in enumerate(template) if token == MASK]
            require(sorted(at) == gaps, f"row {sequence.index}: filled {sorted(at)} instead of {gaps}")
            require(MASK not in sequence.ids, f"row {sequence.index}: a mask is left or was written")
            kept = all(t in (MASK, s) for t, s in zip(template, sequence.ids, strict=True))
            require(kept, f"row {sequence.index}: a token of the prompt was changed")


def emissions_reproduce_the_text(make: Make) -> None:
    """Placing every emission at its positions gives the text, also where an end token closes it."""
    model = net()
    end = run(model, make(), RAGGED[:1]).sequences[0].new_ids[NEW // 2]
    for ends in ((), (end,)):
        loop = loop_of(model, make(), RAGGED, end_tokens=ends)
        shown = [[*prompt, *[MASK] * NEW] for prompt in RAGGED]
        finish: list[str | None] = [None] * len(RAGGED)
        for emissions in loop:
            for emission in emissions:
                require(finish[emission.row] is None, f"row {emission.row} goes on after its end")
                finish[emission.row] = emission.finish
                for at, token in zip(emission.at or [], emission.token_ids, strict=True):
                    shown[emission.row][loop.sequences[emission.row].n_prompt + at] = token
        for row, sequence in enumerate(loop.sequences):
            require(finish[row] == sequence.finish is not None, f"row {row} ends {finish[row]}, {sequence.finish}")
            size = len(sequence.ids)
            same_tokens([shown[row][:size]], [sequence.ids], f"row {row}, end tokens {ends}")
            require(sequence.finish == "stop" or size == len(shown[row]), f"row {row} is cut for no reason")


def an_end_token_only_cuts(make: Make) -> None:
    """A text ends with its first end token, and is otherwise the text that comes without end tokens."""
    if make().options.get("early_stop"):
        raise NotApplicable("early_stop drops what stands behind an end token before the rest is filled")
    model = net()
    full = run(model, make(), RAGGED)
    end = full.sequences[0].new_ids[NEW // 3]
    cut = run(model, make(), RAGGED, end_tokens=[end])
    for row, (sequence, prompt) in enumerate(zip(full.sequences, RAGGED, strict=True)):
        new = sequence.ids[len(prompt) :]
        expected = sequence.ids[: len(prompt) + new.index(end) + 1] if end in new else sequence.ids
        same_tokens([cut.sequences[row].ids], [expected], f"row {row}")


def a_batch_is_its_sequences(make: Make) -> None:
    """Neighbours in a batch, and their end, change nothing."""
    model = net()
    for sampler in SAMPLERS:
        alone = []
        for row, prompt in enumerate(RAGGED):
            named = Sampler(sampler.temperature, seed=sampler.seed, first_row=row)
            alone += texts(run(model, make(), [prompt], sampler=named))
        same_tokens(texts(run(model, make(), RAGGED, sampler=sampler)), alone, f"batch against single, {sampler}")


def the_same_seed_gives_the_same_text(make: Make) -> None:
    """Two fresh instances write alike, and another seed of the sampler writes something else."""
    model = net()
    for sampler in SAMPLERS:
        same_tokens(
            texts(run(model, make(), RAGGED, sampler=sampler)),
            texts(run(model, make(), RAGGED, sampler=sampler)),
            str(sampler),
        )
    other = Sampler(temperature=1.0, seed=4)
    differs = texts(run(model, make(), RAGGED, sampler=SAMPLERS[1])) != texts(run(model, make(), RAGGED, sampler=other))
    require(differs, "the seed of the sampler has no effect")


def passes_never_exceed_masks(make: Make) -> None:
    """There are no more passes than masks, and the trace accounts for every token."""
    model = net()
    for sequence, prompt in zip(run(model, make(), RAGGED).sequences, RAGGED, strict=True):
        masks = prompt.count(MASK) + NEW
        require(sequence.trace.passes <= masks, f"{sequence.trace.passes} passes for {masks} masks")
        require(sequence.trace.accepted == masks, f"{sequence.trace.accepted} tokens committed for {masks} masks")
        rows = [computed for computed, _ in sequence.trace.per_pass]
        total = len(prompt) + NEW
        require(all(0 < computed <= total for computed in rows), f"computed {max(rows)} rows of {total}")


def nothing_of_earlier_texts_shows(make: Make) -> None:
    """What an instance did before, a cancelled run included, changes no text."""
    model, used = net(), make()
    fresh = texts(run(model, make(), RAGGED))
    run(model, used, prompts_of(31, 8, seed=1))
    same_tokens(texts(run(model, used, RAGGED)), fresh, "after other texts")
    for passes, _ in enumerate(loop_of(model, used, RAGGED)):
        if passes == 5:
            break
    same_tokens(texts(run(model, used, RAGGED)), fresh, "after a cancelled run")


def all_of_it_is_the_full_decoder(make: Make) -> None:
    """With nothing left out and nothing cached, the window gives the full decoder's text, token for token."""
    model = net()
    everything = type(make()).everything
    for sampler in SAMPLERS:
        found = run(model, make(**everything), RAGGED, sampler=sampler)
        same_tokens(texts(found), texts(run(model, None, RAGGED, sampler=sampler)), str(sampler))


_BOTH: tuple[LawFunction, ...] = (
    every_mask_is_filled_once,
    emissions_reproduce_the_text,
    an_end_token_only_cuts,
    a_batch_is_its_sequences,
    the_same_seed_gives_the_same_text,
    passes_never_exceed_masks,
    nothing_of_earlier_texts_shows,
    options_are_checked_and_fixed,
    the_recipe_survives_json,
)
UNMASK_LAWS: tuple[LawFunction, ...] = _BOTH
WINDOW_LAWS: tuple[LawFunction, ...] = (*_BOTH, all_of_it_is_the_full_decoder)
