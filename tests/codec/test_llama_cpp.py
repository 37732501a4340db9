"""The pinned backend, on the packaged SmolLM2; only where llama.cpp is installed."""

import io

import pytest

from tokenary.codec.backends import machine_of, reader_for
from tokenary.codec.files import compress, decompress, machine_for
from tokenary.codec.lockstep import cut, decode, encode
from tokenary.codec.nacrith import Nacrith
from tokenary.core.errors import InputError
from tokenary.data import prose

pytest.importorskip("cyllama")
pytestmark = pytest.mark.real

TEXT = prose()[:900].encode()


@pytest.fixture(scope="module")
def lm():
    from tokenary.models import load

    return load("smollm2", dtype="float32")


def test_lanes_come_back_over_a_sliding_window_with_skips(lm):
    reader, codec = reader_for(lm, "llama.cpp"), Nacrith(window=24, drop=8, skip=1.5, warm_up=5)
    ids = lm.encode(["one two three, one two three, " * 12], raw=True)[0][:80]

    def ensemble():
        return codec.ensemble(reader.vocab_size, 2)

    coded = encode(codec.open(reader, 2), ensemble(), cut(ids, 2), 1)
    back = decode(codec.open(reader, 2), ensemble(), [40, 40], coded, 1)
    assert back[0] + back[1] == ids


def test_an_archive_comes_back_and_names_the_backend(lm, tmp_path):
    machine = machine_for(lm, Nacrith(lanes=4, least=8), reader_for(lm, "llama.cpp"))
    assert compress(io.BytesIO(TEXT), tmp_path / "x", lambda: (lm, machine)).coded
    seen, sink = [], io.BytesIO()

    def prepare(header):
        seen.append(header.backend)
        return machine_of(header, lm)

    decompress(io.BytesIO((tmp_path / "x").read_bytes()), sink, prepare)
    assert sink.getvalue() == TEXT and seen[0].startswith("llama.cpp/") and "-" in seen[0]


def test_another_machine_is_refused(lm, tmp_path, monkeypatch):
    reader = reader_for(lm, "llama.cpp")
    machine = machine_for(lm, Nacrith(lanes=1), reader)
    compress(io.BytesIO(TEXT), tmp_path / "x", lambda: (lm, machine))
    monkeypatch.setattr(reader, "name", "llama.cpp/b1-00000000")
    with pytest.raises(InputError, match=r"was written by llama\.cpp"):
        decompress(io.BytesIO((tmp_path / "x").read_bytes()), io.BytesIO(), lambda header: machine_of(header, lm))


def test_both_backends_know_the_same_text(lm):
    ids = lm.encode([TEXT.decode()], raw=True)[0]
    found = []
    for backend in ("torch", "llama.cpp"):
        lanes = reader_for(lm, backend).open(1, 64, 16)
        for at in range(0, 32, 16):
            states = lanes.read([ids[at : at + 16]])[0]
        found.append(lanes.logits(states[-1:])[0])
    assert abs(found[0] - found[1]).mean() < 0.5
    assert found[0].argmax() == found[1].argmax()
