"""Reducers compared on small random models, and the figures of outcomes made by hand: record, table, files, page."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.bench import reduce_room
from tokenary.bench.reduce_arms import (
    BLIND,
    Answers,
    Contender,
    Cost,
    answer,
    contenders_of,
    draw,
    fitting,
    measure_costs,
    sample,
)
from tokenary.bench.reduce_figures import Part, part_of
from tokenary.bench.reduce_report import cells, columns, findings, plots, render
from tokenary.bench.reduce_room import ReduceComparison, compare_reduce, load_all
from tokenary.bench.reduction import Times, run_arm
from tokenary.bench.same_time import in_same_time, told
from tokenary.core.errors import InputError, OptionError, RecipeError, UnknownNameError
from tokenary.models.bench_vlm import BenchVLM, save, sized
from tokenary.models.bench_vlm.scenes import FAMILIES
from tokenary.reduce.hiprune import HiPrune
from tokenary.reduce.idpruner import Scorer, learn_scorer, save_scorer
from tokenary.reduce.law_tools import toy_vlm
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom

OPTIONS = {"budgets": [75, 12.5], "prompts": 1, "draws": 2, "training": 2, "timed": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two random models of size tiny: 16 image tokens."""
    place = tmp_path_factory.mktemp("models")
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save(BenchVLM(sized("tiny")), place / f"tiny-{seed}")
    return place


@pytest.fixture(scope="module")
def small(folder):
    models = [folder / "tiny-0", folder / "tiny-1"]
    return compare_reduce(models, ["hiprune:keep=5"], crops=True, seed=3, **OPTIONS)


# -- the room on a model -----------------------------------------------------------------------------------------------


def test_every_method_of_the_room_is_measured_or_left_out_with_a_reason(small):
    record = small.to_json()
    assert small.complete and record["model"]["name"] == "tiny-0, tiny-1" and record["settings"]["models"]
    assert json.loads(json.dumps(record)) == record
    pictures, crops = small.parts
    for part in small.parts:
        recipes = [point["recipe"] for point in part["points"]]
        assert recipes[0] == "plain" and recipes[-1] == BLIND and len(set(recipes)) == len(recipes)
        assert {"hiprune", "hiprune:keep=5", "idpruner", "token-transforming", "reduce-grid", "reduce-low-res",
                "reduce-pool", "reduce-random"} <= {point["curve"] for point in part["points"]}  # fmt: skip
        assert {name for point in part["points"] for name in point["models"]} == {"tiny-0", "tiny-1"}
    assert "globalcom2" in {point["curve"] for point in crops["points"]}
    assert "globalcom2" not in {point["curve"] for point in pictures["points"]}
    for slug in ("centerclip", "reduce-frame-pool", "pictures: globalcom2:keep=75%"):
        assert any(line.startswith(slug + ": ") for line in record["left_out"])
    assert any(line.startswith("not measured: centerclip: ") for line in small.warnings)
    assert (pictures["side"], crops["side"], crops["views"]) == (64, 128, 5)


def test_counts_are_the_real_ones(small):
    points = {point["recipe"]: point for point in small.parts[0]["points"]}
    assert points["plain"]["kept"] == 16 and points[BLIND]["kept"] == 0
    for slug in ("hiprune", "idpruner", "reduce-grid", "reduce-pool", "reduce-random", "token-transforming"):
        for budget, tokens in (("75%", 12), ("12.5%", 2)):
            point = points[f"{slug}:keep={budget}" + ",scorer=trained" * (slug == "idpruner")]
            assert (point["kept"], point["tokens"], point["share"]) == (tokens, tokens, tokens / 16)
    assert points["hiprune:keep=5"]["kept"] == 5 and points["hiprune:keep=5"]["budget"] is None
    within = points["entropy-prune:keep=75%"]  # the first of two layers sees all
    assert (within["tokens"], within["kept"], within["at"]) == (12, 8, "decoder:25%")
    assert points["reduce-random:keep=75%"]["seeds"] == 2 and points["reduce-grid:keep=75%"]["seeds"] == 1
    keys = 2 * 32 * 2 * 2  # numbers of a token, over both layers, of 2 bytes
    for name in ("hiprune:keep=75%", "entropy-prune:keep=75%"):
        assert points["plain"]["kv_bytes"] - points[name]["kv_bytes"] == 4 * keys
    assert points[BLIND]["flops"] < points["reduce-low-res:keep=75%"]["flops"] < points["plain"]["flops"]
    assert points["plain"]["encode_ms"] > 0 and points[BLIND]["encode_ms"] is None
    assert points["hiprune:keep=75%"]["overhead_ms"] > 0 == points["plain"]["overhead_ms"]


