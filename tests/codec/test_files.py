"""Any bytes come back; any damage is seen; what was begun can be gone on with."""

import functools
import io
import itertools
import lzma
import random
import zlib

import numpy as np
import pytest
from codec_toy import MISSING, SMALL, toy_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.codec import blocks, files
from tokenary.codec.backends import machine_of
from tokenary.codec.container import CODED, SYNC, DamagedError, Frame, Header, varint
from tokenary.codec.estimate import estimate
from tokenary.codec.files import compress, decompress, machine_for
from tokenary.codec.integer import IntegerLlama
from tokenary.codec.nacrith import Nacrith
from tokenary.codec.plain import pack, unpack
from tokenary.codec.spelling import Spelling
from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.models.tiny import tiny_lm

TEXT = b"In the beginning the hand and the land and the sand ran and ran, and then the end began anew. "
NOISE = random.Random(0).randbytes(300)
BLOCK = 400


@pytest.fixture
def pack_file(lm, machine, tmp_path):
    def run(data, block=BLOCK, name="x.tkz", **options):
        out = tmp_path / name
        summary = compress(io.BytesIO(data), out, lambda: (lm, machine), block=block, **options)
        assert not out.with_name(name + ".partial").exists()
        assert summary.packed == out.stat().st_size and summary.size == len(data)
        return out.read_bytes(), summary

    return run


@pytest.fixture
def no_plain(monkeypatch):
    """A random net loses against any packer: let there be none but the bytes themselves."""
    monkeypatch.setattr(files, "sizes", lambda pieces, size: [10 * size] * 4)
    monkeypatch.setattr(blocks, "pack", lambda data: (0, data))


@pytest.fixture
def unpack_file(lm):
    """Decompress; the arithmetic is checked once for each header."""
    prepare = functools.cache(lambda header: machine_of(header, lm))

    def run(archive, **options):
        sink = io.BytesIO()
        summary = decompress(io.BytesIO(archive), sink, prepare, **options)
        return sink.getvalue(), summary

    return run


# ------------------------------------------------------------------------------------------ spelling and plain


@given(st.binary(max_size=400), st.integers(0, 3))
@settings(deadline=None, max_examples=80)
def test_segments_join_to_the_data(noise, copies):
    spelling = test_segments_join_to_the_data.spelling
    data = TEXT * copies + noise + TEXT * copies
    made = spelling.segments(data)
    assert b"".join(segment.data for segment in made) == data
    for segment, after in itertools.pairwise(made):
        assert segment.text != after.text
    for segment in made:
        assert (spelling.decode(segment.tokens) == segment.data) if segment.text else not segment.tokens


test_segments_join_to_the_data.spelling = Spelling(toy_lm())


def test_bytes_without_token_are_no_text(lm):
    spelling = Spelling(lm)
    assert set(MISSING) == spelling.missing
    assert [s.text for s in spelling.segments(TEXT + b"\xe9\x00" + TEXT)] == [True]  # a gap that tokens can spell
    assert [s.text for s in spelling.segments(TEXT + b"\x04" + TEXT)] == [True, False, True]
    assert [s.text for s in spelling.segments(TEXT + bytes(9) + TEXT)] == [True, False, True]
    assert [s.text for s in spelling.segments(TEXT[:63])] == [False]
    assert [s.text for s in spelling.segments(TEXT[:64])] == [True]
    strange = TEXT + "\U0010abcd".encode() + TEXT  # its first byte, F4, has a token
    assert [s.text for s in spelling.segments(strange)] == [True]
    without_f4 = Spelling(toy_lm(missing=(*MISSING, 0xF4)))
    assert [s.text for s in without_f4.segments(strange)] == [True, False, True]
    assert (
        spelling.encode(b"the \x04") is None
        and spelling.decode(spelling.encode(b"<|start|>\xe9 the")) == b"<|start|>\xe9 the"
    )


def test_a_model_without_bytes_is_refused():
    with pytest.raises(UnsupportedModelError):
        Spelling(tiny_lm())


@given(st.binary(max_size=300), st.integers(0, 3))
def test_plain_packing_comes_back(data, copies):
    data = data * (1 + 50 * copies)
    method, packed = pack(data)
    assert unpack(method, packed, len(data)) == data
    assert len(packed) <= len(data)


# ------------------------------------------------------------------------------------------------ round trips


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([TEXT, TEXT.upper(), bytes(40), NOISE])), max_size=6))
@settings(deadline=None, max_examples=25)
def test_any_bytes_come_back(tmp_path_factory, lm, reader, parts):
    data, out = b"".join(parts), tmp_path_factory.mktemp("any") / "x.tkz"
    machine = machine_for(lm, Nacrith(**SMALL), reader)
    compress(io.BytesIO(data), out, lambda: (lm, machine), block=BLOCK)
    sink = io.BytesIO()
    decompress(io.BytesIO(out.read_bytes()), sink, lambda header: machine_of(header, lm))
    assert sink.getvalue() == data


