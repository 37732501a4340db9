"""Files in, archives out, and back: block by block, in bounded memory, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from tokenary.codec.base import Reader, TextCodec
from tokenary.codec.blocks import Machine, decode_block, encode_block
from tokenary.codec.container import (
    COPY,
    STREAM,
    DamagedError,
    Frame,
    Header,
    frame_size,
    frames,
    read_frame,
    whole_frames,
)
from tokenary.codec.plain import packer, sizes, unpack_stream
from tokenary.codec.spelling import Spelling, text_bytes
from tokenary.core.errors import InputError
from tokenary.models.lm import LM

T = TypeVar("T")
#: Bytes of the original that are done, and bytes of the archive so far.
Progress = Callable[[float, int], None]
_PIECE = 1 << 20
#: A file with a smaller share of text, or that packs plainly to a smaller share, goes without the model.
_TEXT_SHARE, _HOPELESS = 0.02, 0.03


@dataclass(frozen=True)
class Summary:
    """What became of a file.

    Attributes
    ----------
    size, packed : int
        Bytes of the original and of the archive.
    coded : bool
        Whether a model was used; else the whole file is one plain stream.
    blocks, kept : int
        Blocks, and how many of them an earlier run had already written.
    lost : tuple of (int, int)
        Spans of the original that a recovery could not bring back.
    """

    size: int
    packed: int
    coded: bool
    blocks: int = 0
    kept: int = 0
    lost: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Plain:
    """What comes of a file without a model.

    Attributes
    ----------
    header : Header
        Of the archive, with the packing that gives the fewest bytes.
    packed : int
        Bytes of that archive.
    text : int
        Bytes of the original in runs of text.
    enough : bool
        A model is not worth while: there is hardly any text, or hardly anything is left.
    """

    header: Header
    packed: int
    text: int
    enough: bool


def without_model(source: IO[bytes]) -> Plain:
    """Measure a file, and what plain packing makes of it."""
    size, digest = measure(source)
    packed = sizes(lambda: _pieces(source), size)
    method = min(range(len(packed)), key=packed.__getitem__)
    text = sum(map(text_bytes, _pieces(source)))
    header = Header(size, digest, method)
    lengths = [_PIECE] * (packed[method] // _PIECE) + [packed[method] % _PIECE] if size else []
    total = len(bytes(header)) + sum(frame_size(index, 0, length) for index, length in enumerate(lengths))
    enough = text < _TEXT_SHARE * size or not size or packed[method] < _HOPELESS * size
    return Plain(header, total, text, enough)


def machine_for(lm: LM, codec: TextCodec, reader: Reader) -> Machine:
    """Put a model, its vocabulary and a method together."""
    start = getattr(lm.tokenizer, "bos_token_id", None) or 0
    return Machine(Spelling(lm), reader, codec, start)


def header_for(source: IO[bytes], lm: LM, machine: Machine, block: int) -> Header:
    """Describe a file that is to be coded with a model."""
    size, digest = measure(source)
    codec, reader = machine.codec.spec(), machine.reader.name
    return Header(size, digest, -1, lm.name, reader, codec, bytes.fromhex(lm.fingerprint)[:16], machine.check(), block)


def measure(source: IO[bytes]) -> tuple[int, bytes]:
    """Return the size of a file and the first 8 bytes of its sha256."""
    digest, size = hashlib.sha256(), 0
    for piece in _pieces(source):
        digest.update(piece)
        size += len(piece)
    return size, digest.digest()[:8]


# ---------------------------------------------------------------------------------------------------- compress


def compress(
    source: IO[bytes],
    out: Path,
    prepare: Callable[[], tuple[LM, Machine]],
    *,
    block: int = 1 << 18,
    workers: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Compress a file that can seek into an archive, which appears whole or not at all.

    Parameters
    ----------
    source : binary file
        The original.
    out : Path
        The archive. Until it is whole, it is `out` with ``.partial`` behind its name.
    prepare : callable
        Loads the model; called only where a model is worth while.
    block : int
        Bytes that are coded independently of all others.
    workers : int
        Blocks at once; the archive does not depend on it.
    resume : bool
        Go on where an earlier run of the same file with the same options broke off.
    progress : callable, optional
        Told the bytes that are done and the size of the archive so far.

    Raises
    ------
    InputError
        There is nothing to resume, or another file or other options left it.
    """
    plain, partial = without_model(source), out.with_name(out.name + ".partial")
    size = plain.header.size
    if plain.enough:
        return _compress_plainly(source, partial, out, plain.header)
    lm, machine = prepare()
    header = header_for(source, lm, machine, block)
    with _continue(partial, header) if resume else partial.open("w+b") as stream:
        kept = _whole_blocks(stream, header) if resume else 0
        if not kept:
            stream.seek(0)
            stream.truncate()
            stream.write(bytes(header))
        blocks = _encode_blocks(source, stream, header, machine, kept, workers, progress)
        if blocks > 1:
            stream.write(bytes(Frame(COPY, blocks, 0, bytes(header))))
        total = stream.tell()
    if plain.packed < total:
        return _compress_plainly(source, partial, out, plain.header)
    os.replace(partial, out)
    return Summary(size, total, True, blocks, kept)


