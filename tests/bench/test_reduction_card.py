"""The report card: what it watches is what the model does, and planted defects each move a figure."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tokenary.bench.record import plain_json
from tokenary.bench.reduction_card import ReductionCard, language, reduction_card, text
from tokenary.bench.reduction_card.arms import Arms, Entry, entries
from tokenary.bench.reduction_card.asking import YES, answers_of, flipped
from tokenary.bench.reduction_card.figures import parts_of
from tokenary.bench.reduction_card.invariants import invariants
from tokenary.bench.reduction_card.overthinking import finding, gate, thinking_figures
from tokenary.bench.reduction_card.patches import patches_of
from tokenary.bench.reduction_card.questions import Asked
from tokenary.bench.reduction_card.rows import Card
from tokenary.bench.reduction_card.stability import ladder
from tokenary.bench.reduction_card.text import able, text_figures, ways_of
from tokenary.bench.reduction_card.watching import Watched
from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError, RecipeError
from tokenary.models.bench_vlm import BenchVLM, save
from tokenary.probe.laws import toy
from tokenary.probe.token_reduction_position.effects import effect
from tokenary.probe.token_reduction_position.overthinking import Thoughts
from tokenary.reduce.base import Reducer
from tokenary.reduce.encoder import picture_numbers
from tokenary.reduce.entropy_prune import EntropyPrune
from tokenary.reduce.mix import Mix
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_low_res import ReduceLowRes
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom
from tokenary.reduce.token_transforming import TokenTransforming

QUARTER = Budget(ratio=0.25)


@pytest.fixture(scope="module")
def asked(tiny) -> Asked:
    return Asked.drawn(tiny.config.geometry, 6, 16, 24)


# -- watching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "at"),
    [(None, "encoder"), (ReducePool(QUARTER), "encoder"), (ReduceRandom(QUARTER), "decoder:1")],
    ids=str,
)
def test_attention_is_that_of_the_model(tiny, asked, reducer, at):
    batch = asked.families.batch
    ids, last = batch.ids[:5], batch.predicted[:5].int().argmax(1) - 1
    found = []
    tiny.language.set_attn_implementation("eager")
    try:
        with Watched(tiny, reducer, at) as watched, watched.watching(last, ids.shape[1]) as notes:
            hooks = [
                layer.self_attn.register_forward_hook(lambda m, a, out: found.append(out[1]))
                for layer in tiny.language.model.layers
            ]
            watched(watched.image_tokens(batch.pixels[:5]), ids)
            for hook in hooks:
                hook.remove()
    finally:
        tiny.language.set_attn_implementation("sdpa")
    for own, maps in zip(notes.attention, found, strict=True):
        rows = maps.shape[2] - ids.shape[1] + last
        assert torch.allclose(own, maps.mean(1)[torch.arange(5), rows], atol=1e-5)


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("reducer", [None, ReducePool(QUARTER), ReduceGrid(QUARTER)], ids=str)
def test_columns_are_the_means_of_the_patches_they_stand_for(tiny, reducer, anyres):
    asked = Asked.drawn(tiny.config.geometry, 1, 1, 1, anyres=anyres)
    with Watched(tiny, reducer, "encoder") as watched, torch.inference_mode():
        watched(watched.image_tokens(asked.families.batch.pixels), asked.families.batch.ids)
        patches = watched.shown.tokens
        mass = watched.layer_mass()[0]
    size = mass.sum(2)
    newlines = (size == 0).sum(1)
    assert newlines.tolist() == [8 if anyres else 0] * len(mass)
    means = mass @ patches / size.clamp_min(1)[..., None]
    own = watched.laid.embeds[:, 1 : 1 + watched.laid.image]
    assert torch.allclose(torch.where(size[..., None] > 0, means, own), own, atol=1e-5)


def test_mass_inside_the_encoder_and_between_layers(tiny, asked):
    batch = asked.families.batch
    with torch.inference_mode():
        with Watched(tiny, TokenTransforming(QUARTER), "vision:0") as merged:
            merged(merged.image_tokens(batch.pixels), batch.ids)
            mass = merged.read_mass()
            assert torch.allclose(mass.sum(1), torch.ones(len(mass), 16), atol=1e-4)  # nothing is lost
            assert torch.allclose(mass.sum(2), merged.claimed_sizes(), atol=1e-4)
        with Watched(tiny, ReduceRandom(QUARTER), "decoder:1") as deep:
            deep(deep.image_tokens(batch.pixels), batch.ids)
            below, above = deep.layer_mass()
    assert below.shape[1:] == (16, 16) and above.shape[1:] == (4, 16)
    assert torch.equal(above.argmax(2), deep.numbers) and deep.claimed_sizes().tolist() == [[1] * 4] * len(above)


def test_patches_of_crops():
    asked = torch.zeros(1, 8, 8, dtype=torch.bool)
    asked[0, 1, 6] = True
    found = patches_of(asked, (4, 4), 5).unflatten(1, (5, 4, 4))
    assert found.nonzero().tolist() == [[0, 0, 0, 3], [0, 2, 1, 2]]
    assert patches_of(asked, (4, 4), 1).nonzero().tolist() == [[0, 3]]
    assert patches_of(asked, (8, 8), 1).nonzero().tolist() == [[0, 14]]


# -- planted defects --------------------------------------------------------------------------------------------------


def moved(tiny, asked, sound, planted, sound_model=None):
    """Names of the figures that differ beyond their interval, with their effects."""
    blind = answers_of(tiny, None, asked, "encoder", blind=True)
    arms = [
        parts_of([answers_of(model, reducer, asked, "encoder")], asked, blind)
        for model, reducer in ((sound_model or tiny, sound), (tiny, planted))
    ]
    found = {name: effect(each, arms[0][name], resamples=400) for name, each in arms[1].items()}
    return {name: each for name, each in found.items() if each.moved}


class Shifted(ReduceGrid):
    """Says that each token stands one patch from where it was taken."""

    def plan(self, x, keep, context):
        chosen = super().plan(x, keep, context).positions(torch.arange(x.shape[1]))
        mass = torch.nn.functional.one_hot(chosen, x.shape[1]).float()
        return Mix(mass, mass=mass, anchors=(chosen + 1) % x.shape[1])


class Sizeless(ReducePool):
    """Forgets how many patches its means stand for."""

    def plan(self, x, keep, context):
        right = super().plan(x, keep, context)
        anchors = right.positions(torch.arange(x.shape[1]), "first").expand(len(x), -1)
        mass = torch.nn.functional.one_hot(anchors, x.shape[1]).float()
        return Mix(right.dense().expand(len(x), -1, -1), mass=mass, anchors=anchors)


class DropsAsked(Reducer):
    """Keeps whatever was not asked for."""

    needs = frozenset({"pixels"})

    def __init__(self, keep: Budget = QUARTER) -> None:
        super().__init__(keep)
        self.masks: dict[int, torch.Tensor] = {}

    def plan(self, x, keep, context):
        from tokenary.reduce.choose import top

        noise = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0))
        none = torch.zeros(x.shape[1])
        return top(noise - 2 * torch.stack([self.masks.get(s, none) for s in context.samples]), keep)


def test_a_sound_reducer_moves_nothing(tiny, asked):
    assert not moved(tiny, asked, ReduceGrid(QUARTER), ReduceGrid(QUARTER))


def test_shifted_positions_are_seen(tiny, asked):
    assert moved(tiny, asked, ReduceGrid(QUARTER), Shifted(QUARTER))["locality"].low > 0


def test_dropped_sizes_are_seen(tiny, asked):
    found = moved(tiny, asked, ReducePool(QUARTER), Sizeless(QUARTER))
    assert found["conserved"].high < 0 and found["coverage"].high < 0 and found["evidence"].high < 0


def test_a_model_that_always_says_yes_is_seen(tiny, asked):
    class Yes(torch.nn.Module):
        def forward(self, hidden):
            logits = tiny.language.lm_head(hidden)
            logits[..., YES] += 1000
            return logits

    other = BenchVLM(tiny.config).eval().requires_grad_(False)
    other.load_state_dict(tiny.state_dict())
    other.language.lm_head = Yes()
    found = moved(other, asked, None, None, sound_model=tiny)
    assert found["adversarial: yes_rate"].low > 0 and found["adversarial: false_yes"].low > 0
    assert found["wrong_image_agreement"].low > 0


def test_a_reducer_that_drops_what_is_asked_is_seen(tiny, asked):
    planted = DropsAsked()
    for part in (asked.families, asked.existence):
        own = [
            torch.from_numpy(s.patches(t.targets)).flatten().float()
            for s, t in zip(part.scenes, part.turns, strict=True)
        ]
        planted.masks |= dict(zip(picture_numbers(part.batch.pixels), own, strict=True))
    found = moved(tiny, asked, ReduceRandom(QUARTER), planted)
    assert found["evidence"].high < 0 and found["grounding_mass"].high < 0


def test_a_map_that_changes_everything_kept_breaks_an_invariant(tiny, asked):
    found = invariants(tiny, ReduceGrid(QUARTER), "encoder", asked.families)
    assert found["full_budget"] < 1e-4 and found["batch"] < 1e-4 and found["cache"] == 0 and found["positions"] == 0
    assert flipped(ReduceGrid(QUARTER)).positions == "original"


# -- arms, card, command ----------------------------------------------------------------------------------------------


def test_controls_stand_at_the_place_and_budget(tiny, asked):
    arms = Arms(tiny, asked, 2, 0)
    deep = Entry("entropy", EntropyPrune(Budget(ratio=0.75)), "decoder:1")
    own, controls = arms.of(deep)[0], {name: (at, runs) for name, at, runs in arms.controls(deep)}
    assert own.kept == 8 and own.layer_tokens == 12  # one of two layers sees 16 tokens
    assert controls["random"][0] == "decoder:1" and [run.kept for run in controls["random"][1]] == [8, 8]
    assert controls["low-res"][1][0].layer_tokens <= 12
    assert arms.blind.kept == 0 and arms.full.kept == 16
    assert np.array_equal(arms.full.right, answers_of(tiny, None, asked, "encoder").right)
    with pytest.raises(RecipeError):
        entries(["keyformer"], [], None)
    with pytest.raises(OptionError):
        entries(["reduce-pool"], [120.0], None)
    assert [each.name for each in entries(["hiprune:keep=10%"], [50, 25], None)] == [
        "hiprune:keep=50%", "hiprune:keep=25%"
    ]  # fmt: skip


def test_a_smaller_picture_keeps_its_mass(tiny, asked):
    run = answers_of(tiny, ReduceLowRes(QUARTER), asked, "encoder")
    assert np.allclose(run.maps["conserved"], 1) and run.kept == 4 and run.maps["locality"].min() > 0


def test_the_command_writes_a_card(tiny, tmp_path):
    from tokenary.cli.vlm import app

    save(tiny, tmp_path / "model")
    arguments = ["card", "--with", "reduce-pool:keep=25%", "--model", str(tmp_path / "model"), "--questions", "4"]
    found = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "card"), "--json"])
    assert found.exit_code == 0, found.output
    card = ReductionCard.read(tmp_path / "card" / "results.json")
    assert [arm["role"] for arm in card.arms] == ["none", "blind", "reducer", "control", "control", "control"]
    own = card.arms[2]
    assert own["over_random"]["grounding_mass"].keys() == {"value", "low", "high"}
    assert own["figures"]["conserved"]["value"] == 1 and "left out" not in json.dumps(own)
    assert card.record["text"]["left_out"] and card.record["stability"] is None and len(card.warnings) >= 3
    page = (tmp_path / "card" / "report.html").read_text()
    assert "reduce-pool:keep=25%" in page and "What must hold" in page and "over pooling, same time" in page
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "again"), "--json"])
    assert again.exit_code == 0
    arms = ReductionCard.read(tmp_path / "again" / "results.json").arms
    assert own["same_time"].keys() == {"reduce-random", "reduce-pool"} and own["seconds"]["none"]["prefill"] > 0
    for arm in (*arms, *card.arms):
        arm.pop("seconds", None)
        arm.pop("same_time", None)
    assert arms == card.arms


def test_an_interrupted_card_holds_what_was_measured(tiny, monkeypatch):
    kept, few = Card.rows, {"per_family": 2, "per_kind": 2, "listed": 8, "random_seeds": 1, "resamples": 20}

    def broken_off(after):
        def rows(self, chosen, say):
            for number, row in enumerate(kept(self, chosen, say)):
                if number == after:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(Card, "rows", rows)
        return reduction_card(["reduce-pool:keep=25%", "hiprune:keep=25%"], tiny, **few)

    found = broken_off(3)
    assert [arm["role"] for arm in found.arms] == ["none", "blind", "reducer"] and not found.complete
    assert any("interrupted" in line for line in found.warnings) and "reduce-pool" in found.page()
    with pytest.raises(KeyboardInterrupt):
        broken_off(2)


# -- stability, text --------------------------------------------------------------------------------------------------


def test_a_ladder_finds_where_training_breaks():
    chosen = entries(["reduce-pool:keep=25%"], [], None)
    found = ladder(chosen, rates=(1e-2, 1e4), seeds=2, steps=12, batch=4)
    assert [arm["name"] for arm in found["arms"]] == ["none", "reduce-pool:keep=25%", "random"] and not found[
        "left_out"
    ]
    for arm in found["arms"]:
        assert arm["largest_stable_rate"] == 1e-2
        calm, wild = (arm["by_rate"][rate] for rate in ("0.01", "10000"))
        assert calm["diverged"] == 0 and wild["diverged"] > 0 and calm["effective_rank"] > 1
    assert ladder(chosen, rates=(1e-2,), seeds=2, steps=12, batch=4)["arms"][0] == {
        **found["arms"][0], "by_rate": {"0.01": found["arms"][0]["by_rate"]["0.01"]}
    }  # fmt: skip


def test_text_is_for_reducers_between_layers():
    deep, shallow = (Entry("", EntropyPrune(Budget(ratio=0.75)), at) for at in ("decoder:1", "encoder"))
    assert able(deep) and not able(shallow) and not able(Entry("", DropsAsked(), "decoder:1"))
    some = {"resamples": 50, "seed": 0}
    found = text_figures(toy(), [deep], some, lengths=(120,), facts=1, passages=1)
    assert [arm["name"] for arm in found["arms"]] == ["none", "", "random", "grid", "blind"]
    nll = {arm["name"]: arm["figures"]["tail_nll"]["value"] for arm in found["arms"]}
    assert all(map(math.isfinite, nll.values())) and nll["none"] != nll["grid"]


def test_controls_on_text_keep_as_many_tokens_and_draw_anew_for_every_item():
    lm, deep = toy(), Entry("own", EntropyPrune(Budget(ratio=0.75)), "decoder:1")
    ways, kept = ways_of(deep), {}
    with torch.inference_mode():
        for name, (way, *_) in ways.items():
            for number in (0, 1):
                with way.around(lm.model, number, 41) as between:
                    lm.model(input_ids=torch.arange(50)[None])
                    kept[name, number] = between.map.positions(torch.arange(40)).flatten().tolist()
    assert {len(each) for each in kept.values()} == {20}  # the first of two layers reads all 40
    assert kept["random", 0] != kept["random", 1] and kept["grid", 0] == kept["grid", 1] and len(ways["random"]) == 2


SOME = {"resamples": 50, "seed": 0}


def test_thinking_is_measured_of_every_arm():
    deep = Entry("deep", ReducePool(QUARTER), "decoder:1")
    found = thinking_figures(toy(), [deep], SOME, length=300, questions=3, limit=6)
    assert [arm["name"] for arm in found["arms"]] == ["none", "deep", "random", "grid", "blind"]
    none, deep, random, *_ = found["arms"]
    assert none["figures"].keys() == deep["over_random"].keys() and random["over_random"] is None
    assert 0 < none["figures"]["tokens"]["value"] <= 6 and found["gate"].keys() >= {"full", "blind", "counts"}
    assert plain_json(found) == json.loads(json.dumps(plain_json(found)))


def thinkers(lost):
    """Arms of 40 questions: the context helps, and of a reducer some answers that were right on the way are lost."""
    right = np.ones((1, 40, 5), dtype=bool)
    right[:, 30:] = False
    late = right.copy()
    late[:, :lost, -1] = False
    blind = np.zeros_like(right)
    blind[:, 36:] = True
    tokens = np.full((1, 40), 20.0)
    return {name: Thoughts(tokens, each).parts() for name, each in (("full", right), ("own", late), ("blind", blind))}


def test_answers_that_are_lost_on_the_way_move_the_card(monkeypatch):
    rows = {}
    for lost in (0, 12):
        arms = thinkers(lost)
        monkeypatch.setattr(text, "ways_of", lambda entry: {"own": "own", "random": "full"})
        rows[lost] = text.rows_of(
            [Entry("own", EntropyPrune(), "decoder:1")], arms.get, arms["full"], arms["blind"], SOME
        )
    (_, same, *_), (_, lower, *_) = rows.values()
    assert same["over_random"]["right_early_wrong_late"]["value"] == 0
    over = lower["over_random"]
    assert over["right_early_wrong_late"]["low"] > 0 > over["answer_right"]["high"]
    assert over["right_per_100_tokens"]["value"] == pytest.approx(100 * (18 - 30) / (40 * 20), abs=1e-4)
    good, bad = gate(arms["full"], arms["blind"], SOME), gate(arms["blind"], arms["blind"], SOME)
    assert good["counts"] and not bad["counts"] and good["full"]["value"] == 0.75
    assert finding({"gate": good, "arms": rows[12]}).endswith("own 30% of the answers (+0.30, "
        f"{over['right_early_wrong_late']['low']:+.2f} to {over['right_early_wrong_late']['high']:+.2f}).")  # fmt: skip
    assert "too near" in finding({"gate": bad, "arms": rows[12]})


def test_the_card_shows_thinking_and_says_when_it_means_nothing(tiny, monkeypatch):
    monkeypatch.setattr("tokenary.run.load", lambda name: toy())
    small = {"length": 300, "questions": 2, "limit": 4}
    monkeypatch.setattr(language, "thinking_figures", lambda *given: thinking_figures(*given, **small))
    monkeypatch.setattr(
        language, "text_figures", lambda *given: text_figures(*given, lengths=(120,), facts=1, passages=1)
    )
    few = {"per_family": 2, "per_kind": 2, "listed": 8, "random_seeds": 1, "resamples": 20}
    found = reduction_card(["reduce-pool:keep=25%"], tiny, at="decoder:1", text="toy", **few)
    page, thinking = found.page(), found.record["text"]["thinking"]
    assert "Thinking" in page and "right early wrong late" in page and found.record["text"]["left_out"] is None
    assert not thinking["gate"]["counts"]  # a random net is no better with the context
    assert any(line.startswith("thinking: ") for line in found.warnings) and "say nothing about reducing it" in page
    assert "too near" in page