@pytest.mark.parametrize(
    "data",
    [b"", b"a", b"\x00", bytes(range(256)), bytes(range(256)) * 3, TEXT * 5, "äöü žluťoučký kůň 漢字 🙂 ".encode() * 9,
     TEXT.decode().encode("utf-16"), "Größe und Maß, Äpfel für süße Mädchen. ".encode("latin-1") * 6,
     TEXT + NOISE + TEXT * 2, zlib.compress(TEXT * 50), lzma.compress(NOISE * 3), b"\xff" * 1000],
)  # fmt: skip
def test_these_bytes_come_back(pack_file, unpack_file, data):
    archive, _ = pack_file(data)
    assert unpack_file(archive)[0] == data


def best_plain(data):
    import bz2

    return min(len(data), len(zlib.compress(data, 9)), len(bz2.compress(data, 9)), len(lzma.compress(data, preset=9)))


@pytest.mark.parametrize(
    "data",
    [b"", b"a", bytes(10_000_000), random.Random(1).randbytes(1_500_000),
     lzma.compress(random.Random(2).randbytes(90_000)), np.arange(6_000, dtype="<u2").tobytes(),
     (bytes(500) + TEXT + NOISE) * 30, bytes(range(256)) * 2000],
    ids=["empty", "byte", "zeros", "noise", "packed", "numbers", "mixed", "ramp"],
)  # fmt: skip
def test_never_more_than_the_best_plain_way(pack_file, unpack_file, data):
    archive, _ = pack_file(data, block=1 << 16)
    assert len(archive) <= 1.001 * best_plain(data) + 64
    assert unpack_file(archive)[0] == data


