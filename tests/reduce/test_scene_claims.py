"""The claims on a bench VLM: tables made by hand, arms against `run_arm`, large pictures, and whole runs on a toy."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenary.bench.reduction import run_arm
from tokenary.claims import entropy_prune, formula_reading, globalcom2, hiprune, idpruner, scene_reading
from tokenary.claims.formula_reading import Pages
from tokenary.claims.retention import Answers, controls, outcome
from tokenary.claims.scene_reading import Everything, Readings, about, asked, low_res, opened, read, some
from tokenary.core.budget import Budget
from tokenary.core.errors import InputError
from tokenary.models import latex_ocr
from tokenary.models.bench_vlm import questions, save
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.vocabulary import PAD
from tokenary.models.latex_ocr import LatexOcr, OcrConfig
from tokenary.reduce.entropy_prune import EntropyPrune, layer_entropy
from tokenary.reduce.globalcom2 import GlobalCom2
from tokenary.reduce.hiprune import HiPrune
from tokenary.reduce.law_tools import toy_tokens, toy_vlm
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_random import ReduceRandom
from tokenary.reduce.vlm import ReducedVLM

FAMILIES = ("attribute", "counting", "ocr")


def answered(model, held_out):
    """The same questions, each with one token as its answer: what the model says itself."""
    data = held_out.batch
    with torch.no_grad():
        said = model(model.image_tokens(data.pixels), data.ids).argmax(-1)
    rows, first = torch.arange(len(data.ids)), data.predicted.int().argmax(1)
    ids, predicted = data.ids.clone(), torch.zeros_like(data.predicted)
    ids[rows, first], predicted[rows, first] = said[rows, first - 1], True
    return Questions(replace(data, ids=ids, predicted=predicted), held_out.scenes, held_out.turns)


def held_out(count=4, families=FAMILIES, anyres=False):
    model = toy_vlm()
    return answered(model, questions(model.config.geometry, "test", count, families, 7, anyres))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy that was saved, with gates."""
    path = tmp_path_factory.mktemp("toy")
    gates = {name: {"passed": name in FAMILIES} for name in ("ocr", "chart", "counting", "attribute", "real")}
    save(toy_vlm(), path, gates=gates)
    return str(path)


# ------------------------------------------------------------------------------------------------------- tables


def hand_made(times=1, **more):
    """Four pictures: two read only when seen, one always, one never; an arm reads half of what is seen."""
    right = {
        ("none", 1.0): [[1, 1, 1, 0]],
        ("blind", 1.0): [[0, 0, 1, 0]],
        ("half", 0.5): [[1, 1, 1, 0]],
        ("half", 0.25): [[1, 0, 1, 0]],
        ("worse", 0.5): [[1, 0, 1, 0], [0, 0, 1, 0]],
        ("worse", 0.25): [[0, 0, 1, 0], [0, 0, 1, 0]],
    }
    return Answers({key: np.tile(np.array(rows, float), times) for key, rows in right.items()}, (0.5, 0.25), **more)


def test_what_is_retained_is_the_mean_over_shares_and_families():
    answers = hand_made()
    assert answers.mean("half").tolist() == [[1, 0.5, 1, 0]] and answers.mean("none", (0.25,)).tolist() == [
        [1, 1, 1, 0]
    ]
    assert answers.retained("half").value == pytest.approx(0.75) == answers.figure("half").value
    assert answers.retained("half", (0.25,)).value == pytest.approx(0.5)
    assert answers.retained("worse").value == pytest.approx(0.125)
    assert answers.retained("half", minus="worse").value == pytest.approx(0.625)
    assert answers.more_than("half") == {"worse": answers.retained("half", minus="worse").to_json()}
    apart = hand_made(families=["a", "b", "a", "b"])  # a: (1 - 1/2) of 1/2; b: 1/4 of 1/2
    assert apart.retained("half").value == pytest.approx((1 + 0.5) / 2)
    assert apart.retained("worse").value == pytest.approx((0.25 + 0) / 2)
    table = answers.table()
    assert table["half"]["25.00%"]["right"] == 0.5 and table["worse"]["50.00%"]["right"] == 0.375
    assert table["half"]["retained"]["value"] == 0.75 and table["none"]["100.00%"]["retained"]["value"] == 1.0