def test_a_picture_seen_as_one_view_may_keep_as_many_tokens_as_one_of_crops(small):
    points = {point["recipe"]: point for point in small.parts[1]["points"]}
    assert points["plain"]["kept"] == 5 * 16 + 8  # newlines
    assert points["reduce-low-res:keep=16"]["budget"] == 75 and points["reduce-low-res:keep=10"]["budget"] == 12.5
    assert points["hiprune:keep=75%"]["kept"] == 60 + 8


def test_what_never_ended_its_training_is_judged_by_these_questions(small):
    assert any("tiny-0, tiny-1: the training has not ended" in line for line in small.warnings)
    assert not any(family["fit"] for family in small.parts[0]["families"].values())
    assert all(point["retention"]["value"] is None for point in small.parts[0]["points"])
    assert "no family of questions is answered well enough" in findings(small.record)[0]


def test_files_go_there_and_back(small, tmp_path):
    results, report = small.write(tmp_path)
    assert ReduceComparison.read(results).record == small.record
    assert report.read_text().startswith("<!doctype html>")


def test_progress_counts_everything(folder):
    steps = []
    found = compare_reduce(folder / "tiny-0", progress=steps.append, **{**OPTIONS, "prompts": 9})
    contenders = len(found.parts[0]["points"])
    assert [step.stage for step in steps[:3]] == ["training", "training", "done"]
    assert steps[-1].done == steps[-1].total == contenders * (2 + 2)
    assert found.parts[0]["questions"] == 9


def test_ctrl_c_keeps_the_questions_that_everybody_answered(folder):
    def stop(step):
        if "question 9" in step.stage and step.detail == "reduce-pool:keep=75%":
            raise KeyboardInterrupt

    found = compare_reduce(folder / "tiny-0", progress=stop, **{**OPTIONS, "prompts": 16})
    assert not found.complete and found.parts[0]["questions"] == 8
    assert findings(found.record)[0].startswith("Interrupted.")
    assert any("interrupted" in line for line in found.warnings)


def test_ctrl_c_before_any_answer_goes_on_up(folder):
    def stop(step):
        if "timing 2" in step.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_reduce(folder / "tiny-0", progress=stop, **OPTIONS)


def test_everything_is_checked_before_any_work(folder, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="budgets"):
        compare_reduce("nowhere", budgets=[0.0])
    with pytest.raises(OptionError, match="prompts"):
        compare_reduce("nowhere", prompts=0)
    with pytest.raises(OptionError, match="keep"):
        compare_reduce("nowhere", ["hiprune:keep=120%"])
    for recipe in ("keyformer:keep=10%", "plain"):
        with pytest.raises(RecipeError, match="no method of the room reduce"):
            compare_reduce("nowhere", [recipe])
    with pytest.raises(UnknownNameError, match="nowhere"):
        compare_reduce("nowhere")
    scorer = tmp_path / "scorer.safetensors"
    save_scorer(Scorer(load_all(folder / "tiny-0")["tiny-0"][1].config.width), scorer)
    with pytest.raises(RecipeError, match="here are several"):
        compare_reduce([folder / "tiny-0", folder / "tiny-1"], [f"idpruner:keep=5,scorer={scorer}"])


def test_models_are_found_by_name_size_and_folder(folder, monkeypatch):
    monkeypatch.setattr(reduce_room, "available", lambda: ["tiny-0", "tiny-1"])
    monkeypatch.setattr(reduce_room, "folder_of", lambda name: folder / name)
    monkeypatch.setattr(reduce_room, "load", lambda name: toy_vlm())
    assert list(load_all(())) == list(load_all("tiny")) == ["tiny-0", "tiny-1"]
    assert list(load_all("tiny-1")) == ["tiny-1"]
    nets = iter([toy_vlm(), BenchVLM(sized("tiny"))])
    monkeypatch.setattr(reduce_room, "load", lambda name: next(nets))
    with pytest.raises(InputError, match="different sizes"):
        load_all("tiny")


