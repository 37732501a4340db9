"""Strategies through the ordinary door: answers, branches, the stream, and what is refused."""

import pytest

import tokenary
from test_strategy_laws import Samples, Single
from tokenary.core.errors import RecipeError, UnsupportedModelError
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.decode import PromptLookup
from tokenary.models.text_diffusion import build
from tokenary.run import Generation

PROMPTS = ["Once upon a time", "The cat"]


@pytest.fixture
def lm():
    return tokenary.load("stories260k", dtype="float32")


def generation(lm, **methods):
    """A generation over methods that are in no registry."""
    lm.warm[Recipe()] = methods
    return Generation(lm, PROMPTS, None, 12, Sampler(temperature=1.0, seed=1), raw=True)


def test_answers_branches_and_the_stream_agree(lm):
    running = generation(lm, strategy=Samples(count=3))
    texts = {}
    for piece in running:
        texts[piece.row, piece.branch] = texts.get((piece.row, piece.branch), "") + piece.text
    for row, output in enumerate(running.outputs):
        assert len(output.branches) == 3 and output.text == texts[row, None]
        assert output.token_ids == max(output.branches, key=lambda branch: branch.log_weight).token_ids
        for number, branch in enumerate(output.branches):
            assert branch.finish == "length" and len(branch.token_ids) == 12
            assert texts[row, number] == branch.text
        assert [b["text"] for b in output.to_json()["branches"]] == [b.text for b in output.branches]
        assert len({branch.text for branch in output.branches}) > 1


def test_a_strategy_that_only_chooses_works_with_drafts(lm):
    plain = tokenary.generate(lm, PROMPTS, max_new_tokens=12, temperature=1.0, seed=1, raw=True)
    for methods in ({"choose": Single()}, {"choose": Single(), "draft": PromptLookup(nodes=4)}):
        running = generation(lm, **methods)
        list(running)
        assert [output.token_ids for output in running.outputs] == [output.token_ids for output in plain]
        assert running.outputs[0].branches == ()


def test_what_does_not_fit_is_refused(lm):
    Samples.card = property(lambda self: Recipe.parse("prompt-lookup").steps[0].card)
    try:
        with pytest.raises(RecipeError, match="loop of its own"):
            generation(lm, strategy=Samples(), draft=PromptLookup())
    finally:
        del Samples.card
    sizes = {"hidden": 16, "layers": 1, "heads": 1, "intermediate": 16}
    lm.model = build(objective="any-subset", vocab=lm.vocab_size, **sizes)
    with pytest.raises(UnsupportedModelError, match="token-recycling works on causal models"):
        tokenary.generate(lm, PROMPTS, "token-recycling", raw=True)