def test_an_outcome_names_the_best_rival_its_baseline():
    answers = hand_made(10)
    for name in ("random", "other"):
        for keep in (0.5, 0.25):
            answers.right[name, keep] = answers.right["worse", keep] * (0 if name == "other" else 1)
    found = outcome(answers, "half", ("other", "worse"), 3, {"more": 1}, ("random",))
    assert (found.method.name, found.baseline.name) == ("half", "worse") and found.n == 40 and found.runs == 3
    assert [control.name for control in found.controls] == ["none", "blind", "random", "other"]
    assert found.paired_spread == answers.retained("half", minus="worse").error
    assert 0 < found.paired_spread < 0.2 and set(found.details) == {"arms", "more_than", "more"}
    assert hand_made().retained("half").error == np.inf  # in many a draw of four pictures seeing does not help


def test_controls_are_counted_as_the_method_counts():
    found = controls(Budget(ratio=0.25), 3, 5, "original")
    assert [reducer.seed for reducer in found["random"]] == [5, 6, 7]
    assert {reducer.positions for reducers in found.values() for reducer in reducers} == {"original"}
    assert ReduceRandom().positions == "compact"  # the class is left as it is


def test_families_that_the_picture_adds_too_little_to_are_left_out():
    turns = ["a", "a", "b", "b"]
    full, blind = np.array([[1.0, 1, 1, 0]]), np.array([[0.0, 0, 0, 0.5]])
    readings = Readings({("none", 1.0): full, ("blind", 1.0): blind}, families=turns)
    found = scene_reading._fit(readings)
    assert found.families == ["a", "a"] and found.right["none", 1.0].tolist() == [[1, 1]]
    assert found.left_out == {"b": (0.5, 0.25)}
    with pytest.raises(InputError, match="in none of a, b"):
        scene_reading._fit(replace(readings, right={("none", 1.0): blind, ("blind", 1.0): blind}))


# ------------------------------------------------------------------------------------------------------- reading


def test_a_model_is_asked_what_its_gates_allow(folder, tmp_path):
    assert opened(folder)[1] == ["ocr", "counting", "attribute"]
    assert opened(folder, among=("chart", "counting"))[1] == ["counting"]
    assert opened(folder, families=("real",))[1] == ["real"]
    with pytest.raises(InputError, match="none of: chart, real"):
        opened(folder, among=("chart", "real"))
    save(toy_vlm(), tmp_path)  # a snapshot knows no gates
    with pytest.raises(InputError, match="none of"):
        opened(str(tmp_path))
    assert len(about(folder)["sha256"]) == 64


def test_questions_of_a_seed_are_those_of_the_split():
    model = toy_vlm()
    here, there, large = (asked(model, ("counting",), 3, *which) for which in ((0,), (1,), (0, True)))
    assert not torch.equal(here.batch.pixels, there.batch.pixels) and large.batch.pixels.shape[1] == 128
    other = asked(model, ("counting",), 3, 0, calibrating=True)
    assert not torch.equal(here.batch.pixels, other.batch.pixels)
    part = some(here, slice(1, 3))
    longest = int((here.batch.ids[1:] != PAD).sum(1).max())
    assert part.batch.ids.shape == (2, longest) and part.turns == here.turns[1:]
    assert torch.equal(part.batch.ids, here.batch.ids[1:, :longest])