# -- answers and costs -------------------------------------------------------------------------------------------------


def asked_of(model, crops):
    """Questions with one answered token each, which is the one that the model itself says on everything."""
    asked = draw(model.config, [0, 1], 0, crops)
    batch = asked.batch
    first = batch.predicted & (batch.predicted.cumsum(1) == 1)
    with torch.no_grad():
        best = model(model.image_tokens(batch.pixels), batch.ids).argmax(-1)
    ids = torch.where(first, best.roll(1, dims=1), batch.ids)
    return replace(asked, batch=replace(batch, ids=ids, predicted=first))


@pytest.mark.parametrize("crops", [False, True])
def test_a_shared_encoder_changes_no_answer(crops):
    model = toy_vlm()
    contenders, _ = contenders_of(
        [], [50, 12.5], "reduce", model.config, views=5 if crops else 1, draws=2, seed=0, trained={"idpruner": {}}
    )
    asked = asked_of(model, crops)
    contenders, _ = fitting(model, contenders, sample(asked)[:1])
    shared = {each.recipe: found for each, found in answer(model, contenders, asked)}
    alone = {each.recipe: found for each, found in answer(model, contenders, asked, share=False)}
    assert shared["plain"].right.all() and not shared[BLIND].right.all()
    assert 0 < np.mean([found.right.mean() for found in shared.values()]) < 1
    for contender in contenders:
        name = contender.recipe
        arm = run_arm(model, name, contender.reducers, asked, at=contender.at, blind=contender.blind)
        for found in (shared[name], alone[name]):
            assert np.array_equal(found.right, arm.right) and found.kept.mean() == pytest.approx(arm.kept)
    assert {each.shares for each in contenders} == {True, False}


def test_what_is_counted_is_what_run_arm_counts():
    model = toy_vlm()
    asked = draw(model.config, [0])
    contenders = [
        Contender("plain", "plain"),
        Contender("pool", "pool", (ReducePool(keep=16),)),
        Contender(BLIND, BLIND),
    ]
    costs = list(measure_costs(model, contenders, sample(asked)[:1], repeats=1))[-1]
    row = asked.turns[0]
    (pixels, ids) = sample(asked)[0]
    assert ids.shape[1] < asked.batch.ids.shape[1] and row.family == FAMILIES[0]
    one = replace(asked, batch=replace(asked.batch, pixels=pixels, ids=ids, predicted=torch.zeros_like(ids).bool()))
    for contender in contenders:
        arm = run_arm(model, contender.recipe, contender.reducers, one, blind=contender.blind)
        assert (costs[contender.recipe].flops, costs[contender.recipe].kv_bytes) == (arm.flops, arm.kv_bytes)
    assert math.isnan(costs[BLIND].times.encode) and costs["pool"].times.plan > 0


def test_questions_take_turns_and_go_on_where_the_last_batch_ended():
    config = sized("tiny")
    both, second = draw(config, [4, 5], 1), draw(config, [5], 1)
    assert [turn.family for turn in both.turns] == [*FAMILIES, *FAMILIES]
    assert both.turns[8:] == second.turns and torch.equal(both.batch.pixels[8:], second.batch.pixels)
    assert draw(config, [5], 2).turns != second.turns


def test_a_scorer_is_trained_on_scenes_of_its_own():
    model = toy_vlm()
    before, told = model.projector[0].weight.clone(), []
    trained, history = learn_scorer(model, steps=6, scenes=4, told=told.append)
    assert told == list(range(6)) and len(history) == 6 and len({answers for answers, _ in history}) == 6
    assert (trained.query.weight - Scorer(model.config.width).query.weight).abs().max() > 1e-4
    assert torch.equal(before, model.projector[0].weight)


# -- figures of outcomes made by hand ----------------------------------------------------------------------------------

