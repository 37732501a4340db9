"""A corpus in parts: the same texts whoever reads them, and nothing lost unsaid."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import InputError
from tokenary.tokenize import corpus
from tokenary.tokenize.corpus import Skipped, plan_files, plan_texts, read

LINES = st.lists(st.text(alphabet=st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 16)
    monkeypatch.setattr(corpus, "LINE_BYTES", 24)
    monkeypatch.setattr(corpus, "TEXT_BYTES", 12)


def whole(files, parallel=False):
    rows, skipped = [], Skipped()
    for part in plan_files(files, parallel):
        found, lost = read(part)
        rows += found
        skipped += lost
    return rows, skipped


@settings(max_examples=200, deadline=None)
@given(lines=LINES, end=st.booleans())
def test_the_parts_hold_the_file(tmp_path_factory, lines, end):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    text = "\n".join(lines) + ("\n" if end else "")
    path.write_bytes(text.encode())
    sizes = corpus.PART_BYTES, corpus.LINE_BYTES, corpus.TEXT_BYTES
    try:
        corpus.PART_BYTES, corpus.LINE_BYTES, corpus.TEXT_BYTES = 16, 24, 12
        parts = plan_files([path])
        rows, skipped = whole([path])
        lines_of, _ = whole([path], parallel=True)
    finally:
        corpus.PART_BYTES, corpus.LINE_BYTES, corpus.TEXT_BYTES = sizes
    assert "".join(found for _, found in rows) == text.removeprefix("\ufeff") and not skipped.lines
    assert parts[0].start == 0 and parts[-1].stop == len(text.encode())
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    joined = {}
    for key, line in lines_of:
        joined[int(key)] = joined.get(int(key), "") + line
    # A long line that is cut between two parts comes in pieces of one key; a piece of white space alone says nothing.
    expected = {i: line for i, line in enumerate(text.removeprefix("\ufeff").split("\n")) if line.strip()}
    assert joined.keys() <= expected.keys()
    for i, line in expected.items():
        if len(line.encode()) < 16:
            assert joined[i] == line.removesuffix("\r")


def test_lines_that_are_not_utf8_are_counted(tmp_path, small_parts):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\n\xff\xfe bad\nsecond\nthird \xc3\n" + "é\n".encode())
    rows, skipped = whole([path])
    assert "".join(text for _, text in rows) == "first\nsecond\né\n"
    assert (skipped.lines, skipped.nbytes) == (2, len(b"\xff\xfe bad\n") + len(b"third \xc3\n"))
    rows, skipped = whole([path], parallel=True)
    assert rows == [("000000000", "first"), ("000000002", "second"), ("000000004", "é")] and skipped.lines == 2


def test_an_empty_file_is_a_part_without_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (part,) = plan_files([tmp_path / "a.txt"])
    assert part.language == "a" and read(part) == ([], Skipped())


def test_languages_are_named_by_the_user_or_the_file(tmp_path):
    for name in ("en.txt", "x=y.txt"):
        (tmp_path / name).write_text("a\n")
    named = plan_files([f"deu={tmp_path / 'en.txt'}", str(tmp_path / "en.txt"), str(tmp_path / "x=y.txt")])
    assert [part.language for part in named] == ["deu", "en", "x=y"]


def test_parallel_files_must_fit(tmp_path):
    for name, lines in (("a", 3), ("b", 2), ("c", 3)):
        (tmp_path / name).write_text("x\n" * lines)
    with pytest.raises(InputError, match="a 3, b 2"):
        plan_files([tmp_path / "a", tmp_path / "b"], parallel=True)
    with pytest.raises(InputError, match="second file"):
        plan_files([tmp_path / "a", tmp_path / "a"], parallel=True)
    assert len(plan_files([tmp_path / "a", tmp_path / "c"], parallel=True)) == 2
    (tmp_path / "c").write_text("x\nx\nx")
    assert len(plan_files([tmp_path / "a", tmp_path / "c"], parallel=True)) == 2


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no text"):
        plan_files([])
    with pytest.raises(InputError, match="No such file"):
        plan_files([tmp_path / "none.txt"])
    with pytest.raises(InputError, match="cannot read"):
        plan_files([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(InputError, match="no ordinary file"):
        plan_files([tmp_path / "pipe"])
    os.close(writer)
    (tmp_path / "a").write_text("some text\n")
    (part,) = plan_files([tmp_path / "a"])
    (tmp_path / "a").write_text("some")
    with pytest.raises(InputError, match="changed while"):
        read(part)


def test_texts_in_memory():
    parts = plan_texts({"b": {"1": "x", "0": "y"}, "a": {"0": " "}})
    assert [part.language for part in parts] == ["a", "b"]
    assert read(parts[0]) == ([], Skipped(empty=1)) and read(parts[1]) == ([("0", "y"), ("1", "x")], Skipped())
