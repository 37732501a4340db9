"""The laws of keeping: what stays is within the budget, is freed for good, and depends on its own text alone.

The laws of storing: every token stays, in fewer bytes that are all counted, and is rounded once.

The last law of either is the contract with drafting: since a cache reduces or stores only at commits, and never lets a
pass commit past the next time (`room`), verifying drafts over a policy gives the text that decoding one by one over it
gives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenary.core.budget import spread
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.laws import (
    LawBroken,
    LawFunction,
    Make,
    NotApplicable,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.token_map import TokenMap, check_token_map
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.memory.base import KeepPolicy
from tokenary.memory.law_tools import (
    NEW,
    RAGGED,
    cache_of,
    layers_of,
    net_for,
    oracle,
    positions,
    prompts_of,
    run,
    sequences_come_and_go,
    states_of,
    target_of,
    toy,
)
from tokenary.memory.read_laws import READ_LAWS
from tokenary.models.tiny import tiny_lm


def _small(law: LawFunction) -> LawFunction:
    """Hold a keep policy to a law, with its toy options."""

    @functools.wraps(law)
    def held(make: Make) -> None:
        law(functools.partial(toy, make))

    return held


def budgeted(make: Make) -> None:
    """Skip the law for a policy without a budget."""
    if "keep" not in make().options:
        raise NotApplicable("it has no budget: what it holds follows from the length of a text")


def dropping(make: Make, prompt: Sequence[int]) -> KeepPolicy:
    """Make a policy that drops something of a prompt, or skip the law."""
    policy: Any = make()
    if "keep" not in policy.options:
        return policy
    total = policy.keep.resolve(len(prompt), 1 << 20)
    if total is None or total >= len(prompt):
        raise NotApplicable(f"keep={policy.keep} drops nothing of {len(prompt)} tokens")
    return policy


class Watched:
    """One layer's state, whose every choice is held to the laws of token maps and to its budget."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.maps = inner, 0

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the state itself."""
        return getattr(self.inner, name)

    def keep(self, row: int, held: int, n_new: int, prompt: bool) -> TokenMap | None:
        """Choose, and check the choice."""
        chosen = self.inner.keep(row, held, n_new, prompt)
        if chosen is not None:
            require(chosen.shape[-1] == held, f"a map of {chosen.shape[-1]} tokens where {held} are held")
            require(chosen.shape[-2] <= held, f"keeps {chosen.shape[-2]} of {held} tokens")
            self.maps += 1
            if self.maps <= 3:
                for broken in check_token_map(chosen):
                    raise LawBroken(broken)
        return chosen


# ---------------------------------------------------------------------------------------------------- the laws


def keeping_all_changes_nothing(make: Make) -> None:
    """With the whole budget the text, and what is held, is that of a full cache."""
    options = make().options
    whole = {"keep": "100%"} if "keep" in options else {"salient": options["chunk"]}
    for family in ("llama", "gemma3", "gpt2"):
        lm = tiny_lm(family=family)
        try:
            found = run(lm, make(**whole), RAGGED)
        except UnsupportedModelError:
            require(family == "gpt2", f"{family} is refused")
            continue
        same_tokens(found, run(lm, None, RAGGED), f"{family}, {whole}")
    lm = tiny_lm()
    target = target_of(lm, make(**whole))
    run(lm, None, RAGGED[:1], target=target)
    for index, layer in enumerate(layers_of(target)):
        found, expected = layer.held[0], layer.committed[0]
        require(found == expected, f"layer {index} holds {found} of {expected} tokens with keep=100%")


def the_budget_is_kept(make: Make) -> None:
    """After the prompt a layer holds its share of the budget, later at most `interval` tokens more."""
    budgeted(make)
    lm = tiny_lm(layers=3)
    policy: Any = dropping(make, RAGGED[2])
    states = policy.attach(lm.model.config, lm.dtype)
    rows = range(len(RAGGED))
    budgets = []
    for prompt in RAGGED:
        total = policy.keep.resolve(len(prompt), states[0].bytes_per_token)
        budgets.append([len(prompt)] * 3 if total is None else spread(total, 3, policy.layers))

    def after(target: Target, taken: list[int]) -> None:
        prompt = taken == [len(ids) for ids in RAGGED]
        for index, layer in enumerate(layers_of(target)):
            for row in rows:
                most = min(budgets[row][index], len(RAGGED[row])) if prompt else budgets[row][index] + policy.interval
                held = layer.held[row]
                require(held <= most, f"layer {index} holds {held} tokens of sequence {row}, {most} are allowed")

    run(lm, None, RAGGED, after=after, target=Target(lm.model, states))


def memory_really_falls(make: Make) -> None:
    """Half the budget takes little more than half the bytes, bookkeeping and free slots included; so does a third."""
    budgeted(make)
    lm, prompt = tiny_lm(hidden=128, heads=2, kv_heads=1), prompts_of(300)
    sizes: dict[str, list[int]] = {"100%": [], "50%": [], "33%": []}
    for keep, found in sizes.items():

        def after(target: Target, taken: list[int], found: list[int] = found) -> None:
            found.append(target.nbytes)

        run(lm, make(keep=keep), prompt, new=20, after=after)
    policy: Any = make(keep="50%")
    slack = policy.interval / len(prompt[0])
    for keep, share in (("50%", 0.5), ("33%", 0.33)):
        after_prompt = sizes[keep][0] / sizes["100%"][0]
        require(after_prompt <= share + 0.06, f"{after_prompt:.2f} of the full cache's bytes at keep={keep}")
        later = max(sizes[keep]) / max(sizes["100%"])
        require(
            later <= share + 0.12 + slack, f"{later:.2f} of the full cache's bytes between reductions at keep={keep}"
        )


def what_was_dropped_stays_dropped(make: Make) -> None:
    """A head holds tokens in the order of the text, each once, and none that it held no more before."""
    lm = tiny_lm()
    policy = dropping(make, RAGGED[2])
    held: dict[tuple[int, int, int], set[int]] = {}
    seen = [0] * len(RAGGED)

    def after(target: Target, taken: list[int]) -> None:
        for row, count in enumerate(taken):
            fresh = set(range(seen[row], seen[row] + count))
            seen[row] += count
            for index, layer in enumerate(layers_of(target)):
                for head, now in enumerate(positions(layer, row)):
                    before = held.get((row, index, head), set())
                    where = f"layer {index}, head {head}, sequence {row}"
                    require(now == sorted(set(now)), f"{where}: positions {now} are not ascending")
                    strange = sorted(set(now) - before - fresh)
                    require(not strange, f"{where}: position {strange[:1]} came back")
                    held[row, index, head] = set(now)

    run(lm, policy, RAGGED, after=after)


def keys_stay_those_of_their_tokens(make: Make) -> None:
    """Right after the prompt, the keys and values held are those of the full cache at the positions held."""
    if any(state.attends for state in states_of(tiny_lm(), make())):
        raise NotApplicable("it attends to the prompt in its own way, so that later layers have other keys")
    lm, prompt = tiny_lm(), RAGGED[2]
    full, kept = target_of(lm, None), target_of(lm, dropping(make, prompt))
    with attached(lm.model):
        full.prefill([prompt])
        kept.prefill([prompt])
    for index, (whole, layer) in enumerate(zip(layers_of(full), layers_of(kept), strict=True)):
        place = torch.tensor(positions(layer, 0))[None, ..., None].expand(1, -1, -1, layer.storage.shape[-1])
        for name, left, right in (("keys", layer.keys, whole.keys), ("values", layer.values, whole.values)):
            near = torch.allclose(left, right.gather(2, place), rtol=1e-4, atol=1e-4)
            require(near, f"layer {index}: the {name} are not those of the tokens at the positions held")


def every_choice_is_a_token_map(make: Make) -> None:
    """Every choice is a map over exactly the tokens held, and keeps the laws of token maps."""
    lm, prompts = tiny_lm(), [RAGGED[2], RAGGED[1]]
    states = [Watched(state) for state in states_of(lm, dropping(make, RAGGED[2]))]
    run(lm, None, prompts, target=Target(lm.model, states))
    require(any(state.maps for state in states), "nothing was ever chosen")


def the_same_options_give_the_same_text(make: Make) -> None:
    """Two fresh instances, and one instance twice, give the same text."""
    lm = net_for(make)
    used = make()
    first = run(lm, used, RAGGED)
    same_tokens(run(lm, make(), RAGGED), first, "a fresh instance")
    run(lm, used, prompts_of(90, 41, seed=1))
    same_tokens(run(lm, used, RAGGED), first, "after other texts")
    same_tokens(run(lm, used, RAGGED[2:]), first[2:], "after a larger batch")


def a_reset_forgets(make: Make) -> None:
    """After ``reset`` a cache writes what a new one writes."""
    lm = net_for(make)
    target = target_of(lm, make())
    first = run(lm, None, RAGGED, target=target)
    target.cache.reset()
    require(target.nbytes == 0, f"{target.nbytes} bytes are held after a reset")
    same_tokens(run(lm, None, RAGGED[1:], target=target), first[1:], "after a reset")


def a_batch_is_its_sequences(make: Make) -> None:
    """Neighbours in a batch change neither a text nor what is held of it."""
    lm = net_for(make)
    batch = target_of(lm, make())
    texts = run(lm, None, RAGGED, target=batch)
    for row, prompt in enumerate(RAGGED):
        single = target_of(lm, make())
        same_tokens(run(lm, None, [prompt], target=single), [texts[row]], f"sequence {row} alone")
        for index, (one, other) in enumerate(zip(layers_of(single), layers_of(batch), strict=True)):
            alike = positions(one, 0) == positions(other, row)
            require(alike, f"layer {index} holds other tokens of sequence {row} when it is alone")


def sequences_may_leave(make: Make) -> None:
    """When sequences leave the batch, or are reordered, the others go on as they would."""
    lm = net_for(make)
    whole = run(lm, make(), RAGGED)
    target, texts = target_of(lm, make()), [list(prompt) for prompt in RAGGED]
    rows = list(range(len(RAGGED)))
    with attached(lm.model):
        for row, token in zip(rows, target.prefill(RAGGED).argmax(-1).tolist(), strict=True):
            texts[row].append(token)
        for step in range(1, NEW):
            if step in (7, 23):
                order = [2, 0, 3] if step == 7 else [1, 0]
                rows = [rows[at] for at in order]
                target.select_rows(order)
            logits = target.score(TokenTree.roots([texts[row][-1] for row in rows]))
            target.commit([[0]] * len(rows))
            for row, token in zip(rows, logits[:, 0].argmax(-1).tolist(), strict=True):
                texts[row].append(token)
    for row, prompt in enumerate(RAGGED):
        found = texts[row][len(prompt) :]
        same_tokens([found], [whole[row][: len(found)]], f"sequence {row}")


def sequences_may_join(make: Make) -> None:
    """A sequence that joins a running batch, and one that leaves it, change nobody's tokens, with drafts too."""
    lm = net_for(make)
    sequences_come_and_go(lm, lambda: target_of(lm, make()), NEW)