@pytest.mark.parametrize("large", [False, True])
def test_arms_answer_as_they_do_alone(large):
    model, asked_here = toy_vlm(), held_out(3, anyres=large)
    keep = Budget(ratio=0.25)
    arms = {
        ("random", 0.25): ([ReduceRandom(keep, 0), ReduceRandom(keep, 1)], "encoder"),
        ("hiprune", 0.25): ([HiPrune(keep)], "encoder"),
        ("globalcom2", 0.25): ([GlobalCom2(keep)], "encoder"),
        ("entropy-prune", 0.25): ([EntropyPrune(keep, budget="kept")], "decoder:2"),
        ("low resolution", 0.25): ([low_res(model, 0.25, large)], "decoder:2"),  # looks in its own way
        ("all", 0.25): ([ReduceGrid("100%")], "encoder"),
    }
    seen = []
    readings = read(model, asked_here, arms, (0.25,), lambda tokens, context, rows: seen.append(rows), batch=4)
    assert seen == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert not readings.left_out and readings.families == [turn.family for turn in asked_here.turns]
    for key, (reducers, place) in arms.items():
        alone = run_arm(model, key[0], reducers, asked_here, at="encoder" if key[0].startswith("low") else place)
        assert readings.right[key].tolist() == alone.right.astype(float).tolist(), key
        assert readings.kept[key] == alone.kept
    assert readings.right["none", 1.0].all() and readings.right["all", 0.25].all()
    assert 0 < readings.right["random", 0.25].mean() < 1
    blind = run_arm(model, "blind", [None], asked_here, blind=True)
    assert readings.right["blind", 1.0].tolist() == blind.right.astype(float).tolist()
    assert readings.flops["blind", 1.0] < readings.flops["hiprune", 0.25] < readings.flops["none", 1.0]
    assert readings.flops["hiprune", 0.25] < readings.flops["entropy-prune", 0.25]
    row = readings.table()["hiprune"]["25.00%"]
    some_of = np.array([family == "ocr" for family in readings.families])
    left, blind = (readings.right[key][:, some_of].mean() for key in (("hiprune", 0.25), ("blind", 1.0)))
    assert row["families"]["ocr"] == pytest.approx((left - blind) / (1 - blind), abs=1e-4)
    json.dumps(readings.table())


# ------------------------------------------------------------------------------------------------------- entropy


def test_the_layer_is_found_on_the_tokens_that_are_read():
    model, asked_here = toy_vlm(), held_out(2)
    curve = entropy_prune.entropies(model, asked_here, batch=4)
    with torch.no_grad():
        tokens = model.image_tokens(asked_here.batch.pixels)
    assert curve.curve[0] == pytest.approx(float(layer_entropy(tokens).mean()), abs=1e-6)
    assert len(curve.curve) == 5 and 0 <= curve.layer < 2