ASKED = 12
RATES = {"plain": 0.9, "hiprune:keep=25%": 0.8, "reduce-pool:keep=25%": 0.6, "reduce-random:keep=25%": 0.5, BLIND: 0.2}


def made_part(rates=RATES):
    """Two models, random with two seeds, two batches; of one family nothing is ever answered."""
    reducers = {"hiprune": (HiPrune(keep=4),), "reduce-pool": (ReducePool(keep=4),),
                "reduce-random": (ReduceRandom(keep=4), ReduceRandom(keep=4, seed=1))}  # fmt: skip
    contenders = [
        Contender(
            (curve := name.partition(":")[0]),
            name,
            reducers.get(curve, (None,)),
            curve != "hiprune",
            25 if ":" in name else None,
        )
        for name in rates
    ]
    rng = np.random.default_rng(0)
    batches = []
    for size in (8, 4):
        luck = rng.random((2, size * len(FAMILIES)))  # who answers less answers right a part of what others do
        batch = {}
        for number, model in enumerate(("a-0", "a-1")):
            for contender in contenders:
                seeds = len(contender.reducers)
                right = np.tile(luck[number] < rates[contender.recipe], (seeds, 1))
                if seeds > 1:
                    right &= rng.random(right.shape) < 0.9
                right[:, FAMILIES.index("listing") :: len(FAMILIES)] = False
                kept = np.full(right.shape, {"plain": 64, BLIND: 0}.get(contender.recipe, 4))
                batch[model, contender.recipe] = Answers(right, kept, kept.astype(float))
        batches.append(batch)
    costs = {name: Cost(1e9 * (1 + place), 1e3, Times(2e-3, 1e-3, 5e-4)) for place, name in enumerate(rates)}
    return Part("pictures", dict.fromkeys(("a-0", "a-1"), contenders), [], costs, batches)


def by_hand(part, recipe, families, models=("a-0", "a-1"), rows=None):
    """Retention, one question after the other; `rows` are the questions drawn of each family."""
    rates = []
    for family in families:
        means = []
        for name in (recipe, "plain", BLIND):
            hits = []
            for number in range(ASKED) if rows is None else rows[family]:
                batch, within = (0, number) if number < 8 else (1, number - 8)
                for model in models:
                    for seed in part.batches[batch][model, name].right:
                        hits.append(bool(seed[within * len(FAMILIES) + FAMILIES.index(family)]))
            means.append(sum(hits) / len(hits))
        reduced, full, blind = means
        rates.append((reduced - blind) / (full - blind) if full > blind else math.nan)
    return sum(rates) / len(rates)


@pytest.fixture(scope="module")
def made():
    part = made_part()
    gates = {name: {"needed": 0.5, "margin": 0.5, "passed": name not in ("listing", "ocr")} for name in FAMILIES}
    return part, part_of(part, toy_vlm(), {"a-0": gates, "a-1": gates})


def test_figures_are_those_of_a_slow_reference(made):
    part, figures = made
    fit = [name for name in FAMILIES if name not in ("listing", "ocr")]
    assert [name for name, family in figures["families"].items() if family["fit"]] == fit and figures["questions"] == 12
    for point in figures["points"]:
        name = point["recipe"]
        assert point["retention"]["value"] == pytest.approx(by_hand(part, name, fit), abs=1e-4)
        for model, value in point["models"].items():
            assert value == pytest.approx(by_hand(part, name, fit, (model,)), abs=1e-4)
        for family in fit:
            assert point["families"][family]["value"] == pytest.approx(by_hand(part, name, [family]), abs=1e-4)
        assert point["families"]["listing"]["value"] is None and point["families"]["listing"]["accuracy"] == 0
    plain, hiprune, *_, blind = figures["points"]
    assert plain["retention"]["value"] == 1 and blind["retention"]["value"] == 0
    assert (hiprune["share"], hiprune["flops_share"], hiprune["time_share"]) == (4 / 64, 2, 1)
    assert (hiprune["encode_ms"], hiprune["prefill_ms"], hiprune["overhead_ms"]) == (2, 1, 0.5)


