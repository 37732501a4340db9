"""The bytes of an archive: a header, then frames that can be checked, and found again, one by one.

docs/codec.md specifies the format for other implementations.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import IO

from tokenary.core.errors import InputError

MAGIC = b"\x93TKZ\x02"
SYNC = b"\xf5TkB"
SUFFIX = ".tkz"
#: Kinds of frames: a part of one plain stream over the whole file; a block packed plainly; a block with coded text; the
#: header once more.
STREAM, PLAIN, CODED, COPY = range(4)
#: No frame's payload, and no block, is larger.
LARGEST = 1 << 26
_DIGEST = 8
_LONGEST_HEADER = 4096


class DamagedError(InputError):
    """An archive is cut off or changed; the text says where."""


@dataclass(frozen=True)
class Header:
    """What a decoder must know before the first frame.

    Attributes
    ----------
    size : int
        Bytes of the original.
    digest : bytes
        First 8 bytes of its sha256.
    method : int
        Of the plain stream, where the whole file is one; -1 where a model codes.
    model, backend, codec : str
        The model's name, the arithmetic that made the probabilities, the method with its options.
    fingerprint : bytes
        First 16 bytes of the sha256 of the weights.
    check : bytes
        4 bytes: checksum of what this arithmetic makes of a fixed text.
    block : int
        Bytes of every block but the last.
    """

    size: int
    digest: bytes
    method: int = -1
    model: str = ""
    backend: str = ""
    codec: str = ""
    fingerprint: bytes = bytes(16)
    check: bytes = bytes(4)
    block: int = 0

    def __bytes__(self) -> bytes:
        """Return the header as it stands in a file."""
        body = bytes([self.method + 1]) + varint(self.size) + self.digest
        if self.method < 0:
            for text in (self.model, self.backend, self.codec):
                body += varint(len(text.encode())) + text.encode()
            body += self.fingerprint + self.check + varint(self.block)
        return _checked(MAGIC + varint(len(body)) + body)

    @classmethod
    def read(cls, stream: IO[bytes]) -> Header:
        """Read the header.

        Raises
        ------
        InputError
            The file is no archive of this version.
        DamagedError
            It is, but the header is cut off or changed.
        """
        start = stream.read(len(MAGIC))
        if len(start) == len(MAGIC) and start[:-1] == MAGIC[:-1] and start != MAGIC:
            raise InputError(f"the archive is of version {start[-1]} of the format; this program reads {MAGIC[-1]}")
        if start != MAGIC:
            raise InputError("not an archive of `tokenary compress`" if start else "the archive is empty")
        length, raw = _read_varint(stream)
        if length > _LONGEST_HEADER:
            raise DamagedError("the header is damaged")
        body = _exactly(stream, length, "header")
        if zlib.crc32(MAGIC + raw + body) != struct.unpack("<I", _exactly(stream, 4, "header"))[0]:
            raise DamagedError("the header is damaged")
        view = Bytes(body)
        method = view.take(1)[0] - 1
        size, digest = view.varint(), view.take(_DIGEST)
        if method >= 0:
            return cls(size, digest, method)
        texts = [view.take(view.varint()).decode() for _ in range(3)]
        return cls(size, digest, -1, texts[0], texts[1], texts[2], view.take(16), view.take(4), view.varint())

    def differences(self, other: Header) -> list[str]:
        """Names of the fields in which two headers differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Frame:
    """One part of an archive.

    Attributes
    ----------
    kind : int
        `STREAM`, `PLAIN`, `CODED` or `COPY`.
    index : int
        Its number, from 0.
    size : int
        Bytes of the original that it stands for; 0 of a `STREAM` frame and of a `COPY`.
    payload : bytes
        Its content.
    at : int
        Where it was found in the archive.
    """

    kind: int
    index: int
    size: int
    payload: bytes
    at: int = field(default=0, compare=False)

    def __bytes__(self) -> bytes:
        """Return the frame as it stands in a file."""
        head = bytes([self.kind]) + varint(self.index) + varint(self.size) + varint(len(self.payload))
        return SYNC + _checked(head) + _checked(self.payload)


def frame_size(index: int, size: int, length: int) -> int:
    """Return the bytes of a frame with a payload of so many."""
    return len(SYNC) + 1 + len(varint(index)) + len(varint(size)) + len(varint(length)) + 4 + length + 4


class Bytes:
    """Reads a byte string from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes.

        Raises
        ------
        DamagedError
            If there are fewer.
        """
        if count < 0 or self.at + count > len(self.data):
            raise DamagedError("a field reaches past its end")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        """Return the next number, seven bits a byte, low bits first."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise DamagedError("a number is too long")


def varint(value: int) -> bytes:
    """Write a number, seven bits a byte, low bits first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_frame(stream: IO[bytes], at: int = 0) -> Frame | None:
    """Read the next frame; None at the end of the file.

    Raises
    ------
    DamagedError
        It is cut off, or does not match its checksums.
    """
    start = stream.read(len(SYNC))
    if not start:
        return None
    if start != SYNC:
        raise DamagedError(f"no frame begins at byte {at}")
    kind = _exactly(stream, 1, "frame")
    numbers, raw = [], kind
    for _ in range(3):
        value, more = _read_varint(stream)
        numbers.append(value)
        raw += more
    index, size, length = numbers
    if zlib.crc32(raw) != struct.unpack("<I", _exactly(stream, 4, "frame"))[0]:
        raise DamagedError(f"the head of the frame at byte {at} is damaged")
    if length > LARGEST or size > LARGEST:
        raise DamagedError(f"the frame at byte {at} claims {length} bytes")
    payload = _exactly(stream, length, f"frame {index}")
    if zlib.crc32(payload) != struct.unpack("<I", _exactly(stream, 4, f"frame {index}"))[0]:
        raise DamagedError(f"frame {index} at byte {at} is damaged")
    return Frame(kind[0], index, size, payload, at)


def frames(stream: IO[bytes], at: int) -> Iterator[Frame]:
    """Yield the frames of an archive from byte `at` on, as many as follow without fault.

    Raises
    ------
    DamagedError
        At the first fault.
    """
    while (frame := read_frame(stream, at)) is not None:
        yield frame
        at += len(bytes(frame))


def whole_frames(stream: IO[bytes], at: int) -> Iterator[Frame]:
    """Yield every frame that is whole, from byte `at` of a file that can seek; skip what is damaged."""
    while True:
        stream.seek(at)
        try:
            frame = read_frame(stream, at)
        except DamagedError:
            at = _find(stream, at + 1)
            if at < 0:
                return
            continue
        if frame is None:
            return
        yield frame
        at += len(bytes(frame))


def _find(stream: IO[bytes], at: int) -> int:
    """Where the next `SYNC` stands, or -1."""
    stream.seek(at)
    tail = b""
    while piece := stream.read(1 << 20):
        found = (tail + piece).find(SYNC)
        if found >= 0:
            return at - len(tail) + found
        at += len(piece)
        tail = (tail + piece)[-len(SYNC) + 1 :]
    return -1


def _checked(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def _exactly(stream: IO[bytes], count: int, what: str) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise DamagedError(f"the archive ends within its {what}")
    return data


def _read_varint(stream: IO[bytes]) -> tuple[int, bytes]:
    raw = b""
    while len(raw) < 10:
        raw += _exactly(stream, 1, "frame")
        if raw[-1] < 128:
            return Bytes(raw).varint(), raw
    raise DamagedError("a number is too long")
