from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenary.core.errors import InputError, UnknownNameError
from tokenary.models.bench_vlm import (
    FAMILIES,
    SIZES,
    VOCABULARY,
    BenchVLM,
    Trainer,
    TrainingOptions,
    exact_match,
    load,
    questions,
    render,
    save,
    sized,
)
from tokenary.models.bench_vlm.assets import PHOTOS, SPLITS, assets, resize, split_of
from tokenary.models.bench_vlm.batches import EVALUATION_SEED, Batch, Order, TrainingScenes, collate
from tokenary.models.bench_vlm.canvas import NUM_CLASSES, sprite
from tokenary.models.bench_vlm.model import anyres_views
from tokenary.models.bench_vlm.training import GATES, judge, tag_loss
from tokenary.models.bench_vlm.vocabulary import COLOURS, SHAPES

S, XS, TINY = (SIZES[name].geometry for name in ("s", "xs", "tiny"))
CPU = torch.device("cpu")


# -- scenes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [S, XS, TINY, replace(S, side=256)], ids=["s", "xs", "tiny", "anyres"])
def test_the_same_arguments_draw_the_same_scene(geometry):
    for split in SPLITS:
        for index in range(25):
            a, b = (render(geometry, split, 3, index) for _ in range(2))
            assert np.array_equal(a.image, b.image) and np.array_equal(a.owner, b.owner) and a.turns == b.turns
    images = {render(geometry, "train", seed, i).image.tobytes() for seed in (0, 1) for i in range(20)}
    assert len(images) == 40


