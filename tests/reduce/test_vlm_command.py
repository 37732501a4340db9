"""``tokenary vlm``: the answer, what was kept, and the picture of it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokenary.cli.vlm import app, read_picture
from tokenary.core.errors import InputError, UnknownNameError
from tokenary.models.bench_vlm import save
from tokenary.reduce.law_tools import pictures, toy_vlm
from tokenary.reduce.picture import kept_patches, png

ASKED = "is there a red star ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    save(toy_vlm(), path / "model")
    Image.fromarray(pictures(1)[0].numpy()).save(path / "small.png")
    Image.fromarray(pictures(1, 128)[0].numpy()).save(path / "large.png")
    return path


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_answer_and_its_page(folder):
    out = folder / "kept.html"
    common = [str(folder / "small.png"), ASKED, "--model", str(folder / "model"), "--json"]
    found = json.loads(run("ask", *common, "--with", "reduce-random:keep=25%", "--out", str(out)))
    assert (found["kept"], found["image_tokens"], found["at"]) == (16, 64, "encoder")
    assert found["gflops"] < found["gflops_on_all"] and found["method"] == "reduce-random:keep=25%"
    plain = json.loads(run("ask", *common))
    assert plain["answer"] == plain["answer_on_all"] == found["answer_on_all"] and plain["kept"] == 64
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 1 and "16 of 64" in page and "://" not in page


@pytest.mark.parametrize("method", ["reduce-pool:keep=25%", "reduce-low-res:keep=25%", "blind"])
@pytest.mark.parametrize("at", ["", "vision:1", "decoder:2"])
def test_every_place_is_drawn(folder, method, at):
    if at and "pool" not in method:
        pytest.skip("acts in one place")
    for name, extra in (("small.png", []), ("large.png", ["--crops"])):
        out = folder / "kept.png"
        common = [str(folder / name), ASKED, "--model", str(folder / "model"), "--with", method, "--out", str(out)]
        run("ask", *common, *extra, *(["--at", at] if at else []))
        drawn = np.asarray(Image.open(out))
        assert drawn.ndim == 3 and drawn.shape[0] >= 256


def test_kept_patches_are_bright_and_merged_ones_of_one_colour():
    pixels = pictures(1)[0].numpy()
    owners = np.full(64, -1)
    owners[9] = 0
    drawn = kept_patches(pixels, owners, np.array([9]), (8, 8), scale=2)
    inside = drawn[8 * 2 + 1 : 16 * 2 : 2, 8 * 2 + 1 : 16 * 2 : 2]
    assert np.array_equal(inside, pixels[8:16, 8:16])
    assert drawn[:8, :8].max() <= 0.3 * 255 + 17
    owners[10] = 0
    merged = kept_patches(pixels, owners, np.array([9]), (8, 8), scale=1)
    assert (merged[9:16, 9:24] == merged[12, 12]).all()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_a_scene_comes_with_questions(folder):
    out = folder / "scene.png"
    found = json.loads(run("scene", str(out), "--family", "counting", "--json"))
    assert all(turn["family"] == "counting" for turn in found["turns"]) and found["turns"]
    assert Image.open(out).size == (128, 128)


def test_what_cannot_be_is_refused_in_a_line(folder):
    common = [str(folder / "small.png"), ASKED, "--model", str(folder / "model")]

    def refused(*args: str) -> Exception:
        result = CliRunner().invoke(app, ["ask", *args])
        assert result.exit_code != 0 and result.exception is not None
        return result.exception

    assert isinstance(refused(*common, "--with", "keyformer"), UnknownNameError)
    assert isinstance(refused(*common, "--out", "kept.gif"), InputError)
    assert isinstance(refused(str(folder / "model" / "config.json"), *common[1:]), InputError)
    assert isinstance(refused(common[0], "who is this ?", *common[2:]), InputError)


def test_pictures_are_fitted_into_the_square(tmp_path):
    Image.new("RGB", (200, 100), (250, 10, 10)).save(tmp_path / "wide.png")
    found = read_picture(tmp_path / "wide.png", 64)
    assert found.shape == (64, 64, 3) and found[:16].max() == 0 and found[16:48, :, 0].min() > 240