def left_padding_changes_nothing(make: Make) -> None:
    """Under ``model.generate`` with left-padded prompts, padding is neither kept nor looked at."""
    lm = net_for(make)
    policy: Any = make()
    longest = max(map(len, RAGGED))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in RAGGED])
    cache = cache_of(lm, policy)
    with attached(lm.model):
        found = lm.model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    same_tokens(found[:, longest:].tolist(), run(lm, make(), RAGGED), "generate with left padding")


def drafts_change_nothing(make: Make) -> None:
    """Draft trees, right and wrong, verified over the policy give the text, and the cache, of one token a pass."""
    lm = net_for(make)
    for prompts in (RAGGED[2:3], RAGGED):
        plain_target, target = target_of(lm, make()), target_of(lm, make())
        plain = run(lm, None, prompts, NEW + 8, target=plain_target)
        truth = [prompt + ids for prompt, ids in zip(prompts, plain, strict=True)]
        stream, passes = np.random.default_rng(0), list[int]()

        def draft(texts: list[list[int]], truth: list[list[int]] = truth, stream: Any = stream) -> TokenTree:
            return oracle(texts, truth, stream)

        def count(target: Target, taken: list[int], passes: list[int] = passes) -> None:
            passes.append(max(taken))

        found = run(lm, None, prompts, NEW, draft, count, target)
        same_tokens(found, [ids[:NEW] for ids in plain], f"drafts, batch of {len(prompts)}")
        policy: Any = make()
        if policy.interval > 1:
            require(max(passes[1:]) > 1, "no draft was ever accepted: `room` allows single tokens only")