def test_workers_change_no_byte(no_plain, pack_file, unpack_file):
    data = TEXT * 18 + NOISE + TEXT.swapcase() * 9
    one, summary = pack_file(data)
    assert summary.coded and summary.blocks == -(-len(data) // BLOCK)
    two, _ = pack_file(data, workers=3, name="y.tkz")
    assert one == two
    assert unpack_file(one, workers=3)[0] == data


def test_progress_ends_at_the_whole(no_plain, pack_file):
    told = []
    archive, _ = pack_file(TEXT * 12, progress=lambda done, size: told.append((done, size)))
    done = [bytes_done for bytes_done, _ in told]
    assert done == sorted(done) and done[-1] == len(TEXT * 12) and len(done) > 20
    assert told[-1][1] < len(archive)


# --------------------------------------------------------------------------------------------------- damage


def every_damage(archive):
    """Every truncation of an archive, and every flip of a bit."""
    yield from (archive[:length] for length in range(len(archive)))
    for bit in range(8 * len(archive)):
        damaged = bytearray(archive)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def test_every_flipped_bit_and_every_truncation_is_seen(no_plain, pack_file, unpack_file, monkeypatch):
    decode = files.decode_block
    seen = functools.cache(lambda kind, payload, size, machine: decode(kind, payload, size, machine))
    monkeypatch.setattr(files, "decode_block", lambda *given: seen(*given[:4]))
    archive, summary = pack_file(TEXT * 5)
    assert summary.coded and summary.blocks == 2 and archive[archive.index(SYNC) + 4] == CODED
    for damaged in every_damage(archive):
        with pytest.raises(InputError):
            unpack_file(damaged)
    with pytest.raises(DamagedError):
        unpack_file(archive + b"\x00")
    with pytest.raises(DamagedError):
        unpack_file(archive + archive[len(bytes(Header.read(io.BytesIO(archive)))) :])


def test_damage_to_a_plain_stream_is_seen_too(pack_file, unpack_file):
    archive, summary = pack_file(NOISE[:60])
    assert not summary.coded
    for damaged in every_damage(archive):
        with pytest.raises(InputError):
            unpack_file(damaged)
    for more in (b"\x00", archive[-40:]):
        with pytest.raises(DamagedError):
            unpack_file(archive + more)


@pytest.mark.parametrize("where", ["header", "payload", "sync", "last"])
def test_recovery_keeps_what_is_whole(no_plain, pack_file, unpack_file, where):
    data = TEXT * 18
    archive, summary = pack_file(data)
    frames = [i for i in range(len(archive)) if archive.startswith(SYNC, i)]
    at = {"header": 12, "payload": frames[1] + 30, "sync": frames[1], "last": frames[-2] + 20}[where]
    damaged = bytearray(archive)
    damaged[at] ^= 16
    with pytest.raises(InputError):
        unpack_file(bytes(damaged))
    found, report = unpack_file(bytes(damaged), recover=True)
    lost = {"header": (), "payload": ((400, 800),), "sync": ((400, 800),), "last": ((1600, len(data)),)}[where]
    assert summary.blocks == 5 and report.lost == lost
    kept = bytearray(data)
    for start, end in lost:
        del kept[start:end]
    assert found == bytes(kept)


def test_recovery_of_a_torn_archive(no_plain, pack_file, unpack_file):
    archive, _ = pack_file(TEXT * 18)
    frames = [i for i in range(len(archive)) if archive.startswith(SYNC, i)]
    found, report = unpack_file(archive[: frames[3] + 9], recover=True)
    assert found == (TEXT * 18)[:1200] and report.lost == ((1200, len(TEXT * 18)),)


def test_a_block_of_another_archive_is_refused(no_plain, pack_file, unpack_file):
    archive, _ = pack_file(TEXT * 18)
    frames = [i for i in range(len(archive)) if archive.startswith(SYNC, i)]
    swapped = (
        archive[: frames[0]] + archive[frames[1] : frames[2]] + archive[frames[0] : frames[1]] + archive[frames[2] :]
    )
    with pytest.raises(DamagedError):
        unpack_file(swapped)


def test_wild_frames_are_refused():
    from tokenary.codec.container import read_frame

    for raw in (SYNC, SYNC + b"\x00" + b"\xff" * 40, SYNC + b"\x00" + varint(1 << 40) * 3 + bytes(4)):
        with pytest.raises(DamagedError):
            read_frame(io.BytesIO(raw))
    assert read_frame(io.BytesIO(bytes(Frame(1, 2, 3, b"abc")))) == Frame(1, 2, 3, b"abc")


def test_other_weights_are_refused(no_plain, pack_file):
    archive, _ = pack_file(TEXT * 6)
    with pytest.raises(InputError, match="weights"):
        decompress(io.BytesIO(archive), io.BytesIO(), lambda header: machine_of(header, toy_lm(1)))


def test_an_arithmetic_with_other_probabilities_is_refused(no_plain, pack_file, lm, monkeypatch):
    archive, _ = pack_file(TEXT * 3)
    logits = IntegerLlama.logits
    monkeypatch.setattr(IntegerLlama, "logits", lambda self, hidden: logits(self, hidden) * np.float32(1.01))
    with pytest.raises(InputError, match="does not give the probabilities"):
        decompress(io.BytesIO(archive), io.BytesIO(), lambda header: machine_of(header, lm))


# --------------------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def killed_at(limit):
    def progress(done, size):
        if done >= limit:
            raise Killed

    return progress


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_no_archive_and_resumes(no_plain, pack_file, lm, machine, tmp_path, workers):
    data, out = TEXT * 18, tmp_path / "k.tkz"
    whole, _ = pack_file(data)
    with pytest.raises(Killed):
        compress(io.BytesIO(data), out, lambda: (lm, machine), block=BLOCK, progress=killed_at(900), workers=workers)
    assert not out.exists()
    partial = tmp_path / "k.tkz.partial"
    with partial.open("ab") as stream:
        stream.write(whole[-30:-3])  # a torn frame
    summary = compress(io.BytesIO(data), out, lambda: (lm, machine), block=BLOCK, resume=True)
    assert out.read_bytes() == whole and not partial.exists()
    if workers == 1:  # of two, it depends on their pace how many blocks were whole
        assert summary.kept == 2


def test_only_the_same_run_is_resumed(no_plain, lm, make_machine, tmp_path):
    data, out = TEXT * 18, tmp_path / "k.tkz"
    with pytest.raises(InputError, match="nothing to resume"):
        compress(io.BytesIO(data), out, lambda: (lm, make_machine()), block=BLOCK, resume=True)
    with pytest.raises(Killed):
        compress(io.BytesIO(data), out, lambda: (lm, make_machine()), block=BLOCK, progress=killed_at(600))
    with pytest.raises(InputError, match="digest"):
        compress(io.BytesIO(data[::-1]), out, lambda: (lm, make_machine()), block=BLOCK, resume=True)
    with pytest.raises(InputError, match="codec"):
        compress(io.BytesIO(data), out, lambda: (lm, make_machine(rate=0.5)), block=BLOCK, resume=True)


# --------------------------------------------------------------------------------------------------- forecast


def test_a_forecast_is_near(no_plain, machine, pack_file):
    words = TEXT.split()
    data = b" ".join(random.Random(1).choices(words, k=900))
    found = estimate(io.BytesIO(data), lambda: machine)
    _, summary = pack_file(data, block=1 << 20)
    assert found.size == found.text == len(data) and found.sampled > 1000 and found.seconds > 0
    assert summary.coded and 0.6 * summary.packed < found.packed < 1.7 * summary.packed


def test_a_forecast_needs_no_model_where_none_is_used(pack_file):
    def refused():
        raise AssertionError("the model was loaded")

    for data in (NOISE, NOISE * 20 + TEXT[:64], b"", bytes(100_000), TEXT[:8] * 50_000):
        found = estimate(io.BytesIO(data), refused)
        _, summary = pack_file(data)
        assert not summary.coded and (found.size, found.packed) == (len(data), summary.packed)
        assert found.seconds == found.sampled == 0


def test_memory_holds_a_block_not_the_file(no_plain, pack_file, monkeypatch):
    largest = []
    original = files.encode_block
    monkeypatch.setattr(files, "encode_block", lambda data, *rest: largest.append(len(data)) or original(data, *rest))
    pack_file(TEXT * 20)
    assert max(largest) == BLOCK
