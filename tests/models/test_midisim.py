from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from tokenary.core.errors import InputError
from tokenary.data import bach_chorales
from tokenary.decode.confidence import Confidence
from tokenary.decode.denoise_laws import run
from tokenary.decode.window_diffusion import WindowDiffusion
from tokenary.models import find, load, midisim
from tokenary.models.convert import convert
from tokenary.models.midisim import MASK, build_midisim, converted, note_tokens, read_midisim
from tokenary.run import generate

HIDDEN, HEADS, DEPTH, VOCAB = 32, 2, 2, 20


def published(seed=0, vocab=VOCAB):
    """Random weights in the published layout."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g) * (1.0 if len(shape) == 1 else shape[-1] ** -0.5)

    state = {"token_emb.emb.weight": r(vocab, HIDDEN), "attn_layers.final_norm.gamma": r(HIDDEN)}
    state["to_logits.weight"] = r(vocab, HIDDEN)
    for n in range(DEPTH):
        a, f = f"attn_layers.layers.{2 * n}.", f"attn_layers.layers.{2 * n + 1}."
        state |= {f"{a}1.to_{name}.weight": r(HIDDEN, HIDDEN) for name in ("q", "k", "v", "out")}
        state |= {f"{a}0.0.gamma": r(HIDDEN), f"{f}0.0.gamma": r(HIDDEN)}
        state |= {f"{f}1.ff.0.0.weight": r(4 * HIDDEN, HIDDEN), f"{f}1.ff.0.0.bias": r(4 * HIDDEN)}
        state |= {f"{f}1.ff.2.weight": r(HIDDEN, 4 * HIDDEN), f"{f}1.ff.2.bias": r(HIDDEN)}
    return state


def turn(x):
    """Rotate neighbours of the first half of each head, (H, N, D), by their position."""
    size = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    z = torch.view_as_complex(x[..., :size].reshape(*x.shape[:2], -1, 2).contiguous())
    turned = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat([turned, x[..., size:]], -1)


def slow(state, ids):
    """The published network, written out."""
    x = state["token_emb.emb.weight"][ids]
    for n in range(DEPTH):
        a, f = f"attn_layers.layers.{2 * n}.", f"attn_layers.layers.{2 * n + 1}."
        h = layer_norm(x, (HIDDEN,)) * (1 + state[f"{a}0.0.gamma"])
        q, k, v = (
            linear(h, state[f"{a}1.to_{name}.weight"]).view(len(ids), HEADS, -1).transpose(0, 1) for name in "qkv"
        )
        p = (turn(q) @ turn(k).mT / math.sqrt(HIDDEN // HEADS)).softmax(-1)
        x = x + linear((p @ v).transpose(0, 1).flatten(1), state[f"{a}1.to_out.weight"])
        h = layer_norm(x, (HIDDEN,)) * (1 + state[f"{f}0.0.gamma"])
        h = gelu(linear(h, state[f"{f}1.ff.0.0.weight"], state[f"{f}1.ff.0.0.bias"]))
        x = x + linear(h, state[f"{f}1.ff.2.weight"], state[f"{f}1.ff.2.bias"])
    return linear(layer_norm(x, (HIDDEN,)) * (1 + state["attn_layers.final_norm.gamma"]), state["to_logits.weight"])


def small(seed=0):
    model = build_midisim(HIDDEN, DEPTH, HEADS, VOCAB)
    model.load_state_dict(converted(published(seed), HEADS))
    return model


def test_it_is_the_published_network():
    ids = torch.tensor([3, 7, 19, 19, 4, 0, 11, 19, 5])
    with torch.no_grad():
        found = small()(ids[None]).logits[0]
    assert torch.allclose(found, slow(published(), ids), atol=1e-4)


def test_it_denoises_and_windows_work_on_it():
    model = small()
    prompt = [3, 7, 19, 19, 4, 0]  # 19 is the mask
    full = run(model, Confidence(block=0), [prompt], new=10).sequences[0].ids
    assert 19 not in full and full[:2] == [3, 7] and full[4:6] == [4, 0]
    assert (
        run(model, WindowDiffusion(**WindowDiffusion.everything), [prompt], new=10).sequences[0].ids
        == run(model, None, [prompt], new=10).sequences[0].ids
    )


@pytest.fixture
def lm(tmp_path, monkeypatch):
    """A small network in the published layout, converted and loaded by name."""
    monkeypatch.setenv("TOKENARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(midisim, "build_midisim", lambda: build_midisim(HIDDEN, DEPTH, HEADS, 386))
    monkeypatch.setattr(midisim, "converted", lambda state: converted(state, HEADS))
    torch.save(published(vocab=386), tmp_path / "weights.pth")
    convert(tmp_path / "weights.pth", "midisim", find("midisim").sha256)
    return load("midisim", dtype="float32")


def test_it_loads_by_name_and_notes_are_text(lm):
    assert (lm.kind, lm.model.config.mask_token_id, lm.tokenizer.mask_token_id) == ("diffusion", MASK, MASK)
    ids = torch.tensor([3, 200, 300, MASK, MASK])
    with torch.no_grad():
        assert torch.allclose(lm.model(ids[None]).logits[0], slow(published(vocab=386), ids), atol=1e-4)
    assert lm.encode(["t0 d16 p60 t127 d0"]) == [[0, 144, 316, 127, 128]]
    assert lm.decode([0, 144, 316]) == "t0 d16 p60"
    with pytest.raises(InputError, match="prompt 1 has words that midisim has no token for") as caught:
        lm.encode(["hello"])
    assert "\n" not in str(caught.value)


def test_it_writes_notes_as_a_stream(lm):
    pieces = []
    output = generate(lm, "t0 d16 p60", "local-leap", max_new_tokens=8, on_piece=pieces.append)[0]
    assert "".join(piece.text for piece in pieces).split() == output.text.split()
    assert len(output.token_ids) == 8 and MASK not in output.token_ids


def test_notes_become_tokens():
    notes = [(0.0, 1.0, 60), (0.0, 1.0, 64), (1.0, 0.5, 62), (30.0, 100.0, 61), (30.0, 0.01, 1)]
    assert note_tokens(notes) == [0, 144, 320, 144, 316, 16, 136, 318, 127, 255, 317, 129, 257]
    assert note_tokens([(2.0, 1.0, 60)], quarter_ms=320) == [0, 138, 316]
    assert note_tokens([]) == [0]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"no")
    with pytest.raises(InputError, match="does not hold midisim"):
        read_midisim(tmp_path / "other.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not hold midisim"):
        read_midisim(tmp_path / "other.pth")


@pytest.mark.slow
def test_the_published_weights_know_music():
    """On Bach's chorales most of every seventh token is guessed right: layout, norms and positions are theirs."""
    lm, hits, count = load("midisim", dtype="float32"), 0, 0
    for notes in bach_chorales(4):
        ids = torch.tensor(note_tokens(notes)[:256])
        hidden = torch.arange(len(ids)) % 7 == 3
        with torch.inference_mode():
            found = lm.model(ids.masked_fill(hidden, MASK)[None]).logits[0].argmax(-1)
        hits, count = hits + int((found == ids)[hidden].sum()), count + int(hidden.sum())
    assert hits > 0.7 * count
