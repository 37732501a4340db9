"""Text that is always there (prompt sets, a piece of a novel, the interpreter's sources), and a user's own prompts."""

from __future__ import annotations

import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenary.core.errors import InputError, OptionError, UnknownNameError

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
FILES = Path(__file__).with_name("files")


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes
    ----------
    id : str
        Unique within its file.
    set : str
        ``chat, code, summarise, writing, french, german``; ``file`` for a user's own.
    workload : str
        ``friendly`` (much to copy or repeat), ``hostile`` (little), or ``unknown``.
    prompt : str
        The message.
    """

    id: str
    set: str
    workload: str
    prompt: str


def prompts(set: str | None = None, workload: str | None = None) -> list[Prompt]:
    """Return the prompts that ship with the package, in file order.

    Parameters
    ----------
    set, workload : str, optional
        Keep only these.

    Raises
    ------
    UnknownNameError
        No prompt has such a set or workload.
    """
    rows = read_prompts(FILES / "prompts.jsonl")
    for field, wanted in (("set", set), ("workload", workload)):
        known = {getattr(row, field) for row in rows}
        if wanted is not None and wanted not in known:
            raise UnknownNameError("prompt set" if field == "set" else "workload", wanted, known)
    return [row for row in rows if set in (None, row.set) and workload in (None, row.workload)]


def prose() -> str:
    """Return 100 kB of public-domain English prose: Moby-Dick, chapters 1 to 9."""
    return (FILES / "prose.txt").read_text(encoding="utf-8")


def stdlib_code(seed: int, n_bytes: int) -> str:
    """Return Python code: modules of the interpreter's own standard library, joined in an order drawn from the seed.

    Parameters
    ----------
    seed : int
        The same seed gives the same text on the same Python.
    n_bytes : int
        Most bytes (UTF-8); the text ends with a whole line.

    Raises
    ------
    OptionError
        ``n_bytes`` is below 1 or more than the library holds.
    InputError
        This Python carries no sources.
    """
    from tokenary.core.seeding import substream  # imports numpy

    if n_bytes < 1:
        raise OptionError("n_bytes", n_bytes, "at least 1")
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise InputError("this Python carries no sources of its standard library")
    text = b""
    for i in substream(seed, "stdlib_code").permutation(len(files)):
        code = files[i].read_bytes()
        if _is_utf8(code):
            text += code.rstrip() + b"\n\n\n" if code.strip() else b""
        if len(text) >= n_bytes:
            return text[: text.rfind(b"\n", 0, n_bytes) + 1].decode()
    raise OptionError("n_bytes", n_bytes, f"at most {len(text)}, all the code there is")


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a file of prompts: one a line, or JSONL with a key ``prompt`` (and optionally ``id, set, workload``).

    A file is JSONL when it is named ``.jsonl`` or its first line is a JSON object with that key. Empty lines are
    skipped.

    Raises
    ------
    InputError
        No such file, no prompt in it, a line that is not UTF-8 or not the JSON it should be; names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path.name}, line {number}: not UTF-8 (byte {error.start + 1})") from error
        if text:
            lines.append((number, text))
    if not lines:
        raise InputError(f"{path.name}: no prompt in the file")
    if path.suffix == ".jsonl" or "prompt" in _object(lines[0][1]):
        return [_prompt(path, number, text) for number, text in lines]
    return [Prompt(f"line-{number}", "file", "unknown", text) for number, text in lines]


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _prompt(path: Path, number: int, text: str) -> Prompt:
    row = _object(text)
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise InputError(f'{path.name}, line {number}: expected a JSON object with a text "prompt"')
    id_, set_, workload = row.get("id", f"line-{number}"), row.get("set", "file"), row.get("workload", "unknown")
    return Prompt(str(id_), str(set_), str(workload), row["prompt"])
