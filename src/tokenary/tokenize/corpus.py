"""A corpus cut into parts that can be read anywhere, in any order, and always hold the same texts.

A file is cut every `PART_BYTES` at the next line end (or, where a line is too long, at the next whole character), so
that a part depends on the file alone, not on who reads it. Lines that are not UTF-8 are skipped and counted.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokenary.core.errors import InputError

PART_BYTES = 4 << 20
LINE_BYTES = 1 << 20  # farther than this no line end is looked for
TEXT_BYTES = 1 << 14  # lines that are encoded as one text, where sentences do not matter

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """A piece of a corpus in one language.

    Attributes
    ----------
    language : str
        Name of the language, or of the file.
    path : str
        The file; empty where `sentences` hold the texts themselves.
    start, stop : int
        Bytes of the file.
    first_line : int or None
        Number of the first line, where line numbers name the sentences of a parallel corpus.
    sentences : tuple of (str, str)
        Key and text of each sentence, for a corpus that is held in memory.
    """

    language: str
    path: str = ""
    start: int = 0
    stop: int = 0
    first_line: int | None = None
    sentences: tuple[tuple[str, str], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of text, for progress."""
        return self.stop - self.start if self.path else sum(len(text) for _, text in self.sentences)


@dataclass(frozen=True)
class Skipped:
    """What of a part could not be used.

    Attributes
    ----------
    lines, nbytes : int
        Lines that are not UTF-8, and their bytes.
    empty : int
        Sentences without text.
    """

    lines: int = 0
    nbytes: int = 0
    empty: int = 0

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped(self.lines + other.lines, self.nbytes + other.nbytes, self.empty + other.empty)


def plan_texts(corpus: Mapping[str, Mapping[str, str]]) -> list[Part]:
    """Make one part of each language of a parallel corpus ``{language: {key: text}}``."""
    return [Part(language, sentences=tuple(sorted(texts.items()))) for language, texts in sorted(corpus.items())]


def plan_files(files: Iterable[str | os.PathLike[str]], parallel: bool = False) -> list[Part]:
    """Cut files into parts.

    Parameters
    ----------
    files : iterable of str
        Paths, or ``language=path``; a file's name without its ending is its language otherwise.
    parallel : bool
        Line i of every file says the same thing; the files must then have equally many lines.

    Raises
    ------
    InputError
        A file cannot be read, there is none, or parallel files differ in their number of lines.
    """
    parts: list[Part] = []
    lines: dict[str, int] = {}
    for item in files:
        language, path = _named(os.fspath(item))
        try:
            with path.open("rb") as stream:
                found, count = _cut(language, path, stream, parallel)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if parallel and language in lines:
            raise InputError(f"{path}: a second file of {language!r}; name the language with LANGUAGE=FILE")
        lines[language] = count
        parts += found
    if not lines:
        raise InputError("no text: give at least one file")
    if parallel and len(set(lines.values())) > 1:
        counted = ", ".join(f"{language} {count}" for language, count in sorted(lines.items()))
        raise InputError(f"parallel files must have as many lines as each other: {counted}")
    return parts


def _named(item: str) -> tuple[str, Path]:
    language, equals, path = item.partition("=")
    if equals and language and not Path(item).exists():
        return language, Path(path)
    return Path(item).stem, Path(item)


def _cut(language: str, path: Path, stream: BinaryIO, parallel: bool) -> tuple[list[Part], int]:
    about = os.fstat(stream.fileno())
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"{path} is no ordinary file: what is read twice, and anywhere, must be one")
    size = about.st_size
    borders = sorted({0, size, *(_border(stream, at, size) for at in range(PART_BYTES, size, PART_BYTES))})
    parts, lines = [], 0
    for start, stop in itertools.pairwise(borders if size else [0, 0]):  # an empty file is a part without text
        parts.append(Part(language, str(path.resolve()), start, stop, lines if parallel else None))
        if parallel:
            stream.seek(start)
            data = stream.read(stop - start)
            lines += data.count(b"\n") + (stop == size and not data.endswith(b"\n"))
    return parts, lines


def _border(stream: BinaryIO, at: int, size: int) -> int:
    """Where the part that should end at `at` really ends."""
    stream.seek(at - 1)
    ahead = stream.read(LINE_BYTES)
    end = ahead.find(b"\n")
    if end >= 0:
        return at + end
    if len(ahead) < LINE_BYTES:  # the last line
        return size
    for skip in range(1, 5):  # no continuation byte may begin a part
        if skip < len(ahead) and ahead[skip] & 0xC0 != 0x80:
            return at - 1 + skip
    return at - 1 + len(ahead)


def read(part: Part) -> tuple[list[tuple[str, str]], Skipped]:
    """Return key and text of everything in a part that can be used, in order.

    Raises
    ------
    InputError
        The file cannot be read, or changed since it was cut.
    """
    if not part.path:
        kept = [(key, text) for key, text in part.sentences if text.strip()]
        return kept, Skipped(empty=len(part.sentences) - len(kept))
    try:
        with open(part.path, "rb") as stream:
            stream.seek(part.start)
            data = stream.read(part.stop - part.start)
    except OSError as error:
        raise InputError(f"cannot read {part.path}: {error.strerror}") from None
    if len(data) != part.stop - part.start:
        raise InputError(f"{part.path} changed while it was read")
    if part.start == 0:
        data = data.removeprefix(_BOM)
    lines = data.split(b"\n")
    last = lines.pop()
    lines = [line + b"\n" for line in lines] + ([last] if last else [])
    if part.first_line is not None:
        return _sentences(lines, part.first_line)
    return _chunks(lines)


def _sentences(lines: Sequence[bytes], first: int) -> tuple[list[tuple[str, str]], Skipped]:
    texts, skipped = [], Skipped()
    for number, line in enumerate(lines, start=first):
        try:
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            skipped += Skipped(lines=1, nbytes=len(line))
            continue
        if text.strip():
            texts.append((f"{number:09d}", text))
        else:
            skipped += Skipped(empty=1)
    return texts, skipped


def _chunks(lines: Sequence[bytes]) -> tuple[list[tuple[str, str]], Skipped]:
    """Neighbouring lines together, so that a tokenizer sees line ends in their place."""
    texts: list[tuple[str, str]] = []
    skipped, chunk, size = Skipped(), list[str](), 0
    for line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError:
            skipped += Skipped(lines=1, nbytes=len(line))
            text = ""
        if chunk and (not text or size + len(line) > TEXT_BYTES):
            texts.append(("", "".join(chunk)))
            chunk, size = [], 0
        if text:
            chunk.append(text)
            size += len(line)
    if chunk:
        texts.append(("", "".join(chunk)))
    return texts, skipped
