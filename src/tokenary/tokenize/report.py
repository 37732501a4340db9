"""The page of an audit: one HTML file that holds everything it needs, made from the record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenary.core import page
from tokenary.core.page import PALETTE, layout

Record = Mapping[str, Any]

PREMIUM, INFORMATION = "token-premium", "tokenizer-information"


def number(value: float | int | None, digits: int = 2) -> str:
    """Say a figure; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """Say a share in percent."""
    return "–" if value is None else f"{value:.1%}"


# -- sentences and tables, shared by the terminal and the page -------------------------------------------------------


def findings(record: Record) -> list[str]:
    """Say in a few sentences what the figures say; nothing in it is fixed beforehand."""
    said = []
    for row in record["tokenizers"]:
        premium = row["measures"].get(PREMIUM, {})
        others = {
            name: one["premium"]
            for name, one in premium.get("languages", {}).items()
            if name != premium.get("reference")
        }
        if others:
            worst = max(others, key=lambda name: others[name])
            least = min(others, key=lambda name: others[name])
            said.append(
                f"{row['name']}: the same content takes {others[worst]:.2f} times as many tokens in {worst} and "
                f"{others[least]:.2f} times in {least} as in {premium['reference']}; coefficient of variation "
                f"{premium['dispersion']['cv']:.2f} over {premium['dispersion']['n']} languages."
            )
        else:
            tokens = sum(one["tokens"] for one in row["languages"].values())
            nbytes = sum(record["corpus"][name]["bytes"] for name in row["languages"])
            said.append(f"{row['name']}: " + (f"{nbytes / tokens:.2f} bytes a token." if tokens else "no token."))
    return said


def warnings(record: Record) -> list[str]:
    """Say what was skipped, refused or did not come back."""
    said = []
    for name, text in record["corpus"].items():
        if text["skipped_lines"]:
            said.append(f"{name}: {text['skipped_lines']:,} lines are not UTF-8 and were left out")
        if not text["bytes"]:
            said.append(f"{name}: holds no text that can be used")
        if text["empty"]:
            said.append(f"{name}: {text['empty']:,} sentences are empty and were left out")
    for row in record["tokenizers"]:
        premium = row["measures"].get(PREMIUM, {})
        said += [f"{row['name']}, {name}: {why}" for name, why in premium.get("skipped", {}).items()]
        if premium.get("why"):
            said.append(f"{row['name']}: no premiums: {premium['why']}")
        faults = sum(one["faults"] for one in row["languages"].values())
        if faults:
            texts = sum(text["texts"] for text in record["corpus"].values())
            said.append(f"{row['name']}: {faults:,} of {texts:,} texts do not come back from decoding")
        information = row["measures"].get(INFORMATION, {}).get("languages", {})
        refused = [name for name, one in information.items() if one.get("why")]
        if refused:
            said.append(f"{row['name']}: no H1 for {', '.join(refused)}: too few tokens for the types they hold")
    return list(dict.fromkeys(said))


def summary(record: Record) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of tokenizers."""
    head = ["tokenizer", "vocabulary", "bytes/token", "spread (CV)", "Gini", "max/min", "H1", "bits/byte", "dead"]
    head += ["unreachable", "faults"]
    rows = []
    for row in record["tokenizers"]:
        spread = row["measures"].get(PREMIUM, {}).get("dispersion", {})
        whole = _whole(row)
        tokens = sum(one["tokens"] for one in row["languages"].values())
        nbytes = sum(record["corpus"][name]["bytes"] for name in row["languages"])
        lost = row["unreachable"]
        rows.append(
            [
                row["name"],
                number(row["vocabulary"]),
                number(nbytes / tokens if tokens else None),
                number(spread.get("cv"), 3),
                number(spread.get("gini"), 3),
                number(spread.get("max_min")),
                number(whole.get("h1")),
                number(whole.get("best_bits_per_byte")),
                share(whole.get("dead_share")),
                "–" if lost is None else number(lost["merges"] + lost["split"]),
                number(sum(one["faults"] for one in row["languages"].values())),
            ]
        )
    return head, rows


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
    """The information of all languages together, or of the only one."""
    languages: dict[str, dict[str, Any]] = row["measures"].get(INFORMATION, {}).get("languages", {})
    return languages.get("all") or next(iter(languages.values()), {})


def by_language(record: Record, row: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of one tokenizer's languages."""
    head = ["language", "tokens", "premium", "interval", "byte premium", "tokens/word", "bytes/token", "H1"]
    head += ["bits/byte", "faults", "unknown"]
    premium = row["measures"].get(PREMIUM, {}).get("languages", {})
    information = row["measures"].get(INFORMATION, {}).get("languages", {})
    names = sorted(row["languages"], key=lambda name: (premium.get(name, {}).get("premium", 0), name))
    rows = []
    for name in names:
        one, same, told = row["languages"][name], premium.get(name, {}), information.get(name, {})
        rows.append(
            [
                name,
                number(one["tokens"]),
                number(same.get("premium")),
                f"{same['low']:.2f}–{same['high']:.2f}" if same else "–",
                number(same.get("byte_premium")),
                number(one["fertility"]),
                number(one["bytes_per_token"]),
                number(told.get("h1")),
                number(told.get("best_bits_per_byte")),
                number(one["faults"]),
                number(one["unknown"]),
            ]
        )
    return head, rows