# --------------------------------------------------------------------------------------------- laws of storing


def often(make: Make, **options: Any) -> Any:
    """Make a store policy that stores new tokens every 12 at most, so that a short text sees it."""
    return make(**options, interval=min(make().interval, 12))


def _often(law: LawFunction) -> LawFunction:
    """Hold a store policy that stores often to a law."""

    @functools.wraps(law)
    def held(make: Make) -> None:
        law(functools.partial(often, make))

    return held


def whole_numbers_change_nothing(make: Make) -> None:
    """With 16 bits, which leave numbers as they are, the text is that of a full cache."""
    for family in ("llama", "gemma3", "gpt2"):
        lm = tiny_lm(family=family)
        found = run(lm, often(make, high=16, low=16), RAGGED)
        same_tokens(found, run(lm, None, RAGGED), f"{family}, 16 bits")


def every_token_stays(make: Make) -> None:
    """Whatever is stored, a layer holds all tokens, and few of them lie open."""
    lm, policy = tiny_lm(), often(make)

    def after(target: Target, taken: list[int]) -> None:
        for index, layer in enumerate(layers_of(target)):
            for row, (held, stored) in enumerate(zip(layer.held, layer.stored, strict=True)):
                where = f"layer {index}, sequence {row}"
                require(held == layer.committed[row], f"{where}: holds {held} of {layer.committed[row]} tokens")
                opened = held - stored
                require(0 <= opened < policy.interval, f"{where}: {opened} tokens lie open after a pass")
                for kind, part in zip(("keys", "values"), layer.store.read(row), strict=True):
                    require(part.shape[1] == stored, f"{where}: {kind} of {part.shape[1]} tokens, {stored} are stored")

    run(lm, policy, RAGGED, after=after)


