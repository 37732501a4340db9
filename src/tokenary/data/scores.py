"""Printed music as notes: the part of MusicXML that says which pitch sounds when."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree

from tokenary.core.errors import InputError
from tokenary.data.sources import locate

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


class Note(NamedTuple):
    """Start and length in quarter notes from the beginning, and MIDI pitch (60 is middle C)."""

    start: float
    length: float
    pitch: int


def bach_chorales(count: int | None = None) -> list[list[Note]]:
    """Return chorales of J. S. Bach, each as its notes in the order of their starts, high ones first.

    Parameters
    ----------
    count : int, optional
        Only so many, evenly spaced over the collection.
    """
    with zipfile.ZipFile(locate("bach-chorales")) as corpus:
        names = sorted(n for n in corpus.namelist() if n.startswith("music21/corpus/bach/") and n.endswith(".mxl"))
        step = len(names) / (len(names) if count is None else min(count, len(names)))
        chosen = [names[int(i * step)] for i in range(round(len(names) / step))]
        return [read_mxl(corpus.read(name)) for name in chosen]


def read_mxl(data: bytes) -> list[Note]:
    """Read a compressed MusicXML score in parts; tied notes are one, grace notes and repeats are left out.

    Raises
    ------
    InputError
        If it is no such file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as box:
            container = ElementTree.fromstring(box.read("META-INF/container.xml"))
            name = next(item.get("full-path", "") for item in container.iter() if item.tag.endswith("rootfile"))
            root = ElementTree.fromstring(box.read(name))
    except (zipfile.BadZipFile, KeyError, StopIteration, ElementTree.ParseError) as error:
        raise InputError("not a compressed MusicXML score") from error
    notes = [note for part in root.iter("part") for note in _notes(part)]
    return sorted(notes, key=lambda note: (note.start, -note.pitch))


def _notes(part: ElementTree.Element) -> Iterator[Note]:
    """Yield the notes of one part."""
    at, chord, divisions = 0.0, 0.0, 1.0
    tied: dict[int, Note] = {}
    for item in part.iterfind("measure/*"):
        divisions = float(item.findtext("divisions") or divisions)
        length = float(item.findtext("duration") or 0) / divisions
        if item.tag in ("backup", "forward"):
            at += length if item.tag == "forward" else -length
        if item.tag != "note" or not length:
            continue
        if item.find("chord") is None:
            chord, at = at, at + length
        pitch = item.find("pitch")
        if pitch is None:  # a rest
            continue
        key = _STEPS[pitch.findtext("step", "")] + int(float(pitch.findtext("alter") or 0))
        key += 12 * (int(pitch.findtext("octave", "")) + 1)
        ties = {tie.get("type") for tie in item.iterfind("tie")}
        note = Note(chord, length, key)
        if "stop" in ties and key in tied:
            begun = tied.pop(key)
            note = begun._replace(length=note.start + length - begun.start)
        if "start" in ties:
            tied[key] = note
        else:
            yield note
    yield from tied.values()