@pytest.mark.parametrize("geometry", [S, XS], ids=["s", "xs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_of_every_family(geometry, family):
    for index in range(60):
        scene = render(geometry, "val", 1, index, (family,))
        assert scene.image.shape == (geometry.side, geometry.side, 3) and scene.image.dtype == np.uint8
        assert scene.classes.shape == (geometry.grid, geometry.grid) and scene.classes.max() < NUM_CLASSES
        assert 1 <= len(scene.turns) <= 6 and len({turn.question for turn in scene.turns}) == len(scene.turns)
        for turn in scene.turns:
            assert turn.family == family
            for text in (turn.question, turn.answer):
                assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


def test_masks_lie_in_their_boxes_and_patches_follow_them():
    for index in range(150):
        scene = render(S, "train", 5, index)
        for number, item in enumerate(scene.items, start=1):
            mask = scene.mask((number,))
            top, left, bottom, right = item.box
            outside = mask.copy()
            outside[top:bottom, left:right] = False
            assert mask.any() and not outside.any()
        for turn in scene.turns:
            mask = scene.mask(turn.targets)
            expected = np.array(  # the obvious way
                [[mask[y : y + 8, x : x + 8].any() for x in range(0, 128, 8)] for y in range(0, 128, 8)]
            )
            assert np.array_equal(scene.patches(turn.targets), expected)
            assert expected.any() == bool(turn.targets)
            assert not set(turn.targets) & set(turn.cues)


def test_pixels_outside_the_masks_do_not_carry_the_answer():
    """Objects are where their masks say: the colour found under the mask is the colour that is named."""
    from tokenary.models.bench_vlm.canvas import RGB

    palette = np.array(list(RGB.values()), np.float64)
    right = total = 0
    for index in range(80):
        scene = render(S, "test", 6, index, ("attribute",))
        for number, item in enumerate(scene.items, start=1):
            mean = np.median(scene.image[scene.mask((number,))], axis=0)
            nearest = COLOURS[int(np.abs(palette - mean).sum(1).argmin())]
            right, total = right + (nearest == item.label.split()[0]), total + 1
    assert total > 150 and right / total > 0.97


def test_answers_follow_from_what_was_drawn():
    """Every answer about objects is recomputed from names and boxes alone."""
    seen = set()
    for index in range(400):
        scene = render(S, "train", 7, index, ("counting", "existence", "attribute", "spatial", "listing"))
        names = [item.label for item in scene.items]
        centre = {i.label: ((i.box[0] + i.box[2]) / 2, (i.box[1] + i.box[3]) / 2) for i in scene.items}
        for turn in scene.turns:
            words, seen = re.findall(r"\w+", turn.question), seen | {f"{turn.family}/{turn.kind}"}
            pairs = [" ".join(words[i : i + 2]) for i in range(len(words) - 1)]
            named = [pair for pair in pairs if pair.split()[0] in COLOURS and pair.split()[1] in SHAPES]
            if turn.family == "counting":
                colour = next((w for w in words if w in COLOURS), "")
                shape = next((s for s in SHAPES if any(w in (f"{s}s", f"{s}es") for w in words)), "")
                assert turn.answer == str(sum(colour in n and shape in n for n in names))
            elif turn.family == "existence":
                assert (turn.answer == "yes") == (named[0] in names) == (turn.kind == "positive")
            elif turn.family == "attribute":
                assert sum(turn.answer in n.split() and (words[-1] in n or words[-2] in n) for n in names) == 1
            elif turn.family == "listing":
                assert sorted(turn.answer.split(", ")) == sorted(names)
            elif turn.kind == "horizontal":
                assert (centre[named[0]][1] < centre[named[1]][1]) == (turn.answer == "left")
            elif turn.kind == "vertical":
                assert (centre[named[0]][0] < centre[named[1]][0]) == (turn.answer == "above")
            elif turn.kind == "quadrant":
                y, x = centre[named[0]]
                assert turn.answer == f"{'top' if y < 64 else 'bottom'} {'left' if x < 64 else 'right'}"
            else:
                here = np.array(centre[named[0]])
                others = [
                    (np.hypot(*(np.add(i.box[:2], i.box[2:]) / 2 - here)), i.label)
                    for i in scene.items
                    if i.label != named[0]
                ]
                assert turn.answer == min(others)[1]
    for kind in ("existence/adversarial", "existence/popular", "spatial/nearest", "spatial/quadrant", "counting/both"):
        assert kind in seen


def test_text_answers_are_the_glyphs_of_their_targets():
    for index in range(100):
        scene = render(S, "val", 8, index, ("ocr", "chart"))
        for turn in scene.turns:
            if turn.family == "ocr" or turn.kind == "cell":
                assert "".join(scene.items[n - 1].label for n in turn.targets) == turn.answer


def test_existence_is_balanced():
    answers = [turn.answer for i in range(600) for turn in render(S, "train", 9, i, ("existence",)).turns]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_splits_are_disjoint():
    data = assets()
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(data.fonts[a]) & set(data.fonts[b])
        assert not set(data.digit_numbers(a)) & set(data.digit_numbers(b))
    assert sum(len(fonts) for fonts in data.fonts.values()) == len(data.glyphs) >= 40
    assert sum(len(data.digit_numbers(split)) for split in SPLITS) == 1797
    for split in SPLITS:
        for index in range(150):
            for turn in render(S, split, 10, index, ("ocr", "spatial")).turns:
                words = re.findall(r"\w+", turn.question)
                if turn.family == "ocr" and len(turn.answer) > 1:
                    assert split_of("word", turn.answer) == split
                elif turn.kind in ("horizontal", "vertical"):
                    a, b = " ".join(words[2:4]), " ".join(words[-2:])
                    assert split_of("pair", a, b) == split


def test_pixel_sources_are_real():
    data = assets()
    assert data.digits.shape == (1797, 8, 8) and np.bincount(data.digit_labels).min() > 170
    assert len(data.photos) == len(PHOTOS) and all(photo.std() > 15 for photo in data.photos)
    assert np.allclose(resize(np.full((8, 8, 3), 7.0), 20, 5), 7)
    assert {sprite(shape, 20).tobytes() for shape in SHAPES}.__len__() == len(SHAPES)


def test_vocabulary_refuses_what_the_models_cannot_know():
    with pytest.raises(InputError, match="'giraffe'"):
        VOCABULARY.encode("is there a giraffe?")


# -- model ------------------------------------------------------------------------------------------------------------


def test_sizes():
    count = {name: sum(p.numel() for p in BenchVLM(config).parameters()) for name, config in SIZES.items()}
    assert count["s"] * 2 <= 14e6 and count["xs"] < 3e6 and count["s-mini"] < 2e6
    with pytest.raises(UnknownNameError):
        sized("xl")


def test_attention_and_hidden_states_are_those_of_the_forward_pass(tiny):
    pixels = torch.from_numpy(render(TINY, "train", 0, 0).image)[None]
    out = tiny.vision(pixels, output_hidden_states=True, output_attention_logits=True)
    tokens = 1 + sized("tiny").num_patches
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert out.attentions[0].shape == (1, 2, tokens, tokens)
    block, x = tiny.vision.blocks[0], out.hidden_states[0]
    values = block.attention.project(block.norm1(x))[2]
    x = x + block.attention.out((out.attentions[0] @ values).transpose(1, 2).flatten(2))
    x = x + block.shrink(torch.nn.functional.gelu(block.expand(block.norm2(x))))
    assert torch.allclose(x, out.hidden_states[1], atol=1e-4)


def test_patches_enter_in_reading_order(tiny):
    pixels = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    before = tiny.vision.embed(pixels)
    pixels[:, 16:32, 48:64] = 200  # patch row 1, column 3 of 4
    changed = (tiny.vision.embed(pixels) != before).any(-1)[0].nonzero()[:, 0].tolist()
    assert changed == [1 + 4 + 3]


def test_proportional_attention_counts_a_token_as_often_as_its_size(tiny):
    attention = tiny.vision.blocks[0].attention
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    doubled = torch.cat([x, x[:, 2:3]], dim=1)
    sizes = torch.tensor([[1.0, 1, 2, 1, 1]])
    assert torch.allclose(attention(x, sizes), attention(doubled)[:, :5], atol=1e-5)


def test_a_cache_answers_as_full_recomputation(tiny):
    scenes = [render(TINY, "val", 1, index, turns=1) for index in range(6)]
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    asked = [scene.turns[0].question for scene in scenes]
    answers = tiny.answer(pixels, asked, max_new_tokens=6)
    assert len(set(answers)) > 1
    with torch.no_grad():
        for row, question in enumerate(asked):
            image, ids = tiny.image_tokens(pixels[row : row + 1]), VOCABULARY.prompt(question)
            start = len(ids)
            for _ in range(6):
                token = int(tiny(image, torch.tensor([ids]))[0, -1].argmax())
                if token == VOCABULARY.tokens.index("<end>"):
                    break
                ids.append(token)
            assert VOCABULARY.decode(ids[start:]) == answers[row]


def test_one_pass_accuracy_equals_generated_answers(tiny):
    held_out = questions(TINY, "val", 2)
    pixels = held_out.batch.pixels
    generated = tiny.answer(pixels, [turn.question for turn in held_out.turns])
    # ask for what the model says: then half of the answers are right by construction
    turns = [
        replace(turn, answer=said) if row % 2 else turn
        for row, (turn, said) in enumerate(zip(held_out.turns, generated, strict=True))
    ]
    scenes = [replace(scene, turns=(turn,)) for scene, turn in zip(held_out.scenes, turns, strict=True)]
    finished = [said for said in generated if 0 < len(VOCABULARY.encode(said)) < 20]
    held_out.turns, held_out.scenes, held_out.batch = turns, scenes, collate(scenes, 80)
    right = exact_match(tiny, held_out, CPU)
    for row, (turn, said) in enumerate(zip(turns, generated, strict=True)):
        if said in finished:
            assert right[row] == (turn.answer == said)


def test_blind_answers_do_not_depend_on_the_picture(tiny):
    held_out = questions(TINY, "val", 2)
    with torch.no_grad():
        blind = tiny(None, held_out.batch.ids)
    assert blind.shape[:2] == held_out.batch.ids.shape
    noise = Batch(255 - held_out.batch.pixels, held_out.batch.ids, held_out.batch.predicted, held_out.batch.classes)
    first = exact_match(tiny, held_out, CPU, blind=True)
    held_out.batch = noise
    assert exact_match(tiny, held_out, CPU, blind=True) == first


def test_anyres_views_and_their_order(tiny):
    pixels = torch.from_numpy(render(replace(TINY, side=128), "train", 0, 3).image)[None]
    views = anyres_views(pixels)
    assert views.shape == (1, 5, 64, 64, 3)
    assert torch.equal(views[0, 2], pixels[0, :64, 64:]) and torch.equal(views[0, 3], pixels[0, 64:, :64])
    with torch.no_grad():
        tokens, each = tiny.image_tokens(pixels)[0], [tiny.image_tokens(view[None])[0] for view in views[0]]
    assert tokens.shape[0] == 16 + 8 * 9
    rows = tokens[16:].reshape(8, 9, -1)
    assert torch.allclose(tokens[:16], each[0], atol=1e-5)
    assert torch.equal(rows[:, 8], tiny.newline.expand(8, -1))
    assert torch.allclose(rows[:4, 4:8].flatten(0, 1), each[2], atol=1e-5)  # the upper right crop
    assert torch.allclose(rows[4:, :4].flatten(0, 1), each[3], atol=1e-5)  # the lower left crop


def test_wrong_pictures_and_questions_are_refused(tiny):
    with pytest.raises(InputError, match="64 x 64"):
        tiny.vision(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="one question a picture"):
        tiny.answer(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), ["how many objects are there?"])


def test_save_and_load(tiny, tmp_path):
    save(tiny, tmp_path / "m", seed=4)
    again = load(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["seed"] == 4
    state, expected = again.state_dict(), tiny.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key].half().float()) for key in state)
    save(again, tmp_path / "n")
    twice = load(tmp_path / "n")
    pixels = torch.from_numpy(render(TINY, "val", 0, 0).image)[None]
    with torch.no_grad():
        assert torch.equal(twice.image_tokens(pixels), again.image_tokens(pixels))
    with pytest.raises(UnknownNameError):
        load(tmp_path / "nowhere")
    (tmp_path / "m" / "config.json").write_text('{"sizes": {}, "vocabulary": []}')
    with pytest.raises(InputError):
        load(tmp_path / "m")


