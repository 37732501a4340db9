from __future__ import annotations

import pytest
import torch

from tokenary.core.errors import FetchError, InputError, UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.models import catalogue, find, get, list_models, load
from tokenary.models.text_diffusion import build, save_text_diffusion
from tokenary.models.text_diffusion.corpus import train_tokenizer
from tokenary.run import Generation, generate

TEXT = ["The cat sat on the mat and looked at the owl in the old oak tree. " * 3]


@pytest.fixture(params=["diffusion", "any-subset"])
def folder(request, tmp_path):
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "context": 64, "vocab": 300}
    model = build(objective=request.param, **sizes)
    save_text_diffusion(model, train_tokenizer(TEXT, 300), tmp_path / f"wiki-{request.param}")
    return tmp_path / f"wiki-{request.param}"


def test_a_folder_loads_by_its_model_type(folder):
    lm = load(folder, dtype="float32")
    assert folder.name == f"wiki-{lm.kind}" == lm.name and lm.model.config.mask_token_id == 1
    assert lm.decode(lm.encode(["the cat"], raw=True)[0]) == "the cat"
    assert lm.eos_token_ids == (2,) and lm.tokenizer.mask_token_id == 1
    assert load(folder).fingerprint == lm.fingerprint


def test_shipped_folders_load_by_name(folder, monkeypatch):
    monkeypatch.setattr(catalogue, "WEIGHTS", folder.parent)
    lm = load(folder.name, dtype="float32")
    assert (lm.name, lm.kind) == (folder.name, find(folder.name).kind)
    assert get(folder.name) == folder
    rows = {row["name"]: row for row in list_models()}
    assert rows[folder.name]["converted"] and rows[folder.name]["kind"] == lm.kind
    (folder / "model.safetensors").unlink()
    with pytest.raises(FetchError, match="not there"):
        load(folder.name)
    assert not {row["name"]: row for row in list_models()}[folder.name]["on_disk"]


def test_broken_folders_are_one_line(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_diffusion_models_generate(folder):
    """Text in, text out: batches, streaming with places, templates, and refusals before any work."""
    lm = load(folder, dtype="float32")
    if lm.kind != "diffusion":
        with pytest.raises(UnsupportedModelError, match="local-leap works on diffusion models"):
            generate(lm, "the cat", "local-leap")
        return
    plain = generate(lm, ["the cat", "an owl sat"], max_new_tokens=12)
    assert all(len(output.token_ids) <= 12 and output.trace.passes <= 12 for output in plain)
    assert generate(lm, ["the cat", "an owl sat"], max_new_tokens=12, batch_size=1)[1].token_ids == plain[1].token_ids
    recipe = "local-leap:anchor=0.02,relaxed=0.01 + window-diffusion:window=8,active=4,refresh=3"
    pieces = []
    both = generate(lm, "the cat", recipe, max_new_tokens=12, on_piece=pieces.append)[0]
    placed = {at: token for piece in pieces for at, token in zip(piece.at, piece.token_ids, strict=True)}
    assert [placed[at] for at in range(len(both.token_ids))] == both.token_ids
    assert both.stats.kv_bytes > 0 == plain[0].stats.kv_bytes
    template = lm.encode(["the cat"], raw=True)[0] + [1, 1] + lm.encode([" mat"], raw=True)[0]
    filled = generate(lm, [template], max_new_tokens=1)[0]
    assert filled.stats.prompt_tokens == len(lm.encode(["the cat"], raw=True)[0])
    with pytest.raises(UnsupportedModelError, match="token-recycling works on causal models"):
        generate(lm, "the cat", "token-recycling")
    for _ in (generation := Generation(lm, ["the cat"], None, 12, Sampler())):
        break
    assert torch.tensor(generation.outputs[0].token_ids).shape == (12,)  # cancelled: the rest are masks
    assert generation.outputs[0].stats.finish == "cancelled"
