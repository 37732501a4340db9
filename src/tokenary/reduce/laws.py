"""The laws of reducing: the budget to a token, nothing lost from the books, the same model where nothing is dropped.

Half of them hold a plan: a pure function of what it is shown, within its budget, the same alone and in a batch. The
others hold a toy vision-language model with the method in it, where it belongs: cache, padding and positions follow.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenary.core.errors import OptionError
from tokenary.core.laws import (
    LawBroken,
    LawFunction,
    Make,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.token_map import TokenMap, check_token_map
from tokenary.models.bench_vlm.vocabulary import END, PAD, VOCABULARY
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.law_tools import (
    QUESTIONS,
    asked,
    floats,
    permuted,
    pictures,
    rows_of,
    toy_tokens,
    toy_vlm,
)
from tokenary.reduce.mix import anchors_of
from tokenary.reduce.vlm import ReducedVLM

BUDGETS = (1, 5, 12, 31, 47)


def takes_budgets(make: Make) -> bool:
    """Whether the method has a budget at all."""
    return "keep" in make().options


def budgets(make: Make) -> list[int]:
    """Budgets that the method takes for 48 tokens: one that is shared out over layers may refuse small ones."""
    possible = []
    for keep in BUDGETS if takes_budgets(make) else BUDGETS[:1]:
        try:
            planned(make, keep)
        except OptionError:
            continue
        possible.append(keep)
    require(possible, f"none of the budgets {BUDGETS} is taken")
    return possible


def middle(make: Make) -> int:
    """Return one of them that drops something."""
    possible = budgets(make)
    return possible[len(possible) // 2]


def planned(make: Make, keep: int, views: int = 1) -> tuple[Reducer, Tensor, Context, TokenMap]:
    """Plan for toy tokens with a budget."""
    reducer: Reducer = make(keep=keep) if takes_budgets(make) else make()
    x, context = toy_tokens(reducer, views=views)
    return reducer, x, context, reducer.reduce(x, context)


def alike(one: TokenMap, other: TokenMap) -> bool:
    """Whether two maps are the same matrix, up to the last digits."""
    left, right = one.dense(torch.float64), other.dense(torch.float64)
    left, right = torch.broadcast_tensors(left, right) if left.shape[-2:] == right.shape[-2:] else (left, right)
    return left.shape == right.shape and torch.allclose(left, right, atol=1e-5)


def filled(map: TokenMap, x: Tensor) -> Tensor:
    """Which outputs have a source, (B, M)."""
    return map.mask(torch.ones(x.shape[1], dtype=torch.bool)).expand(len(x), -1)


# ---------------------------------------------------------------------------------------------------- of plans


def every_plan_is_a_token_map(make: Make) -> None:
    """What is planned reads all image tokens, one map a picture, and keeps the laws of token maps."""
    for keep in budgets(make):
        _, x, _, chosen = planned(make, keep)
        require(chosen.shape[-1] == x.shape[1], f"a map of {chosen.shape[-1]} tokens where there are {x.shape[1]}")
        require(chosen.batch_shape in ((), (len(x),)), f"batch {tuple(chosen.batch_shape)} for {len(x)} pictures")
        for broken in check_token_map(chosen):
            raise LawBroken(broken)
        y = chosen.apply(x)
        require(y.dtype == x.dtype and bool(torch.isfinite(y).all()), f"keep={keep}: outputs are not finite {x.dtype}")


def the_budget_is_kept(make: Make) -> None:
    """Of every picture exactly the budget stays, where the method says so; never more, however many views there are."""
    for keep in budgets(make):
        reducer, x, context, chosen = planned(make, keep)
        most, left = reducer.count(x.shape[1], context), filled(chosen, x).sum(1)
        require(bool((left <= most).all()), f"keep={keep}: {left.tolist()} tokens stay, {most} may")
        if reducer.exact:
            require(bool((left == most).all()), f"keep={keep}: {left.tolist()} tokens stay instead of {most}")
    for keep in [5 * each for each in budgets(make)]:
        reducer, x, context, chosen = planned(make, keep, views=5)
        most, left = reducer.count(x.shape[1], context), filled(chosen, x).sum(1)
        require(bool((left <= most).all()), f"5 views, keep={keep}: {left.tolist()} tokens stay, {most} may")


def outputs_stand_in_order(make: Make) -> None:
    """Outputs come in the order of the tokens whose place they take, no two at one place, empty ones at the end."""
    for keep in budgets(make):
        _, x, _, chosen = planned(make, keep)
        at, there = anchors_of(chosen).expand(len(x), -1), filled(chosen, x)
        require(bool((there[:, 1:] <= there[:, :-1]).all()), f"keep={keep}: an output after one without a source")
        rising = (at[:, 1:] > at[:, :-1]) | ~there[:, 1:]
        require(bool(rising.all()), f"keep={keep}: outputs stand at {at.tolist()}")


def keeping_all_is_the_identity(make: Make) -> None:
    """With the whole budget the plan changes nothing."""
    if not takes_budgets(make):
        return
    for views in (1, 5):
        reducer: Reducer = make(keep="100%")
        x, context = toy_tokens(reducer, views=views)
        chosen = reducer.reduce(x, context)
        require(torch.equal(chosen.apply(x), x), f"{views} views: {chosen!r} with keep=100%")


def a_plan_is_pure(make: Make) -> None:
    """The same tokens give the same map, from one object twice and from a new one; nothing that is shown changes."""
    reducer, x, context, chosen = planned(make, middle(make))
    before = [each.clone() for each in (x, *floats(context))]
    other, _ = toy_tokens(reducer, seed=5)
    reducer.reduce(other, toy_tokens(reducer, seed=5)[1])
    require(alike(reducer.reduce(x, context), chosen), "the second plan of one object differs from its first")
    require(alike(planned(make, middle(make))[3], chosen), "a new object plans otherwise")
    same = all(torch.equal(one, two) for one, two in zip(before, (x, *floats(context)), strict=True))
    require(same, "the plan changes what it is shown")


def a_batch_is_its_pictures(make: Make) -> None:
    """A picture gets in a batch the map that it gets alone."""
    for views in (1, 5):
        reducer, x, context, chosen = planned(make, middle(make) * views, views)
        for row in range(len(x)):
            alone = reducer.reduce(x[row : row + 1], rows_of(context, [row]))
            left, right = (chosen[row] if chosen.batch_shape else chosen), alone[0] if alone.batch_shape else alone
            n = min(left.shape[-2], right.shape[-2])
            one, two = left.dense(torch.float64), right.dense(torch.float64)
            same = torch.allclose(one[:n], two[:n], atol=1e-5) and not bool(one[n:].any() or two[n:].any())
            require(same, f"{views} views: picture {row} alone is reduced otherwise")


def order_carries_no_meaning(make: Make) -> None:
    """A method that treats tokens as a set keeps the same ones in any order."""
    reducer, x, context, chosen = planned(make, middle(make))
    if not reducer.permutes:
        return
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    found = reducer.reduce(x[:, order], permuted(context, order)).dense(torch.float64)
    expected = chosen.dense(torch.float64)[..., order]

    mark = torch.rand(x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))  # tells rows apart

    def sorted_rows(matrix: Tensor) -> Tensor:
        key = matrix @ mark
        return matrix.gather(1, key.argsort(1)[..., None].expand_as(matrix))

    require(torch.allclose(sorted_rows(found), sorted_rows(expected), atol=1e-5), "another order, other tokens")


def the_books_balance(make: Make) -> None:
    """Pruning keeps tokens as they are; groups and merges stand for every token, and merges keep the sum of all."""
    for keep in budgets(make):
        reducer, x, context, chosen = planned(make, keep)
        if reducer.kind == "prune":
            matrix, there = chosen.dense(), filled(chosen, x)
            require(chosen.single_source, f"{chosen!r} draws an output from many tokens")
            require(bool((matrix.sum(-1) == there.float()).all() and ((matrix == 0) | (matrix == 1)).all()), "scaled")
            continue
        for sizes in (None, torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2)) * 4 + 1):
            chosen = reducer.plan(x, keep, replace(context, sizes=sizes))
            prior = torch.ones(x.shape[:2]) if sizes is None else sizes
            after = chosen.sizes(prior).expand(len(x), -1)
            off = float((after.sum(1) - prior.sum(1)).abs().max())
            require(off < 1e-2, f"keep={keep}: sizes add up to {after.sum(1).tolist()}, not {prior.sum(1).tolist()}")
            if reducer.kind == "merge":
                before, mixed = (prior[..., None] * x).sum(1), (after[..., None] * chosen.apply(x)).sum(1)
                require(torch.allclose(before, mixed, atol=1e-2), f"keep={keep}: the weighed sum of tokens changes")


def the_way_back_fits(make: Make) -> None:
    """Un-reducing gives each token that was kept, or that an output stands for, a mean of outputs."""
    for keep in budgets(make):
        reducer, x, _, chosen = planned(make, keep)
        back = chosen.pinv()
        require(back.shape[-2:] == chosen.shape[-2:][::-1], f"{back!r} is no way back of {chosen!r}")
        weight = back.apply(filled(chosen, x).float(), dim=-1)
        covered = torch.ones_like(weight).bool() if reducer.kind != "prune" else chosen.T.dense().sum(-1) > 0
        require(
            torch.allclose(weight, covered.float(), atol=1e-4), f"keep={keep}: the parts of a token sum to {weight}"
        )


def what_is_not_valid_stays_out(make: Make) -> None:
    """Padding is neither kept nor mixed into what is."""
    reducer, x, context, _ = planned(make, middle(make))
    if not reducer.exact:
        return
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[0, 30:], valid[1, :17], valid[2, ::2] = False, False, False
    context = replace(context, valid=valid)
    chosen = reducer.reduce(x, context)
    leaked = chosen.dense()[~valid[:, None].expand(-1, chosen.shape[-2], -1)].abs().sum()
    require(float(leaked) == 0, "padding is read")
    left = filled(chosen, x).sum(1)
    require(bool((left <= valid.sum(1)).all()), f"{left.tolist()} of {valid.sum(1).tolist()} tokens stay")


# ---------------------------------------------------------------------------------------------------- of models


def in_the_model_keeping_all_changes_nothing(make: Make) -> None:
    """With the whole budget the logits of the model are, bit for bit, those without the method."""
    model, pixels, (ids, _) = toy_vlm(), pictures(3), asked()
    if not takes_budgets(make):
        return
    reducer: Reducer = make(keep="100%")
    for side in (64, 128):
        seen = pictures(2, side)
        with reducer.attach(model) as reduced:
            found, expected = reduced(reduced.image_tokens(seen), ids[:2]), model(model.image_tokens(seen), ids[:2])
        if side == 64 or reducer.exact:
            require(torch.equal(found, expected), f"pictures of {side}: logits differ by {_off(found, expected)}")
    same = torch.equal(model(model.image_tokens(pixels), ids), model(model.image_tokens(pixels), ids))
    require(same, "the model itself is not deterministic")


def nothing_stays_attached(make: Make) -> None:
    """After the block the model is as it was, and a second block finds nothing of the first."""
    model, pixels, (ids, _) = toy_vlm(), pictures(3), asked()
    before = model(model.image_tokens(pixels), ids)
    reducer: Reducer = make()
    found = []
    for seed in (0, 9, 0):
        with reducer.attach(model) as reduced:
            found.append(reduced(reduced.image_tokens(pictures(3, seed=seed)), ids))
    require(torch.equal(model(model.image_tokens(pixels), ids), before), "the model has changed")
    require(torch.equal(found[0], found[2]), "a picture is reduced otherwise after another one")
    require(not torch.equal(found[0], found[1]) or reducer.count(64, Context((8, 8))) == 0, "pictures change nothing")


def in_the_model_a_batch_is_its_pictures(make: Make) -> None:
    """Pictures with questions of unequal length, padded, get the logits and the answers that they get alone."""
    model, pixels, (ids, there) = toy_vlm(), pictures(3), asked()
    with make().attach(model) as reduced:
        together = reduced(reduced.image_tokens(pixels), ids, there)
        kept = list(reduced.kept)
        answers = reduced.generate(reduced.image_tokens(pixels), ids, 8, there)
        for row in range(len(QUESTIONS)):
            text = ids[row : row + 1, there[row]]
            alone = reduced(reduced.image_tokens(pixels[row : row + 1]), text)
            off = _off(together[row, there[row]], alone[0])
            require(off < 1e-3, f"question {row}: logits differ by {off}")
            require(
                reduced.kept == kept[row : row + 1], f"question {row}: {reduced.kept} instead of {kept[row]} tokens"
            )
            one = reduced.generate(reduced.image_tokens(pixels[row : row + 1]), text, 8)
            same_tokens(one, answers[row : row + 1], f"question {row}")


def decoding_is_reading_on(make: Make) -> None:
    """Token by token over the cache, answer and kept tokens are those of reading prompt and answer in one pass."""
    model, pixels, (ids, there) = toy_vlm(), pictures(3), asked()
    with make().attach(model) as reduced:
        seen = reduced.image_tokens(pixels)
        answers, kept = reduced.generate(seen, ids, 6, there), patches_kept(reduced)
        for row, answer in enumerate(answers):
            text = torch.cat([ids[row, there[row]], torch.tensor(answer, dtype=torch.long)])[None]
            logits = reduced(reduced.image_tokens(pixels[row : row + 1]), text)
            same_tokens(patches_kept(reduced), kept[row : row + 1], f"question {row}, patches that are kept")
            best = logits[0, int(there[row].sum()) - 1 :].argmax(-1).tolist()
            expected = [*answer, *([END] if len(answer) < 6 else [])]
            same_tokens([best[: len(expected)]], [expected], f"question {row}")


def patches_kept(reduced: ReducedVLM) -> list[list[int]]:
    """Return the patches of the newest pass, in the order in which they are read, of every picture."""
    return [] if reduced.numbers is None else [[n for n in row if n >= 0] for row in reduced.numbers.tolist()]


def only_the_question_guides(make: Make) -> None:
    """Whatever text follows a question, an answer or padding, the same image tokens are kept."""
    model, pixels, (ids, there) = toy_vlm(), pictures(3), asked()
    with make().attach(model) as reduced:
        for row in range(len(QUESTIONS)):
            text, picture = ids[row : row + 1, there[row]], pixels[row : row + 1]
            reduced(reduced.image_tokens(picture), text)
            kept = patches_kept(reduced)
            for follows in ([*VOCABULARY.encode("red star"), END], [PAD] * 5):
                reduced(reduced.image_tokens(picture), torch.cat([text, torch.tensor([follows])], dim=1))
                same_tokens(patches_kept(reduced), kept, f"question {row} with {follows}, patches that are kept")


def kept_tokens_are_counted(make: Make) -> None:
    """The model says how many image tokens it read and which patches they stand at, and reads no others."""
    model, pixels, (ids, _) = toy_vlm(), pictures(3), asked()
    reducer: Reducer = make()
    with reducer.attach(model) as reduced:
        reduced(reduced.image_tokens(pixels), ids)
        most = reducer.count(64, Context((8, 8), n_layers=4, layer=max(reduced.point.layers[:1] or (3,)) - 1))
        require(all(count <= most for count in reduced.kept), f"{reduced.kept} tokens are read, {most} may be")
        if reducer.exact:
            require(reduced.kept == [most] * 3, f"{reduced.kept} tokens are read instead of {most}")
        if reduced.numbers is not None:
            held = [(row >= 0).sum().item() for row in reduced.numbers]
            require(held == reduced.kept, f"{held} patches are named, {reduced.kept} tokens are read")


def _off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "reduce": (
        every_plan_is_a_token_map,
        the_budget_is_kept,
        outputs_stand_in_order,
        keeping_all_is_the_identity,
        a_plan_is_pure,
        a_batch_is_its_pictures,
        order_carries_no_meaning,
        the_books_balance,
        the_way_back_fits,
        what_is_not_valid_stays_out,
        in_the_model_keeping_all_changes_nothing,
        nothing_stays_attached,
        in_the_model_a_batch_is_its_pictures,
        decoding_is_reading_on,
        only_the_question_guides,
        kept_tokens_are_counted,
        options_are_checked_and_fixed,
        the_recipe_survives_json,
    ),
}