# -- training ---------------------------------------------------------------------------------------------------------


def test_collate_marks_exactly_the_answers():
    scenes = [render(XS, "train", 2, index) for index in range(8)]
    batch = collate(scenes)
    for row, scene in enumerate(scenes):
        text = VOCABULARY.decode(batch.ids[row][batch.predicted[row]].tolist()).replace(" ", "").replace(",", "")
        whole = "".join(turn.answer for turn in scene.turns).replace(" ", "").replace(",", "")
        assert text and whole.startswith(text)
        assert (batch.ids[row] == VOCABULARY.tokens.index("<end>")).sum() <= len(scene.turns)


def test_a_batch_depends_on_its_step_alone():
    drawn = TrainingScenes(TINY, 0)
    a, b, other = drawn[Order(3, 4)], TrainingScenes(TINY, 0)[Order(3, 4)], drawn[Order(4, 4)]
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.ids, b.ids) and not torch.equal(a.pixels, other.pixels)
    easy = drawn[Order(3, 8, easy=True)]
    text = VOCABULARY.decode(easy.ids.flatten().tolist())
    assert "how many" not in text and ("is there" in text or "what color" in text)
    assert drawn[Order(3, 2, anyres=True)].pixels.shape == (2, 128, 128, 3)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_takes_a_step_at_both_resolutions(size, tmp_path):
    trainer = Trainer(TrainingOptions(size=size, steps=10, batch=1), CPU, tmp_path)
    drawn = TrainingScenes(trainer.model.config.geometry, 0)
    before = trainer.model.newline.clone(), trainer.model.vision.positions.clone()
    parts = trainer.train_step(drawn[Order(0, 1)])
    assert set(parts) == {"loss", "dense", "tags", "norm"} and all(torch.isfinite(value) for value in parts.values())
    assert torch.equal(before[0], trainer.model.newline)  # only a large picture has newlines
    parts = trainer.train_step(drawn[Order(1, 1, anyres=True)])
    assert set(parts) == {"anyres", "norm"} and torch.isfinite(parts["anyres"])
    assert not torch.equal(before[0], trainer.model.newline)
    assert not torch.equal(before[1], trainer.model.vision.positions)


