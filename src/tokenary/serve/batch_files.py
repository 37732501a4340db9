"""The two files of a batch: requests, a line each, and answers, a line each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenary.core.errors import InputError
from tokenary.serve.errors import ApiError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Row:
    """A line of the file of requests.

    Parameters
    ----------
    id : str
        Its number and a digest of it; names its answer.
    custom_id : str
        What the line calls itself; ``line-N`` where it does not.
    url : str
        The route that its body is for.
    body : object
        What it asks for; not checked yet.
    fault : ApiError or None
        What is wrong with the line itself.
    """

    id: str
    custom_id: str
    url: str
    body: Any
    fault: ApiError | None


def read_rows(source: Path, salt: str, most: int) -> Iterator[Row]:
    """Read the lines of a file of requests; blank ones are none.

    Parameters
    ----------
    source : Path
        The file.
    salt : str
        Options that change the answers; part of the digest.
    most : int
        Bytes of a line.

    Raises
    ------
    InputError
        If there is no such file.
    """
    seen: dict[str, int] = {}
    for number, (line, digest) in enumerate(_lines(source, salt, most), start=1):
        if line is not None and not line.strip():
            continue
        row = _row(line, number, f"{number}-{digest}", most)
        if (first := seen.setdefault(row.custom_id, number)) != number and row.fault is None:
            fault = ApiError(422, f"the line {first} has this custom_id already", "custom_id")
            row = Row(row.id, row.custom_id, row.url, row.body, fault)
        yield row


def _lines(source: Path, salt: str, most: int) -> Iterator[tuple[bytes | None, str]]:
    """Yield each line, None for one that is too long, and its digest."""
    try:
        with source.open("rb") as stream:
            while line := stream.readline(most + 1):
                digest = hashlib.sha256(salt.encode() + b"\n" + line.rstrip(b"\r\n"))
                more = line
                while not more.endswith(b"\n") and (more := stream.readline(_CHUNK)):
                    digest.update(more.rstrip(b"\r\n"))
                yield line if len(line) <= most else None, digest.hexdigest()[:12]
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from None


def _row(line: bytes | None, number: int, id: str, most: int) -> Row:
    """Take a line apart."""
    custom_id = f"line-{number}"
    try:
        if line is None:
            raise ApiError(413, f"a line may have {most} bytes")
        given = _json(line)
        if isinstance(given.get("custom_id"), str):
            custom_id = given["custom_id"]
        url, body = _request(given)
    except ApiError as error:
        return Row(id, custom_id, "", None, error)
    return Row(id, custom_id, url, body, None)


def _json(line: bytes) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        raise ApiError(422, "the line is no JSON") from None
    if not isinstance(given, dict):
        raise ApiError(422, "a line is a JSON object")
    return given


def _request(given: dict[str, Any]) -> tuple[str, Any]:
    """Return the route and the body: those of a batch line, or the line itself."""
    if not isinstance(given.get("custom_id"), str | None):
        raise ApiError(422, "custom_id is a text", "custom_id")
    rest = {key: value for key, value in given.items() if key != "custom_id"}
    if "body" not in rest and not {"method", "url"} & rest.keys():
        if "prompt" not in rest and "messages" not in rest:
            raise ApiError(422, "give body, prompt or messages")
        return (COMPLETION if "prompt" in rest else CHAT), rest
    if unknown := rest.keys() - {"method", "url", "body"}:
        raise ApiError(422, "a batch line has custom_id, method, url and body", min(unknown)[:200], "unknown_field")
    if rest.get("method", "POST") != "POST":
        raise ApiError(405, "the method is POST", "method")
    if rest.get("url") not in (CHAT, COMPLETION):
        raise ApiError(404, f"the url is {CHAT} or {COMPLETION}", "url")
    if not isinstance(rest.get("body"), dict):
        raise ApiError(422, "the body is a JSON object", "body")
    return rest["url"], rest["body"]


def take_up(out: Path) -> set[str]:
    """Return the ids of the answers that stand in a file whole; a torn last line is dropped from it.

    Raises
    ------
    InputError
        If something else stands there.
    """
    ids: set[str] = set()
    if not out.exists():
        return ids
    try:
        with out.open("r+b") as stream:
            end = 0
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    stream.truncate(end)
                    break
                end += len(line)
                try:
                    ids.add(str(json.loads(line)["id"]))
                except (ValueError, RecursionError, KeyError, TypeError):
                    raise InputError(f"{out}: the line {number} is no answer; name another file with --out") from None
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return ids
