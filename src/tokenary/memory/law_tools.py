"""What the laws of the room share: prompts, toy nets, and the plainest loop over a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokenary.core.laws import Make, same_tokens
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.cache import TokenCache, TokenLayer
from tokenary.hf.target import Target, attached
from tokenary.memory.base import StorePolicy
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm

NEW = 40


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids."""
    return [
        substream(seed, "law prompt", number).integers(0, 97, length).tolist() for number, length in enumerate(lengths)
    ]


RAGGED = prompts_of(70, 33, 101, 64)


def cache_of(lm: LM, policy: Any | None) -> TokenCache:
    """Return a cache with a policy that keeps or stores, or a full one."""
    if isinstance(policy, StorePolicy):
        return TokenCache(lm.model.config, stores=policy.attach(lm.model.config))
    return TokenCache(lm.model.config, None if policy is None else states_of(lm, policy))


def toy(make: Make, **options: Any) -> Any:
    """Make a method as it is on toy texts; see `toy_options`."""
    return make(**{**make().toy_options, **options})


def states_of(lm: LM, policy: Any) -> list[Any]:
    """Return fresh state of a keep policy for every layer, once it is ready for the model."""
    policy.prepare(lm.model)
    states: list[Any] = policy.attach(lm.model.config, lm.dtype)
    return states


def net_for(make: Make) -> LM:
    """Return a toy net; in float64 for a method that rounds what it stores.

    Rounding can turn a difference in the last digit, as between passes of different width, into one of a whole step.
    """
    lm = tiny_lm()
    if isinstance(make(), StorePolicy):
        lm.model.double()
    return lm


def target_of(lm: LM, policy: Any | None) -> Target:
    """Return a target over a policy, or over a full cache."""
    target = Target(lm.model)
    target.cache = cache_of(lm, policy)
    return target


def run(
    lm: LM,
    policy: Any | None,
    prompts: Sequence[Sequence[int]],
    new: int = NEW,
    draft: Callable[[list[list[int]]], TokenTree] | None = None,
    after: Callable[[Target, list[int]], None] | None = None,
    target: Target | None = None,
) -> list[list[int]]:
    """Greedy tokens of each prompt: the plainest loop over a `Target`, here because a room imports no other room.

    ``draft`` makes the trees of a pass from all tokens so far; without it every pass takes one token. ``after`` is
    called with the target and the tokens taken of each sequence, after the prompts and after every pass.
    """
    target = target or target_of(lm, policy)
    with attached(lm.model):
        first = target.prefill(prompts).argmax(-1).tolist()
        if after is not None:
            after(target, [len(prompt) for prompt in prompts])
        texts = [[*prompt, token] for prompt, token in zip(prompts, first, strict=True)]
        while min(len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True)) < new:
            tree = TokenTree.roots([text[-1] for text in texts]) if draft is None else draft(texts)
            paths = advance(target, texts, tree)
            if after is not None:
                after(target, [len(path) for path in paths])
    return [text[len(prompt) :][:new] for text, prompt in zip(texts, prompts, strict=True)]


def advance(target: Target, texts: Sequence[list[int]], tree: TokenTree) -> list[list[int]]:
    """Score a tree for each text, and append what was chosen on the accepted paths, which are returned."""
    choices, paths = target.score(tree).argmax(-1).tolist(), []
    for row, text in enumerate(texts):
        path = [0]
        while (child := tree.child(row, path[-1], choices[row][path[-1]])) >= 0:
            path.append(child)
        path = path[: target.room(row)]
        text += [choices[row][node] for node in path]
        paths.append(path)
    target.commit(paths)
    return paths


def sequences_come_and_go(lm: LM, start: Callable[[], Target], new: int) -> None:
    """Demand that sequences that join a running batch, and one that leaves, change nobody's tokens.

    Every sequence is read in a target of its own, made by `start`. Drafts are verified, right and wrong ones.
    """
    plain = run(lm, None, RAGGED, new + 8, target=start())
    truth = [prompt + ids for prompt, ids in zip(RAGGED, plain, strict=True)]
    texts, batch, stream = [list(prompt) for prompt in RAGGED], list[int](), np.random.default_rng(1)
    target, passes = start(), 0
    with attached(lm.model):
        while passes < 8 or any(len(texts[row]) < len(RAGGED[row]) + new for row in batch):
            if passes in (0, 1, 4, 7):
                newcomer = start() if batch else target
                row = (0, 1, 4, 7).index(passes)
                texts[row].append(int(newcomer.prefill([RAGGED[row]]).argmax()))
                if batch:
                    target.join(newcomer)
                batch.append(row)
            if passes == 5:
                target.select_rows(list(range(1, len(batch))))
                del batch[0]
            tree = oracle([texts[row] for row in batch], [truth[row] for row in batch], stream)
            advance(target, [texts[row] for row in batch], tree)
            passes += 1
    for row, prompt in enumerate(RAGGED):
        found = texts[row][len(prompt) :][:new]
        same_tokens([found], [plain[row][: len(found)]], f"sequence {row}, which {'joins' if row else 'leaves'}")


def layers_of(target: Target) -> list[Any]:
    """Return the layers of a target's cache, every one a `TokenLayer`."""
    return target.cache.layers


def positions(layer: TokenLayer, row: int) -> list[list[int]]:
    """Original positions that each key head of a sequence holds."""
    held = layer.held[row]
    if layer.positions is None:
        assert layer.storage is not None
        return [list(range(held))] * layer.storage.shape[2]
    return layer.positions[row, :, :held].tolist()


def oracle(texts: Sequence[list[int]], truth: Sequence[list[int]], stream: np.random.Generator) -> TokenTree:
    """Trees that hold the tokens to come between wrong ones, now and then a wrong one in their place."""
    trees = []
    for text, full in zip(texts, truth, strict=True):
        n, full = len(text), [*full, 0, 0, 0, 0, 0]
        right = full[n : n + 4] + [0] * (4 - len(full[n : n + 4]))
        wrong = [(token + 1) % 97 for token in right]
        tokens = [text[-1], wrong[0], right[0], right[1], wrong[1], right[2], wrong[2], right[3]]
        parents = [-1, 0, 0, 2, 2, 3, 3, 5]
        if stream.random() < 0.3:
            tokens[5] = wrong[2]
        size = int(stream.integers(2, 9))
        trees.append((tokens[:size], parents[:size]))
    return TokenTree.stack(trees)