def stored_bytes_really_fall(make: Make) -> None:
    """Bytes held, all of them counted, are those of the bits, scales and sets included; fewer bits take fewer."""
    lm, prompt = tiny_lm(hidden=128, heads=2, kv_heads=1), prompts_of(300)
    full = target_of(lm, None)
    run(lm, None, prompt, new=2, target=full)
    least = float("inf")
    for bits in (8, 4, 2):
        target = target_of(lm, make(high=bits, low=bits))
        run(lm, None, prompt, new=2, target=target)
        found = [layer.store.bits_per_value for layer in layers_of(target)]
        require(all(bits < each < bits + 3 for each in found), f"{found} bits a value are said of {bits} bit codes")
        said = max(found) * 2 * 64 * 300 * len(found) / 8  # tokens of 64 channels
        slots = sum(layer.storage.nbytes for layer in layers_of(target))
        require(target.nbytes <= said + slots, f"{target.nbytes} bytes are held, {said:.0f} are said to be stored")
        require(slots <= 0.15 * full.nbytes, f"{slots} of {full.nbytes} bytes are still held open")
        require(target.nbytes < 0.7 * least, f"{target.nbytes} bytes with {bits} bits, {least} with twice as many")
        least = target.nbytes


def more_bits_are_nearer(make: Make) -> None:
    """What is restored right after the prompt is near the numbers themselves, the nearer the more bits."""
    lm, prompt = tiny_lm(), RAGGED[2]
    whole = target_of(lm, None)
    with attached(lm.model):
        whole.prefill([prompt])
    errors = []
    for bits in (2, 4, 8):
        target = target_of(lm, make(high=bits, low=bits))
        with attached(lm.model):
            target.prefill([prompt])
        pairs = zip(layers_of(target), layers_of(whole), strict=True)
        off = [(one.whole() - other.whole()).norm() / other.whole().norm() for one, other in pairs]
        errors.append(float(max(off)))
    two, four, eight = errors
    require(two > 2 * four > 8 * eight, f"relative errors {errors} of 2, 4 and 8 bits")
    require(eight < 0.02, f"a relative error of {eight:.3f} at 8 bits")