def test_places_are_compared_at_the_same_average():
    model = toy_vlm()
    found = entropy_prune.by_place(model, held_out(2), 2, 0)
    assert found["kept"] == {"1": int((4 * 0.6 - 1) / 3 * 64), "2": int((4 * 0.6 - 2) / 2 * 64)}
    for layer, kept in ((1, 29), (2, 12)):
        assert (layer * 64 + (4 - layer) * kept) / 4 == pytest.approx(0.6 * 64, abs=1)
    assert set(found["retained"]) == {"entropy-prune 1", "entropy-prune 2", "random 1", "random 2"}
    values = [found["retained"][f"random {k}"]["value"] for k in (1, 2)]
    expected = None if values[0] == values[1] else 1.0 if values[1] > values[0] else -1.0
    assert found["rank_correlation_with_being_behind_the_collapse"]["random"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- crops


def test_a_scene_is_put_into_one_crop_or_into_half_of_a_band():
    small = held_out(6)
    large = globalcom2.placed(small, 8, 3, "crop")
    assert large.valid is None and large.held_out.turns == small.turns and set(large.crop.tolist()) == {0, 1, 2, 3}
    for scene, picture, crop in zip(small.batch.pixels, large.held_out.batch.pixels, large.crop.tolist(), strict=True):
        quarters = picture.unflatten(1, (2, 64)).unflatten(0, (2, 64)).transpose(1, 2).flatten(0, 1)
        assert torch.equal(quarters[crop], scene)
        assert not any(torch.equal(quarters[other], scene) for other in range(4) if other != crop)
    padded = globalcom2.placed(small, 8, 3, "padded")
    assert padded.crop is None and padded.valid.shape == (18, 320)
    wide = 0
    for scene, picture, valid in zip(small.batch.pixels, padded.held_out.batch.pixels, padded.valid, strict=True):
        wide += (lies := not bool(picture[:32].any()))
        picture, scene = (picture, scene) if lies else (picture.transpose(0, 1), scene.transpose(0, 1))
        assert not picture[:32].any() and not picture[96:].any()
        assert any(torch.equal(picture[32:96, start : start + 64], scene) for start in (0, 64))
        views = valid.view(5, 8, 8)
        views = views if lies else views[[0, 1, 3, 2, 4]].transpose(1, 2)
        assert views[0].all() and views[1:3, 4:].all() and not views[1:3, :4].any()
        assert views[3:, :4].all() and not views[3:, 4:].any()
    assert 0 < wide < 18


def test_controls_of_crops_keep_to_their_views():
    reducer = globalcom2.RandomOfEach(Budget(ratio=0.25), 0)
    x, context = toy_tokens(reducer, views=5)
    chosen = reducer.reduce(x, context).index // 48
    assert [row.tolist().count(view) for row in chosen for view in range(5)] == [12] * 15
    assert not torch.equal(chosen, globalcom2.RandomOfEach(Budget(ratio=0.25), 1).reduce(x, context).index)
    valid = torch.arange(240) % 48 < 24
    chosen = reducer.reduce(x, replace(context, valid=valid))
    assert chosen.mask(valid).sum(-1).tolist() == [30] * 3 and valid[chosen.index].all()
    thumbnail = globalcom2.Thumbnail(Budget(tokens=10))
    x, context = toy_tokens(thumbnail, views=5)
    logits = context.attention_logits(rows=slice(0, 1)).mean(1)[::5, 0, 1:]
    assert torch.equal(thumbnail.reduce(x, context).index, logits.topk(10).indices.sort().values)
    whole = globalcom2.Thumbnail(Budget(tokens=60)).reduce(x, context)
    assert whole.index.tolist() == [list(range(48))] * 3  # it has no more than that


@pytest.mark.parametrize("how", ["crop", "padded"])
def test_guided_and_uniform_shares_keep_as_many_tokens(how):
    model = toy_vlm()
    large = globalcom2.placed(held_out(4), 8, 0, how)
    thumbnails = globalcom2.glances(model, large.held_out, batch=5)
    eyes = ReducedVLM(model, Everything(Budget(ratio=1.0)))
    with torch.no_grad():
        seen = eyes.image_tokens(large.held_out.batch.pixels)
    context = replace(seen.context, valid=large.valid)
    logits = globalcom2.class_logits(context)[::5].double()
    torch.testing.assert_close(thumbnails.flatten(1), logits)
    for ratio in globalcom2.RATIOS:
        even, guided = globalcom2.matching(thumbnails, ratio, large.valid)
        uniform = GlobalCom2(Budget(ratio=ratio), ratios="uniform", choice="local")
        counts = [
            reducer.reduce(seen.tokens, context).mask(torch.ones(320, dtype=torch.bool)).expand(12, -1).sum(1)
            for reducer in (uniform, GlobalCom2(Budget(tokens=guided)))
        ]
        means = [float(each.double().mean()) for each in counts]
        assert round(means[0]) == even and abs(means[0] - means[1]) < 1


def test_arms_that_keep_different_numbers_are_refused():
    kept = {(name, 0.25): 96.0 + 0.3 * (name == "random") for name in globalcom2.MATCHED}
    readings = Readings(keeps=(0.25,), kept={**kept, ("thumbnail alone", 0.25): 80.0})
    assert globalcom2.matched(readings)["25%"]["random"] == 96.3
    with pytest.raises(InputError, match="different numbers"):
        globalcom2.matched(replace(readings, kept={**kept, ("random", 0.25): 97.1}))


def test_how_far_guidance_goes():
    thumbnails = torch.zeros(2, 8, 8, dtype=torch.float64)
    thumbnails[0, :4, 4:] = 5.0  # crop 1 of the first picture
    found = globalcom2.guidance(thumbnails, torch.tensor([1, 3]))
    assert found["largest"] == pytest.approx((1.75 + 1) / 2, abs=1e-3) and found["smallest"] < 1
    assert found["of_the_scene"] == pytest.approx((1.75 + 1) / 2, abs=1e-3)
    assert found["largest_is_that_of_the_scene"] == 0.5


def test_what_is_drawn_in_the_fullest_crop():
    model = toy_vlm()
    large = questions(model.config.geometry, "test", 3, ("attribute",), 7, True)
    expected = []
    for scene in large.scenes:
        there = scene.owner > 0
        parts = [there[y : y + 64, x : x + 64].sum() for y in (0, 64) for x in (0, 64)]
        expected.append(max(parts) / sum(parts))
    assert globalcom2.fullest(large) == pytest.approx(np.mean(expected), abs=1e-4)


# ------------------------------------------------------------------------------------------------------- runs


def test_what_is_drawn_is_compared_with_what_is_attended_to():
    small = held_out(2)
    ink = hiprune.drawn(small)
    for scene, row in zip(small.scenes, ink, strict=True):
        owned = np.array(
            [[(scene.owner[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] > 0).any() for x in range(8)] for y in range(8)]
        )
        assert row.tolist() == owned.flatten().tolist()
    model, overlap = toy_vlm(), hiprune.Overlap(ink)
    context = ReducedVLM(model, Everything(Budget(ratio=1.0))).image_tokens(small.batch.pixels).context
    overlap(torch.zeros(6, 64, 1), context, slice(0, 6))
    scores = context.attention(1).mean((1, 2))[:, 1:]
    shares = []
    for row in range(6):
        best = set(scores[row].topk(6).indices.tolist())
        there = set(ink[row].nonzero().flatten().tolist())
        shares.append(len(best & there) / len(best | there))
    assert overlap.by_layer()[1] == pytest.approx(np.mean(shares), abs=1e-4)


RUNS = {
    "entropy_prune": {"calibrated_on": 6, "texts": 0},
    "globalcom2": {"even": 2},
    "hiprune": {"probed": 6},
    "idpruner": {"steps": 2, "more": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_scenes(name, folder, monkeypatch):
    module, model = importlib.import_module(f"tokenary.claims.{name}"), opened(folder)[0]
    drawn_by, placed = scene_reading.questions, globalcom2.placed
    monkeypatch.setattr(scene_reading, "questions", lambda *args: answered(model, drawn_by(*args)))

    def placed_and_answered(*args):
        large = placed(*args)
        return replace(large, held_out=answered(model, large.held_out))

    monkeypatch.setattr(globalcom2, "placed", placed_and_answered)
    options = {"random_seeds": 1, **({} if name == "globalcom2" else {"also": ()})}
    found = module.CLAIM.run(seed=0, model=folder, count=3, **options, **RUNS[name])
    slug = module.CLAIM.slug
    assert found.method.name == slug and {"none", "random"} <= {control.name for control in found.controls}
    assert found.n == 3 * len(set(found.details["arms"]["none"]["100.00%"]["families"]))
    assert found.controls[0].value == 1.0 and found.details["model"]["name"] == about(folder)["name"]
    json.dumps(found.details)
    if name == "entropy_prune":
        assert found.details["collapse"]["place"] in ("decoder:1", "decoder:2") and found.details["by_place"]
    if name == "hiprune":
        assert found.details["anchors"] == {"50.00%": 1, "25.00%": 0, "12.50%": 0}
        here, alone = (found.details["arms"][arm] for arm in ("hiprune", "deep layer alone"))
        assert here["25.00%"] == alone["25.00%"] and len(found.details["overlap_with_ink"]) == 3
    if name == "globalcom2":
        assert found.details["filled_evenly"]["more_than_uniform"] and found.baseline.name == globalcom2.UNIFORM
    if name == "idpruner":
        assert len(found.details["trade_off_at_25%"]["points"]) == 2 + 2 * len(idpruner.CURVE)


@pytest.mark.parametrize("name", ["hiprune", "idpruner"])
def test_a_run_on_formulas(name, monkeypatch):
    torch.manual_seed(0)
    config = OcrConfig(32, 64, hidden=32, heads=4, encoder_layers=3, decoder_layers=2, intermediate=64, vocab=12)
    model = LatexOcr(config, ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape) * 2 / parameter.shape[1] ** 0.5
    pixels = torch.randint(0, 256, (4, 32, 64), dtype=torch.uint8)
    shown = Pages(model.read(pixels, 96), pixels, torch.ones(4, 32, dtype=torch.bool))
    monkeypatch.setattr(latex_ocr, "load", lambda: model)
    monkeypatch.setattr(idpruner, "load", lambda: model)
    monkeypatch.setattr(formula_reading, "pages", lambda *args: shown)
    history = ((1.0, 0.5),) * 4
    monkeypatch.setattr(idpruner, "taught", lambda *args: (idpruner.Scorer(32), history))
    run = importlib.import_module(f"tokenary.claims.{name}").CLAIM.run
    found = run(bed="formulas", count=4, random_seeds=2, also=())
    assert found.method.name == name and found.controls[0].value == 1.0 and found.n == 4 and found.runs == 2
    row = found.details["arms"]["random"]["25.00%"]
    assert set(row) == {"alike", "exact", "alike_retained", "exact_retained"} and row["alike"] < 1
    json.dumps(found.details)