def test_steps_lower_the_loss_on_a_fixed_batch(tmp_path):
    trainer = Trainer(TrainingOptions(size="tiny", steps=60, batch=8, lr=3e-3, blind_every=1000), CPU, tmp_path)
    batch = TrainingScenes(TINY, 0)[Order(0, 8)]
    losses = [trainer.train_step(batch) for _ in range(40)]
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"] and losses[20]["dense"] < 0.9 * losses[0]["dense"]
    assert losses[-1]["tags"] < 0.6 * losses[0]["tags"]


def test_the_class_token_is_asked_what_there_is():
    batch = collate([render(XS, "train", 2, index) for index in range(4)])
    there = torch.stack([torch.isin(torch.arange(NUM_CLASSES), classes) for classes in batch.classes])
    assert tag_loss(torch.where(there, 30.0, -30.0), batch) < 1e-6 < tag_loss(torch.zeros(4, NUM_CLASSES), batch)


def test_training_computes_nearly_the_loss_of_float32(tmp_path, monkeypatch):
    trainer = Trainer(TrainingOptions(size="tiny", steps=10), CPU, tmp_path)
    batch = TrainingScenes(TINY, 0)[Order(0, 8)]
    with torch.no_grad():
        found = trainer.loss(batch)[0]
        monkeypatch.setattr("tokenary.models.bench_vlm.training.fast_products", contextlib.nullcontext)
        trainer.model.language.set_attn_implementation("sdpa")
        assert torch.allclose(found.float(), trainer.loss(batch)[0], rtol=0.02)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    options = TrainingOptions(size="tiny", steps=10, batch=4, per_family=1, evaluate_every=0.3, anyres_every=4)
    whole = Trainer(options, CPU, tmp_path / "a")
    whole.run()
    Trainer(options, CPU, tmp_path / "b").run(stop_after=4)
    second = Trainer(options, CPU, tmp_path / "b")
    assert second.state.step == 4
    second.run()
    assert second.state.step == 10 == whole.state.step
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert whole.state.curve and set(whole.state.curve[0]["accuracy"]) == set(FAMILIES)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["checkpoint.pt"]
    with pytest.raises(InputError, match="another run"):
        Trainer(replace(options, seed=1), CPU, tmp_path / "a")


def test_gates_need_both_accuracy_and_a_margin_over_blind():
    full, blind = dict.fromkeys(FAMILIES, 0.9), dict.fromkeys(FAMILIES, 0.5)
    verdicts = judge(full, blind)
    assert verdicts["ocr"]["passed"] and verdicts["counting"]["passed"]
    assert not verdicts["existence"]["passed"] and GATES["existence"] == 0.95
    assert not judge(full, dict.fromkeys(FAMILIES, 0.7))["ocr"]["passed"]


def test_evaluation_scenes_are_not_training_scenes():
    assert TrainingOptions().seed < EVALUATION_SEED
    held_out = questions(XS, "val", 3)
    assert [turn.family for turn in held_out.turns] == [family for family in FAMILIES for _ in range(3)]