def nothing_is_rounded_twice(make: Make) -> None:
    """What was stored stays, number for number, while more comes and other sequences leave."""
    lm = tiny_lm()
    target = target_of(lm, often(make))
    before: dict[tuple[int, int], list[torch.Tensor]] = {}

    def after(target: Target, taken: list[int]) -> None:
        for index, layer in enumerate(layers_of(target)):
            for row in range(len(RAGGED)):
                now = layer.store.read(row)
                for old, new in zip(before.get((index, row), now), now, strict=True):
                    same = torch.equal(old, new[:, : old.shape[1]])
                    require(same, f"layer {index}, sequence {row}: stored numbers changed")
                before[index, row] = list(now)

    run(lm, None, RAGGED, after=after, target=target)
    read = [layer.store.read(2)[0] for layer in layers_of(target)]
    target.select_rows([2])
    for layer, old in zip(layers_of(target), read, strict=True):
        require(torch.equal(layer.store.read(0)[0], old), "stored numbers changed when other sequences left")


def attention_is_that_over_restored_numbers(make: Make) -> None:
    """A pass over packed numbers gives the logits of one over the same numbers restored."""
    lm = tiny_lm()
    target = target_of(lm, often(make))
    run(lm, None, RAGGED, new=20, target=target)
    tree = TokenTree.stack([([5, 9, 8, 2], [-1, 0, 0, 1]), ([7, 7], [-1, 0]), ([3, 1, 2], [-1, 0, 1]), ([4], [-1])])
    at = torch.from_numpy(tree.depth) + torch.tensor(target.lengths)[:, None]
    asked = torch.from_numpy(tree.ids), at, torch.from_numpy(tree.ancestors)
    seen = torch.ones(len(RAGGED), tree.width, max(target.lengths), dtype=torch.bool)
    with attached(lm.model):
        packed = target.forward(*asked)
        target.commit([[]] * len(RAGGED))
        restored = target.forward(*asked, visible=seen)
    for row, width in enumerate((4, 2, 3, 1)):
        off = float((packed[row, :width] - restored[row, :width]).abs().max())
        require(off < 1e-3, f"sequence {row}: logits differ by {off}")


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "keep": (
        *map(
            _small,
            (
                keeping_all_changes_nothing,
                the_budget_is_kept,
                memory_really_falls,
                what_was_dropped_stays_dropped,
                keys_stay_those_of_their_tokens,
                every_choice_is_a_token_map,
                the_same_options_give_the_same_text,
                a_reset_forgets,
                a_batch_is_its_sequences,
                sequences_may_leave,
                sequences_may_join,
                left_padding_changes_nothing,
                drafts_change_nothing,
            ),
        ),
        options_are_checked_and_fixed,
        the_recipe_survives_json,
    ),
    "read": READ_LAWS,
    "store": (
        whole_numbers_change_nothing,
        every_token_stays,
        stored_bytes_really_fall,
        more_bits_are_nearer,
        nothing_is_rounded_twice,
        attention_is_that_over_restored_numbers,
        *map(
            _often,
            (
                the_same_options_give_the_same_text,
                a_reset_forgets,
                a_batch_is_its_sequences,
                sequences_may_leave,
                sequences_may_join,
                left_padding_changes_nothing,
                drafts_change_nothing,
            ),
        ),
        options_are_checked_and_fixed,
        the_recipe_survives_json,
    ),
}
