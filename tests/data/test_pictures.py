from __future__ import annotations

import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
from tar_files import tgz

from tokenary import data
from tokenary.core.errors import FetchError, OptionError
from tokenary.data import pictures, sources

OFFICIAL = {  # sha256 of the authors' files, which the npm package does not carry
    "test": ["8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"],
    "train": [
        "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    ],
}


@pytest.fixture
def small():
    """Two batches' worth of pictures, in both layouts: five files of 3 rows and one of 2."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 17)
    records = np.concatenate([labels[:, None].astype(np.uint8), pixels.transpose(0, 3, 1, 2).reshape(17, -1)], 1)
    parts = {f"data_batch_{n + 1}": slice(3 * n, 3 * n + 3) for n in range(5)} | {"test_batch": slice(15, 17)}
    binary = {f"cifar-10-batches-bin/{name}.bin": records[rows].tobytes() for name, rows in parts.items()}
    return pixels, labels, parts, tgz(binary)


def png(pixels, labels, parts):
    image = pytest.importorskip("PIL.Image")
    files = {}
    for name, rows in parts.items():
        out = io.BytesIO()
        image.fromarray(pixels[rows].reshape(-1, 1024, 3)).save(out, "png")
        files[f"package/{name}.png"] = out.getvalue()
    for split, rows in (("train", slice(0, 15)), ("test", slice(15, 17))):
        files[f"package/{split}_lables.json"] = json.dumps(labels[rows].tolist()).encode()
    return tgz(files)


def publish(monkeypatch, tmp_path, **archives):
    """Let the data sets of these names be these archives, lying in a data folder."""
    monkeypatch.setenv("TOKENARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENARY_DATA", str(tmp_path))
    rows = []
    for row in sources.DATASETS:
        content = archives.get(row.name.replace("-", "_"))
        if content is not None:
            (tmp_path / row.file).write_bytes(content)
            row = dataclasses.replace(row, sha256=hashlib.sha256(content).hexdigest())
        rows.append(row)
    monkeypatch.setattr(sources, "DATASETS", tuple(rows))


def test_both_layouts_hold_the_same_pictures(small, monkeypatch, tmp_path):
    pixels, labels, parts, binary = small
    publish(monkeypatch, tmp_path, cifar10=binary)
    for split, rows in (("train", slice(0, 15)), ("test", slice(15, 17))):
        found = data.cifar10(split)
        assert found.pixels.dtype == np.uint8 and found.labels.dtype == np.int64
        assert np.array_equal(found.pixels, pixels[rows]) and np.array_equal(found.labels, labels[rows])
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    publish(monkeypatch, tmp_path, cifar10_png=png(pixels, labels, parts))
    for split, rows in (("train", slice(0, 15)), ("test", slice(15, 17))):
        found = data.cifar10(split)
        assert np.array_equal(found.pixels, pixels[rows]) and np.array_equal(found.labels, labels[rows])


def test_npm_is_asked_when_the_host_is_not_reached(small, monkeypatch, tmp_path):
    pixels, labels, parts, _ = small
    monkeypatch.setenv("TOKENARY_CACHE", str(tmp_path))
    monkeypatch.delenv("TOKENARY_DATA", raising=False)
    file = tmp_path / "x.tgz"
    file.write_bytes(png(pixels, labels, parts))
    asked = []

    def locate(name):
        asked.append(name)
        if name == "cifar10":
            raise FetchError("the host cannot be reached")
        return file

    monkeypatch.setattr(pictures, "locate", locate)
    assert len(data.cifar10("test").labels) == 2 and asked == ["cifar10", "cifar10-png"]


def test_split_is_checked():
    with pytest.raises(OptionError, match="train or test"):
        data.cifar10("valid")


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_real_pictures_are_those_of_the_authors(split):
    """The bytes of either source, laid out as the authors do, hash to the authors' files."""
    if not (sources.on_this_machine("cifar10") or sources.on_this_machine("cifar10-png")):
        pytest.skip("CIFAR-10 is not here")
    pixels, labels = data.cifar10(split)
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    records = np.concatenate([labels[:, None].astype(np.uint8), planes], 1)
    found = [hashlib.sha256(part.tobytes()).hexdigest() for part in np.split(records, len(OFFICIAL[split]))]
    assert found == OFFICIAL[split]