def test_intervals_are_those_of_questions_drawn_anew(made):
    part, figures = made
    point = figures["points"][1]
    fit = [name for name, family in figures["families"].items() if family["fit"]]
    rng = np.random.default_rng(1)
    drawn = [
        by_hand(part, point["recipe"], fit, rows={family: rng.integers(0, ASKED, ASKED) for family in fit})
        for _ in range(800)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert point["retention"]["low"] == pytest.approx(low, abs=0.03)
    assert point["retention"]["high"] == pytest.approx(high, abs=0.03)


def test_methods_are_held_against_the_best_control_of_their_budget(made):
    plain, hiprune, pool, random, blind = made[1]["points"]
    assert pool["retention"]["value"] > random["retention"]["value"]
    assert hiprune["over"]["control"] == "reduce-pool:keep=25%"
    apart = hiprune["retention"]["value"] - pool["retention"]["value"]
    assert hiprune["over"]["value"] == pytest.approx(apart, abs=2e-4) and hiprune["over"]["low"] > 0
    assert [point["over"] for point in (plain, pool, random, blind)] == [None] * 4


# -- in the same time --------------------------------------------------------------------------------------------------

#: Milliseconds to see and read, by recipe; random tokens at two budgets, all tokens, and pooling at one.
TAKES = {"plain": 10, "hiprune:keep=25%": 5, "reduce-pool:keep=25%": 7, "reduce-random:keep=25%": 4,
         "reduce-random:keep=50%": 6, BLIND: 1}  # fmt: skip


def timed_part(**takes):
    part = made_part({**RATES, "reduce-random:keep=50%": 0.7})
    for name, each in {**TAKES, **takes}.items():
        part.costs[name] = Cost(1e9, 1e3, Times(1e-3 * each - 1e-4, 1e-4, 5e-5))
    good = {name: {"needed": 0.5, "margin": 0.5, "passed": name != "listing"} for name in FAMILIES}
    return {point["recipe"]: point for point in part_of(part, toy_vlm(), {"a-0": good, "a-1": good})["points"]}


def test_retention_is_held_against_controls_in_the_same_time():
    points = timed_part()
    own, low, high = (points[name]["retention"]["value"] for name in list(TAKES)[1:5] if "pool" not in name)
    found = points["hiprune:keep=25%"]["same_time"]
    over = found["reduce-random"]
    assert over["value"] == pytest.approx(own - (low + high) / 2, abs=3e-4) and over["why"] is None
    assert over["low"] < over["value"] < over["high"]
    assert found["reduce-pool"]["value"] is None and found["reduce-pool"]["why"].startswith("faster: 5.00 ms")
    assert [name for name, point in points.items() if point["same_time"] is not None] == ["hiprune:keep=25%"]
    slower = timed_part(**{"hiprune:keep=25%": 6})["hiprune:keep=25%"]["same_time"]
    assert slower["reduce-random"]["value"] == pytest.approx(own - high, abs=3e-4)  # time costs retention
    slowest = timed_part(**{"hiprune:keep=25%": 11})["hiprune:keep=25%"]["same_time"]
    assert slowest["reduce-random"]["why"] == "slower: 11.00 ms, the control at most 10.00 ms"
    assert told(over)[0] in "+-" and told(slowest["reduce-random"]) == "slower"


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6, unique=True), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_between_budgets_is_linear(times, seconds):
    rights = np.random.default_rng(0).random((len(times), 3))
    found = in_same_time(seconds, times, list(rights))
    if not min(times) <= seconds <= max(times):
        assert isinstance(found, str) and found.startswith("faster" if seconds < min(times) else "slower")
        return
    order = np.argsort(times)
    expected = [np.interp(seconds, np.array(times)[order], column[order]) for column in rights.T]
    assert np.allclose(found, expected)


def test_a_curve_has_two_points():
    assert in_same_time(1.0, [1.0], [np.ones(2)]).startswith("not measured")
    assert in_same_time(1.0, [1.0, math.nan], [np.ones(2)] * 2).startswith("not measured")


def test_columns_in_the_same_time_are_those_of_records_that_have_them(made):
    part = made[1]
    row = cells(part["points"][1], part)
    assert [name for name, _ in columns(part)][-2:] == ["over random, same time", "over pooling, same time"]
    old = {**part, "points": [{k: v for k, v in point.items() if k != "same_time"} for point in part["points"]]}
    assert len(columns(old)) == len(columns(part)) - 2 and cells(old["points"][1], old) == row[:-2]


