"""The packaged SmolLM2: prose and odd bytes there and back, in few bits."""

import io

import pytest

from tokenary.codec.backends import machine_of, reader_for
from tokenary.codec.files import compress, decompress, machine_for
from tokenary.codec.nacrith import Nacrith
from tokenary.data import prose
from tokenary.models import load

pytestmark = pytest.mark.real


def test_prose_and_odd_bytes_come_back_in_few_bits(tmp_path):
    lm = load("smollm2", dtype="float32")
    machine = machine_for(lm, Nacrith(least=200), reader_for(lm))
    assert {0x04, 0xC0, 0xF5, 0xFF} < machine.spelling.missing and len(machine.spelling.missing) == 21
    data = prose()[20_000:21_500].encode() + "漢字 \U0004abcd <|im_end|> \u00a0\u2003".encode() + bytes(range(256))
    found = compress(io.BytesIO(data), tmp_path / "x", lambda: (lm, machine))
    assert found.coded and 8 * (found.packed - 256) / 1500 < 2.5
    sink = io.BytesIO()
    decompress(io.BytesIO((tmp_path / "x").read_bytes()), sink, lambda header: machine_of(header, lm))
    assert sink.getvalue() == data
