"""One block of a file: its text as lanes of coded tokens, the rest packed without a model."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from tokenary.codec.base import Reader, TextCodec
from tokenary.codec.container import CODED, PLAIN, Bytes, DamagedError, varint
from tokenary.codec.lockstep import cut, decode, encode, lane_lengths
from tokenary.codec.plain import pack, unpack
from tokenary.codec.spelling import Segment, Spelling

#: Share of a block that is done, and bytes so far.
Progress = Callable[[float, int], None]
#: A block that packs plainly to less than this share is not worth the model.
_HOPELESS = 0.03


@dataclass(frozen=True)
class Machine:
    """Everything that turns text into bits: vocabulary, model, method.

    Attributes
    ----------
    spelling : Spelling
        Bytes to tokens.
    reader : Reader
        The model.
    codec : TextCodec
        The method.
    start : int
        Token that every lane begins behind.
    """

    spelling: Spelling
    reader: Reader
    codec: TextCodec
    start: int

    def check(self) -> bytes:
        """Code a fixed text and return its checksum: it differs wherever probabilities would."""
        tokens = [(number * 7919 + 13) % self.reader.vocab_size for number in range(24)]
        lanes = self.codec.open(self.reader, 2)
        coded = encode(lanes, self.codec.ensemble(self.reader.vocab_size, 2), cut(tokens, 2), self.start)
        return struct.pack("<I", zlib.crc32(b"".join(coded)))


def encode_block(data: bytes, machine: Machine, progress: Progress | None = None) -> tuple[int, bytes]:
    """Return the kind of frame and the payload that hold a block in fewest bytes."""
    method, packed = pack(data)
    plain = bytes([method]) + packed
    if len(packed) < _HOPELESS * len(data):
        return PLAIN, plain
    segments = machine.spelling.segments(data)
    if not any(segment.text for segment in segments):
        return PLAIN, plain
    coded = _encode(data, segments, machine, progress)
    return (CODED, coded) if len(coded) < len(plain) else (PLAIN, plain)


def _encode(data: bytes, segments: list[Segment], machine: Machine, progress: Progress | None) -> bytes:
    table = b"".join(varint(len(segment.data)) for segment in segments)
    binary = b"".join(segment.data for segment in segments if not segment.text)
    tokens = [token for segment in segments for token in segment.tokens]
    count = machine.codec.lanes_for(len(tokens))
    lanes = machine.codec.open(machine.reader, count)
    coded = encode(
        lanes,
        machine.codec.ensemble(machine.reader.vocab_size, count),
        cut(tokens, count),
        machine.start,
        None if progress is None else lambda done, size: progress(done / len(tokens), size),
    )
    head = bytes([segments[0].text]) + _packed(table) + _packed(binary) + varint(len(tokens)) + varint(count)
    ends = b"".join(varint(len(lane)) for lane in coded)
    return head + ends + b"".join(coded) + struct.pack("<I", zlib.crc32(data))


def decode_block(kind: int, payload: bytes, size: int, machine: Machine, progress: Progress | None = None) -> bytes:
    """Return the bytes of a block.

    Raises
    ------
    DamagedError
        What comes out is not what went in.
    """
    view = Bytes(payload)
    if kind == PLAIN:
        return unpack(view.take(1)[0], payload[1:], size)
    if kind != CODED:
        raise DamagedError(f"unknown kind of frame {kind}")
    text = bool(view.take(1)[0])
    table, binary = Bytes(_unpacked(view)), Bytes(_unpacked(view))
    total, count = view.varint(), view.varint()
    if not 0 < count <= max(total, 1) <= max(size, 1):
        raise DamagedError("a block claims more tokens than bytes")
    lanes = [view.take(length) for length in [view.varint() for _ in range(count)]]
    texts = decode(
        machine.codec.open(machine.reader, count),
        machine.codec.ensemble(machine.reader.vocab_size, count),
        lane_lengths(total, count),
        lanes,
        machine.start,
        None if progress is None else lambda done, coded: progress(done / max(total, 1), coded),
    )
    spelled = Bytes(machine.spelling.decode([token for lane in texts for token in lane]))
    out = bytearray()
    while table.at < len(table.data):
        out += (spelled if text else binary).take(table.varint())
        text = not text
    if len(out) != size or zlib.crc32(out) != struct.unpack("<I", view.take(4))[0]:
        raise DamagedError("a block does not decode to its checksum: another arithmetic or another model wrote it")
    return bytes(out)


def _packed(data: bytes) -> bytes:
    method, packed = pack(data)
    return bytes([method]) + varint(len(data)) + varint(len(packed)) + packed


def _unpacked(view: Bytes) -> bytes:
    method, size = view.take(1)[0], view.varint()
    return unpack(method, view.take(view.varint()), size)