def test_a_family_must_be_fit_for_every_model_and_is_judged_here_where_nothing_was_said():
    good = {name: {"needed": 0.5, "margin": 0.5, "passed": True} for name in FAMILIES}
    bad = good | {"real": {"needed": 0.7, "margin": 0.1, "passed": False}}
    families = part_of(made_part(), toy_vlm(), {"a-0": good, "a-1": bad})["families"]
    assert [name for name in FAMILIES if not families[name]["fit"]] == ["real"] and families["real"]["needed"] == 0.7
    families = part_of(made_part(), toy_vlm(), {"a-0": good, "a-1": {}})["families"]  # nothing is listed right
    assert not families["listing"]["fit"] and families["attribute"]["fit"]
    crops = replace(made_part(), name="crops")  # what was said when the training ended is about pictures of one view
    assert not part_of(crops, toy_vlm(), {"a-0": good, "a-1": good})["families"]["listing"]["fit"]


# -- sentences, the table, the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(small, made):
    """A record with the figures made by hand."""
    copied = json.loads(json.dumps(small.record))
    copied["parts"] = json.loads(json.dumps([made[1]]))
    copied["settings"]["models"], copied["model"]["name"] = ["a-0", "a-1"], "a-0, a-1"
    return copied


def test_the_headline_follows_the_figures(record):
    said = findings(record)
    assert "With all 64 image tokens a-0, a-1 answer" in said[0] and "not fit to measure on: ocr, listing" in said[0]
    value = record["parts"][0]["points"][1]["retention"]["value"]
    assert f"At 25% of the tokens hiprune keeps {value:.0%}, the best control (reduce-pool)" in said[1]
    assert said[2] == "Better than the best control of its budget beyond the interval: hiprune at 25%."
    changed = json.loads(json.dumps(record))
    changed["parts"][0]["points"][1]["over"]["low"] = -0.01
    assert findings(changed)[2].startswith("None is better")


def test_families_that_are_not_fit_are_marked(record):
    part = record["parts"][0]
    names = [name for name, _ in columns(part)]
    assert "(ocr)" in names and "(listing)" in names and "attribute" in names
    row = dict(zip(names, cells(part["points"][1], part), strict=True))
    assert row["(listing)"] == "(–)" and row["(ocr)"].startswith("(") and row["attribute"].endswith("%")
    shown = {plot["id"]: plot["title"] for plot in plots(record)}
    assert shown["pictures-ocr"] == "OCR (not fit to measure on)" and shown["pictures-attribute"] == "Attribute"


def test_the_terminal_gets_every_point_and_both_parts(small, record):
    from rich.console import Console

    for each in (small, ReduceComparison(record)):
        console = Console(record=True, width=160, file=io.StringIO())
        console.print(each.table())
        text = console.export_text()
        for part in each.parts:
            assert all(point["recipe"] in text for point in part["points"])
        assert ("crops" in text) is (len(each.parts) == 2)
    assert "attribute" in text and "chart" in text and "(ocr)" not in text


def test_the_page_has_every_curve_and_asks_for_nothing_from_outside(record, small):
    changed = json.loads(json.dumps(record))
    changed["left_out"] = ["<script>alert(1)</script>"]
    changed["parts"].append(small.record["parts"][1])
    page = Page(render(changed))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id", "").startswith("plot-")]
    wanted = ("tokens", "flops", "time", *FAMILIES)
    assert ids == [f"plot-{part}-{name}" for part in ("pictures", "crops") for name in wanted]
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe") and "src" not in attributes
    assert sum(tag == "script" for tag, _ in page.elements) == 3


def test_every_figure_is_one_that_plotly_knows(record):
    import plotly.graph_objects as go

    for plot in plots(record):
        go.Figure(plot["figure"])
    tokens = plots(record)[0]
    assert [trace["name"] for trace in tokens["figure"]["data"]] == ["plain", "hiprune", "reduce-pool", "reduce-random"]
    assert tokens["figure"]["data"][1]["x"] == [100 * 4 / 64] and len(tokens["body"]) == 4