# -- plots -----------------------------------------------------------------------------------------------------------


def plots(record: Record) -> list[dict[str, Any]]:
    """Return the plots: ``id, title, note, label`` (for those who cannot see it), ``figure``, ``head`` and ``body``."""
    made = [_premiums(record), _bytes(record), _orders(record), _artifacts(record)]
    return [plot for plot in made if plot is not None]


Dots = tuple[str, list[str], list[float | None], dict[str, Any]]  # name, labels, values, more of the trace


def _dots(rows: Sequence[Dots], unit: str) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "y": labels,
            "x": values,
            "marker": {"color": PALETTE[i % len(PALETTE)], "size": 9, "symbol": i},
            "hovertemplate": "%{y}<br>%{x:.2f} " + unit + f"<extra>{name}</extra>",
        }
        | more
        for i, (name, labels, values, more) in enumerate(rows)
    ]


def _premiums(record: Record) -> dict[str, Any] | None:
    """Dots of the premium of each language, one colour a tokenizer."""
    found = {row["name"]: row["measures"].get(PREMIUM, {}) for row in record["tokenizers"]}
    found = {name: one for name, one in found.items() if one.get("languages")}
    if not found:
        return None
    first = next(iter(found.values()))["languages"]
    names = sorted(first, key=lambda name: first[name]["premium"])
    rows = []
    for name, one in found.items():
        values = [one["languages"].get(label, {}) for label in names]
        middle = [value.get("premium") for value in values]
        bars = {
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [value.get("high", 0) - value.get("premium", 0) for value in values],
                "arrayminus": [value.get("premium", 0) - value.get("low", 0) for value in values],
                "thickness": 1,
                "width": 3,
            }
        }
        rows.append((name, names, middle, bars))
    reference = next(iter(found.values()))["reference"]
    columns = [[number(one["languages"].get(label, {}).get("premium")) for label in names] for one in found.values()]
    body = [[label, *line] for label, line in zip(names, zip(*columns, strict=True), strict=True)]
    return {
        "id": "premiums",
        "title": "Tokens for the same content",
        "note": f"Tokens of the shared sentences over those of {reference}; whiskers from resampling the sentences. A "
        "premium of 2 costs twice as much and fills a context twice as fast.",
        "label": "Dots of token premiums by language: " + "; ".join(" ".join(line) for line in body),
        "figure": {
            "data": _dots(rows, "times the tokens"),
            "layout": layout(
                120 + 22 * len(names), xaxis={"title": {"text": f"tokens ({reference} = 1)"}, "type": "log"}
            ),
        },
        "head": ["language", *found],
        "body": body,
    }


