"""Sequences that join a running target go on as they would alone, and so do those that were there."""

import pytest
import torch

from tokenary.core.decoding import Decoding
from tokenary.core.sampling import Sampler
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Loop
from tokenary.hf.target import Target, attached
from tokenary.memory.recent import RecentTokens
from tokenary.models.tiny import tiny_lm

PROMPTS = {"short": [(7 * i + 3) % 97 for i in range(9)], "long": [(5 * i * i + i) % 97 for i in range(60)]}


def target_of(lm, keep):
    policy = None if keep is None else RecentTokens(keep=keep, interval=4)
    return Target(lm.model, None if policy is None else policy.attach(lm.model.config, lm.dtype))


def go_on(target, texts, passes):
    """Greedily, a token a pass."""
    for _ in range(passes):
        logits = target.score(TokenTree.roots([text[-1] for text in texts]))[:, 0]
        target.commit([[0]] * len(texts))
        for text, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
            text.append(token)


def begun(lm, keep, name):
    target, text = target_of(lm, keep), list(PROMPTS[name])
    text.append(int(target.prefill([text]).argmax()))
    return target, text


@pytest.fixture
def nothing_is_there():
    """Memory that nobody wrote holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("order", [("short", "long"), ("long", "short")])
@pytest.mark.parametrize("keep", [None, 20, 4])  # 20: the short prompt loses nothing, until it has grown
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_two_targets_become_one(family, keep, order, nothing_is_there):
    lm = tiny_lm(family=family)
    with attached(lm.model):
        alone = {}
        for name in order:
            target, alone[name] = begun(lm, keep, name)
            go_on(target, [alone[name]], 30)
        target, first = begun(lm, keep, order[0])
        go_on(target, [first], 3)
        newcomer, second = begun(lm, keep, order[1])
        both = target, newcomer
        if keep == 20:
            torn = {name: each.cache.layers[-1].positions is not None for name, each in zip(order, both, strict=True)}
            assert torn == {"short": False, "long": True}
        held = [layer.held + other.held for layer, other in zip(*(each.cache.layers for each in both), strict=True)]
        target.join(newcomer)
        assert [layer.held for layer in target.cache.layers] == held
        assert target.lengths == [len(first) - 1, len(second) - 1]
        go_on(target, [first, second], 25)
        target.select_rows([1])
        go_on(target, [second], 4)
    assert first == alone[order[0]][: len(first)] and second == alone[order[1]][: len(second)]


def test_a_target_of_nobody_can_be_joined():
    lm = tiny_lm()
    with attached(lm.model):
        reference, expected = begun(lm, None, "long")
        go_on(reference, [expected], 5)
        for target in (Target(lm.model), begun(lm, None, "short")[0]):
            target.select_rows([])
            newcomer, text = begun(lm, None, "long")
            target.join(newcomer)
            go_on(target, [text], 5)
            assert text == expected and target.lengths == [64 + 1]


def test_a_prompt_is_read_in_pieces_and_others_run_between_them():
    lm = tiny_lm()
    with attached(lm.model):
        other, text = begun(lm, None, "short")
        _, expected = begun(lm, None, "short")
        reading, read = Target(lm.model).reading([PROMPTS["long"]], 16), 0
        with pytest.raises(StopIteration) as end:
            while True:
                assert next(reading) == []
                read += 1
                go_on(other, [text], 1)
        assert read == 3
        torch.testing.assert_close(end.value.value, Target(lm.model).prefill([PROMPTS["long"]]), atol=1e-4, rtol=1e-4)
        reference, expected = begun(lm, None, "short")
        go_on(reference, [expected], 3)
        assert text == expected


def test_a_loop_takes_newcomers_after_all_have_left():
    lm = tiny_lm()
    loop, found = Loop(Target(lm.model), [], Sampler(), 0), []
    with attached(lm.model):
        for index, (name, limit) in enumerate((("short", 4), ("long", 1), ("long", 6))):
            loop.limits[index] = limit
            sequence, target = Decoding(index, list(PROMPTS[name]), len(PROMPTS[name])), Target(lm.model)
            assert len(loop.join(target, target.prefill([sequence.ids]), [sequence])) == 1
            while loop.step():
                pass
            assert not loop.batch and sequence.finish == "length"
            found.append(sequence.new_ids)
        whole = Loop(Target(lm.model), list(PROMPTS.values()), Sampler(), 6)
        list(whole)
    short, long = (sequence.new_ids for sequence in whole.sequences)
    assert found == [short[:4], long[:1], long]