def _compress_plainly(source: IO[bytes], partial: Path, out: Path, header: Header) -> Summary:
    made = packer(header.method, header.size)
    with partial.open("wb") as stream:
        stream.write(bytes(header))
        waiting, index = b"", 0
        for piece in _pieces(source):
            waiting += made.compress(piece)
            while len(waiting) >= _PIECE:
                stream.write(bytes(Frame(STREAM, index, 0, waiting[:_PIECE])))
                waiting, index = waiting[_PIECE:], index + 1
        waiting += made.flush()
        if header.size:
            stream.write(bytes(Frame(STREAM, index, 0, waiting)))
        total = stream.tell()
    os.replace(partial, out)
    return Summary(header.size, total, False)


def _continue(partial: Path, header: Header) -> IO[bytes]:
    try:
        stream = partial.open("r+b")
    except FileNotFoundError:
        raise InputError(f"nothing to resume: there is no {partial}") from None
    try:
        found = Header.read(stream)
    except DamagedError:
        return stream  # broke off within the header: begin anew
    if differ := found.differences(header):
        stream.close()
        raise InputError(f"{partial} was begun with another file or other options: {', '.join(differ)} differ")
    return stream


def _whole_blocks(stream: IO[bytes], header: Header) -> int:
    """Count the blocks that an earlier run wrote, and cut off what follows them."""
    at, count = len(bytes(header)), 0
    stream.seek(at)
    with contextlib.suppress(DamagedError):
        for frame in frames(stream, at):
            if frame.index != count or frame.kind == COPY:
                break
            at, count = at + len(bytes(frame)), count + 1
    stream.seek(at)
    stream.truncate()
    return count


