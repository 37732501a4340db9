from __future__ import annotations

import json

import pytest
import torch

from tokenary.core.errors import InputError
from tokenary.models.catalogue import WEIGHTS
from tokenary.models.cifar_vit import CifarViT, ViTConfig, accuracy, load, save
from tokenary.models.cifar_vit.training import Trainer, Training, augmented
from tokenary.models.training import schedule

TINY = ViTConfig(width=32, layers=2, heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CifarViT(TINY).eval()


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def test_a_block_is_plain_pre_norm_attention(model):
    x = model.embed(pictures(2))
    assert x.shape == (2, 65, 32) and model.grid == (8, 8) and model.prefix == 1
    block = model.blocks[0]
    q, k, v = block.attention.project(block.norm1(x))
    mixed = (q @ k.mT / 4).softmax(-1) @ v
    y = x + block.attention.out(mixed.transpose(1, 2).flatten(2))
    y = y + block.shrink(torch.nn.functional.gelu(block.expand(block.norm2(y))))
    assert torch.allclose(block(x), y, atol=1e-6)


def test_sizes_weigh_a_token_as_that_many_copies(model):
    x = model.embed(pictures(1))[:, :5]
    sizes = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0]])
    copied = torch.cat([x, x[:, 1:2], x[:, 1:2]], dim=1)
    assert torch.allclose(model.blocks[0](x, sizes), model.blocks[0](copied)[:, :5], atol=1e-5)


def test_patches_lie_row_by_row(model):
    blank = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    spot = blank.clone()
    spot[0, 17, 9] = 255  # patch row 4, column 2
    moved = (model.embed(spot) - model.embed(blank)).abs().sum(-1)[0]
    assert moved.argmax() == 1 + 4 * 8 + 2
    with pytest.raises(InputError, match="32 x 32"):
        model(pictures(1)[:, :16])


def test_save_and_load(model, tmp_path):
    save(model, tmp_path, steps=3)
    back = load(tmp_path)
    assert torch.allclose(back(pictures(3)), model(pictures(3)), atol=2e-2)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 3
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="no CIFAR classifier"):
        load(tmp_path)


def test_augmentation_shifts_and_mirrors_whole_pictures():
    x = pictures(64)
    y = augmented(x, 3, seed=0, step=5)
    assert torch.equal(y, augmented(x, 3, seed=0, step=5)) and not torch.equal(y, augmented(x, 3, seed=0, step=6))
    padded = torch.nn.functional.pad(x, (0, 0, 3, 3, 3, 3))
    mirrored = 0
    for picture, source in zip(y, padded, strict=True):
        crops = [source[r : r + 32, c : c + 32] for r in range(7) for c in range(7)]
        plain = any(torch.equal(picture, crop) for crop in crops)
        mirrored += any(torch.equal(picture, crop.flip(1)) for crop in crops)
        assert plain or any(torch.equal(picture, crop.flip(1)) for crop in crops)
    assert 16 < mirrored < 48


def test_a_broken_run_goes_on_as_if_it_had_not_been(tmp_path):
    x, labels = pictures(40), torch.arange(40) % 10
    settings = Training(epochs=2, batch=10, save_every=0.0)
    whole = Trainer(TINY, settings, x, labels, tmp_path / "a.pt")
    while whole.state.step < whole.steps:
        whole.run_epoch()
    for _ in range(8):
        part = Trainer(TINY, settings, x, labels, tmp_path / "b.pt")
        part.run_epoch()
        part.checkpoint.save()
    assert part.state.step == whole.state.step == 8
    for a, b in zip(whole.model.state_dict().values(), part.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="another run"):
        Trainer(TINY, Training(epochs=3, batch=10), x, labels, tmp_path / "b.pt")


def test_training_learns_what_is_easy(tmp_path):
    x = pictures(200)
    labels = torch.arange(200) % 2
    x[labels == 1] //= 4  # dark
    trainer = Trainer(TINY, Training(epochs=3, batch=20, pad=1), x, labels, tmp_path / "c.pt")
    while trainer.state.step < trainer.steps:
        trainer.run_epoch()
    assert accuracy(trainer.model, x, labels) > 0.95


def test_schedule_rises_then_falls():
    values = [schedule(p / 100, 0.1) for p in range(100)]
    assert values.index(max(values)) == 10 and values[-1] < 0.01 and values[0] < 0.05


@pytest.mark.real
def test_the_shipped_network_knows_cifar10():
    from tokenary.data import cifar10, sources

    if not (WEIGHTS / "cifar-vit" / "report.json").is_file():
        pytest.skip("the network is not here")
    if not (sources.on_this_machine("cifar10") or sources.on_this_machine("cifar10-png")):
        pytest.skip("CIFAR-10 is not here")
    report = json.loads((WEIGHTS / "cifar-vit" / "report.json").read_text())
    test = cifar10("test")
    found = accuracy(load(), torch.from_numpy(test.pixels[:500]), torch.from_numpy(test.labels[:500]))
    assert abs(found - report["test_accuracy"]) < 0.06
