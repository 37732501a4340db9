"""One loader a data set; each returns plain Python objects."""

from __future__ import annotations

import gzip
import json
import tarfile
from html.parser import HTMLParser
from typing import Any

from tokenary.core.errors import OptionError, UnknownNameError
from tokenary.data.sources import locate


def wikitext2(split: str = "test") -> str:
    """Return a split of WikiText-2 (Merity et al. 2016) as one text, tokenised with ``<unk>`` as published.

    Parameters
    ----------
    split : {"test", "valid"}
        The training split is in no source that this package can check.
    """
    if split not in ("test", "valid"):
        raise OptionError("split", split, "test or valid")
    return locate(f"wikitext2-{split}").read_text(encoding="utf-8")


def gsm8k() -> list[dict[str, str]]:
    """Return the test problems of GSM8K (Cobbe et al. 2021): keys ``question, answer``; after ``####`` the number."""
    return [json.loads(line) for line in locate("gsm8k").read_text(encoding="utf-8").split("\n") if line]


def humaneval() -> list[dict[str, str]]:
    """Return HumanEval (Chen et al. 2021): keys ``task_id, prompt, entry_point, canonical_solution, test``."""
    with gzip.open(locate("humaneval"), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def enwik8(first: int | None = None) -> bytes:
    """Return enwik8, the text of the Hutter prize: 100,000,000 bytes.

    Parameters
    ----------
    first : int, optional
        Only so many bytes from the start.
    """
    if first is not None and not 0 <= first <= 100_000_000:
        raise OptionError("first", first, "0 to 100000000 bytes")
    with gzip.open(locate("enwik8")) as stream:
        return stream.read(-1 if first is None else first)


def udhr(language: str | None = None) -> dict[Any, Any]:
    """Return the Universal Declaration of Human Rights, aligned by article.

    Parameters
    ----------
    language : str, optional
        A code of the collection, such as ``eng``, ``fra``, ``deu_1996``, ``cmn_hans``.

    Returns
    -------
    dict
        ``{article: text}``, the preamble as article 0, paragraphs one a line; without a language
        ``{code: {article: text}}``. Some translations lack articles.

    Raises
    ------
    UnknownNameError
        No such language code.
    """
    found: dict[str, dict[int, str]] = {}
    codes = []
    with tarfile.open(locate("udhr")) as archive:
        for member in archive:
            if not member.name.startswith("package/declaration/"):
                continue
            code = member.name.rpartition("/")[2].removesuffix(".html")
            codes.append(code)
            stream = archive.extractfile(member) if language in (None, code) else None
            if stream is not None:
                page = _Declaration()
                page.feed(stream.read().decode())
                found[code] = {number: "\n".join(lines) for number, lines in page.articles.items()}
    if language is None:
        return found
    if language not in found:
        raise UnknownNameError("language", language, codes)
    return found[language]


def imdb() -> list[dict[str, Any]]:
    """Return 50,000 film reviews (Maas et al. 2011): keys ``text`` and ``label``, 1 for a good one."""
    rows = json.loads(locate("imdb").read_text(encoding="utf-8"))
    return [{"text": row["t"], "label": row["s"]} for row in rows]


class _Declaration(HTMLParser):
    """Collects the paragraphs and list items of one page: header = preamble, then ``<article data-number>``."""

    def __init__(self) -> None:
        super().__init__()
        self.articles: dict[int, list[str]] = {}
        self._article: int | None = None
        self._text: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "header":
            self._article = 0
        elif tag == "article":
            self._article = int(dict(attrs).get("data-number") or 0)
        elif tag in ("p", "li") and self._article is not None:
            self._text = ""

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li") and self._text is not None and self._article is not None:
            if line := " ".join(self._text.split()):
                self.articles.setdefault(self._article, []).append(line)
            self._text = None
        elif tag in ("header", "article"):
            self._article = None