def _encode_blocks(
    source: IO[bytes],
    stream: IO[bytes],
    header: Header,
    machine: Machine,
    first: int,
    workers: int,
    progress: Progress | None,
) -> int:
    count = -(-header.size // header.block)
    meter = _Meter(progress, min(first * header.block, header.size), stream.tell())

    def jobs() -> Iterator[Callable[[], tuple[int, bytes, int]]]:
        for index in range(first, count):
            source.seek(index * header.block)
            data = source.read(header.block)
            told = meter.of(index, len(data))
            yield lambda data=data, told=told: (*encode_block(data, machine, told), len(data))  # type: ignore[misc]

    for index, (kind, payload, size) in enumerate(_in_order(jobs(), workers, meter), start=first):
        stream.write(bytes(Frame(kind, index, size, payload)))
        stream.flush()
        meter.finish(index, size, stream.tell())
    return count


# -------------------------------------------------------------------------------------------------- decompress


def decompress(
    source: IO[bytes],
    sink: IO[bytes],
    prepare: Callable[[Header], Machine],
    *,
    workers: int = 1,
    recover: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Write the original of an archive to `sink`; every frame is checked before its bytes are written.

    Parameters
    ----------
    source : binary file
        The archive; with `recover` it must be able to seek.
    sink : binary file
        Receives the original.
    prepare : callable
        Loads what the header names, or refuses it.
    workers : int
        Blocks at once.
    recover : bool
        Write every block that is whole, instead of stopping at the first fault; see ``lost`` of the summary.
    progress : callable, optional
        Told the bytes that are done.

    Raises
    ------
    DamagedError
        The archive is cut off or changed.
    """
    header, at = _header(source, recover)
    if header.method >= 0:
        return _decompress_plainly(source, sink, header, at, recover)
    machine = prepare(header)
    found = whole_frames(source, at) if recover else frames(source, at)
    digest, count, done, lost = hashlib.sha256(), 0, 0, []
    meter = _Meter(progress, 0, at)
    blocks = -(-header.size // header.block) if header.block else 0

    def jobs() -> Iterator[Callable[[], tuple[int, int, bytes | None]]]:
        expected = 0
        for frame in found:
            if frame.kind == COPY:
                right = blocks > 1 and frame.payload == bytes(header)
                if not recover and not (right and frame.index == expected == blocks):
                    raise DamagedError(f"the archive ends after {expected} of {blocks} blocks")
                expected += 1
                continue
            if not recover and frame.index != expected:
                raise DamagedError(f"block {frame.index} stands where block {expected} should")
            if frame.index >= blocks or frame.size != min(header.block, header.size - frame.index * header.block):
                raise DamagedError(f"block {frame.index} does not belong to this archive")
            expected = frame.index + 1
            told = meter.of(frame.index, frame.size)
            yield lambda frame=frame, told=told: (  # type: ignore[misc]
                frame.index,
                frame.size,
                _decoded(frame, machine, told, recover),
            )
        if not recover and expected != blocks + (blocks > 1):
            raise DamagedError(f"the archive ends after {min(expected, blocks)} of {blocks} blocks")

    for index, size, data in _in_order(jobs(), workers, meter):
        if data is None or index < count:
            continue
        lost += [] if index == count else [(done, index * header.block)]
        sink.write(data)
        digest.update(data)
        count, done = index + 1, index * header.block + size
        meter.finish(index, size, 0)
    if done < header.size:
        lost.append((done, header.size))
    if not lost and digest.digest()[:8] != header.digest:
        raise DamagedError("the whole does not match its checksum")
    return Summary(header.size, 0, True, blocks, 0, tuple(lost))


def _decoded(frame: Frame, machine: Machine, told: Callable[[float, int], None], recover: bool) -> bytes | None:
    try:
        return decode_block(frame.kind, frame.payload, frame.size, machine, told)
    except InputError as error:
        if recover:
            return None
        raise DamagedError(f"block {frame.index}: {error}") from error


def _header(source: IO[bytes], recover: bool) -> tuple[Header, int]:
    """Read the header; where it is damaged, a recovery takes the copy at the end."""
    try:
        header = Header.read(source)
        return header, len(bytes(header))
    except InputError:
        if not recover:
            raise
        copies = [frame for frame in whole_frames(source, 0) if frame.kind == COPY]
        if not copies:
            raise
        import io

        return Header.read(io.BytesIO(copies[-1].payload)), 0


def _decompress_plainly(source: IO[bytes], sink: IO[bytes], header: Header, at: int, recover: bool) -> Summary:
    digest, done, expected = hashlib.sha256(), 0, 0

    def payloads() -> Iterator[bytes]:
        nonlocal at, expected
        while (frame := read_frame(source, at)) is not None:
            if frame.kind != STREAM or frame.index != expected:
                raise DamagedError(f"frame {frame.index} stands where frame {expected} should")
            at, expected = at + len(bytes(frame)), expected + 1
            yield frame.payload

    try:
        for piece in unpack_stream(header.method, payloads(), header.size):
            sink.write(piece)
            digest.update(piece)
            done += len(piece)
        if not header.size and source.read(1):
            raise DamagedError("something follows the end of the archive")
        if done != header.size or digest.digest()[:8] != header.digest:
            raise DamagedError(f"the archive holds {done} of {header.size} bytes, or others")
    except InputError:
        if not recover:
            raise
    lost = ((done, header.size),) if done < header.size else ()
    return Summary(header.size, at, False, 0, 0, lost)


# ----------------------------------------------------------------------------------------------------- helpers


class Cancelled(Exception):
    """Another block failed, or the user broke off."""


class _Meter:
    """Adds up the progress of blocks that are under way at the same time."""

    def __init__(self, progress: Progress | None, done: int, size: int) -> None:
        self.progress, self.done, self.size = progress, float(done), size
        self.cancelled = threading.Event()
        self._under_way: dict[int, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def of(self, index: int, size: int) -> Callable[[float, int], None]:
        """Return the callback of one block."""

        def told(share: float, coded: int) -> None:
            if self.cancelled.is_set():
                raise Cancelled
            with self._lock:
                self._under_way[index] = (share * size, coded)
                self._tell()

        return told

    def finish(self, index: int, size: int, total: int) -> None:
        """Say that a block is written, and how long the archive is now."""
        with self._lock:
            self._under_way.pop(index, None)
            self.done += size
            self.size = total
            self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            under_way = self._under_way.values()
            self.progress(self.done + sum(done for done, _ in under_way), self.size + sum(c for _, c in under_way))


def _in_order(jobs: Iterator[Callable[[], T]], workers: int, meter: _Meter) -> Iterator[T]:
    """Run jobs, some at once, and yield their results in order; never more results wait than there are workers."""
    if workers == 1:
        for job in jobs:
            yield job()
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            meter.cancelled.set()
            for future in waiting:
                future.cancel()
            raise


def _pieces(source: IO[bytes]) -> Iterator[bytes]:
    source.seek(0)
    while piece := source.read(_PIECE):
        yield piece