def _bytes(record: Record) -> dict[str, Any] | None:
    names = sorted(record["corpus"])
    rows: list[Dots] = [
        (row["name"], names, [row["languages"].get(name, {}).get("bytes_per_token") for name in names], {})
        for row in record["tokenizers"]
    ]
    body = [[name, *(number(values[i]) for _, _, values, _ in rows)] for i, name in enumerate(names)]
    return {
        "id": "bytes",
        "title": "Bytes a token",
        "note": "UTF-8 bytes of the whole text over its tokens. Scripts differ in bytes a letter: compare tokenizers "
        "within a language here, languages by their premiums.",
        "label": "Dots of bytes a token: " + "; ".join(" ".join(line) for line in body),
        "figure": {
            "data": _dots(rows, "bytes a token"),
            "layout": layout(120 + 22 * len(names), xaxis={"title": {"text": "bytes a token"}, "rangemode": "tozero"}),
        },
        "head": ["language", *(row["name"] for row in record["tokenizers"])],
        "body": body,
    }


def _orders(record: Record) -> dict[str, Any] | None:
    """Lines of bits a byte over the tokens of context."""
    columns = ("bits_per_byte", "sequential", "held_out", "plug_in")
    traces, body = [], []
    for i, row in enumerate(record["tokenizers"]):
        whole = _whole(row)
        orders = whole.get("orders") or {}
        if not orders:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": row["name"],
                "x": [int(order) - 1 for order in orders],
                "y": [one["bits_per_byte"] for one in orders.values()],
                "line": {"color": PALETTE[i % len(PALETTE)], "width": 2},
                "marker": {"size": 8, "symbol": i},
            }
        )
        body += [
            [row["name"], str(int(order) - 1), *(number(one[key], 3) for key in columns)]
            for order, one in orders.items()
        ]
    if not traces:
        return None
    return {
        "id": "orders",
        "title": "How well the next token can be told",
        "note": "Bits a byte of a code that adapts while it reads, by how many tokens back it looks; what a reader of "
        "this text could really be sent. The plug-in entropies of the table are far too low where most runs of tokens "
        "occur once.",
        "label": "Lines of bits a byte over tokens of context: " + "; ".join(" ".join(line[:3]) for line in body),
        "figure": {
            "data": traces,
            "layout": layout(
                340,
                xaxis={"title": {"text": "tokens of context"}, "dtick": 1},
                yaxis={"title": {"text": "bits a byte"}, "rangemode": "tozero"},
            ),
        },
        "head": ["tokenizer", "context", "bits/byte", "bits/token", "held out", "plug-in"],
        "body": body,
    }


def _artifacts(record: Record) -> dict[str, Any] | None:
    """Bars of the share of words with another encoding of each class."""
    traces, body, classes = [], [], list[str]()
    for i, row in enumerate(record["tokenizers"]):
        words = sum(one["artifacts"]["words"] for one in row["languages"].values())
        if not words:
            continue
        found: dict[str, float] = {}
        for one in row["languages"].values():
            for name, value in one["artifacts"]["exposed"].items():
                found[name] = found.get(name, 0.0) + (value or 0.0) * one["artifacts"]["words"] / words
        classes = list(found)
        traces.append(
            {
                "type": "bar",
                "name": row["name"],
                "x": classes,
                "y": [100 * value for value in found.values()],
                "marker": {"color": PALETTE[i % len(PALETTE)]},
                "hovertemplate": "%{x}<br>%{y:.1f}% of the words<extra>" + row["name"] + "</extra>",
            }
        )
        body.append([row["name"], *(share(value) for value in found.values())])
    if not traces:
        return None
    return {
        "id": "artifacts",
        "title": "Words with a second encoding",
        "note": "Share of the different words for which the vocabulary holds another spelling of the same text, by the "
        "class that such a pair would fall into. A model can change one into the other without changing the text.",
        "label": "Bars of the share of words by class: " + "; ".join(" ".join(line) for line in body),
        "figure": {"data": traces, "layout": layout(360, yaxis={"title": {"text": "% of the words"}})},
        "head": ["tokenizer", *classes],
        "body": body,
    }


# -- the page --------------------------------------------------------------------------------------------------------


def render(record: Record) -> str:
    """Return the page for a record of `audit`: HTML that asks for nothing from outside.

    Parameters
    ----------
    record : mapping
        From `audit`; ``differences`` in it, if any, as `audit.differences` gives them.
    """
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        plots(record),
        record=record,
        findings=findings(record),
        warnings=warnings(record),
        summary=summary(record),
        languages=[(row["name"], *by_language(record, row)) for row in record["tokenizers"]],
        diffs=record.get("differences", []),
    )
