"""The report of ``compare --room reduce``: sentences, the table, curves, one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenary.bench.same_time import CONTROLS, told
from tokenary.core import page
from tokenary.core.page import INK, PALETTE, layout

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]
#: What a curve is drawn over: name, field, title of the plot and of its axis.
AXES = (
    ("tokens", "share", "What is kept, over image tokens", "image tokens read, mean over layers, % of all"),
    ("flops", "flops_share", "What is kept, over arithmetic", "FLOPs of a picture and its question, % of all"),
    ("time", "time_share", "What is kept, over time", "time to see and read, % of that on all"),
)
#: Columns of differences in the same time, on the page alone.
TIMED = tuple(f"over {name}, same time" for name in CONTROLS.values())
_ABOUT = {
    "ocr": "A word in a coloured box is to be read.",
    "chart": "A cell of a table, a bar or the trend of a line is asked for.",
    "counting": "Objects of a colour or a shape are to be counted.",
    "spatial": "It is asked where an object is, or what lies next to it.",
    "attribute": "The colour of a shape is asked for, or the shape of a colour.",
    "existence": "It is asked whether there is such an object.",
    "listing": "All objects are to be listed.",
    "real": "Handwritten digits and photographs are to be told.",
}


# -- sentences and cells, shared by the terminal and the page ----------------------------------------------------------


def findings(record: Record) -> list[str]:
    """Return the sentences of the headline; nothing in them is fixed beforehand."""
    found = [sentence for part in record["parts"] for sentence in _said(part, record)]
    return ["Interrupted. " + found[0], *found[1:]] if not record["complete"] else found


def _said(part: Record, record: Record) -> list[str]:
    """What is to be said of one kind of pictures."""
    fit = [name for name, family in part["families"].items() if family["fit"]]
    whole = f"{part['points'][0]['kept']:.0f} image tokens"
    where = f"With all {whole}" if part["name"] == "pictures" else f"In crops, with all {whole},"
    if not fit:
        return [f"{where} no family of questions is answered well enough to measure reducers on."]
    full, blind = (sum(part["families"][name][key] for name in fit) / len(fit) for key in ("full", "blind"))
    unfit = [name for name in part["families"] if name not in fit]
    but = f"; not fit to measure on: {', '.join(unfit)}" if unfit else ""
    several = len(record["settings"]["models"]) > 1
    verb = "answer" if several else "answers"
    found = [
        f"{where} {record['model']['name']} {verb} {full:.0%} of the questions, without the picture {blind:.0%}{but}."
    ]
    budgets = dict.fromkeys(point["budget"] for point in part["points"] if point["budget"] is not None)
    sentences = [_at(part, budget) for budget in budgets]
    return [*found, *(sentence for sentence in sentences if sentence), *_beyond(part)]


def _at(part: Record, budget: float) -> str:
    """Who keeps most at a budget."""
    here = [point for point in part["points"] if point["budget"] == budget and point["retention"]["value"] is not None]
    best = [max((p for p in here if p["control"] is kind), key=_value, default=None) for kind in (False, True)]
    words = [f"{point['curve']} keeps {_value(point):.0%}" for point in best[:1] if point]
    words += [f"the best control ({point['curve']}) {_value(point):.0%}" for point in best[1:] if point]
    return f"At {budget:g}% of the tokens {', '.join(words)} of what the picture adds." if all(best) else ""


def _beyond(part: Record) -> list[str]:
    """Who is better than every control of its budget, beyond the interval."""
    methods = [point for point in part["points"] if point["over"] is not None and point["over"]["low"] is not None]
    better = [point for point in methods if point["over"]["low"] > 0]
    if not methods:
        return []
    if not better:
        return ["None is better than the best control of its budget beyond the interval."]
    words = []
    for curve, points in groupby(better, key=lambda point: point["curve"]):
        words.append(f"{curve} at " + " and ".join(f"{point['budget']:g}%" for point in points))
    return [f"Better than the best control of its budget beyond the interval: {', '.join(words)}."]


def _value(point: Record) -> float:
    return point["retention"]["value"]


def columns(part: Record) -> list[tuple[str, Any]]:
    """Return name and alignment of the columns of the table of one kind of pictures.

    Families that are not fit to measure on stand in brackets.
    """
    families = [name if family["fit"] else f"({name})" for name, family in part["families"].items()]
    names = ("tokens read", "retention", *families, "GFLOPs", "KV held", "encode ms", "prefill ms", "choice ms")
    return [("reducer", "left"), *((name, "right") for name in (*names, *(TIMED if _timed(part["points"][0]) else ())))]


def _timed(point: Record) -> bool:
    """Whether others are held against it in the same time; in older records they are not."""
    return "same_time" in point


def cells(point: Record, part: Record) -> list[str]:
    """Return one row of that table as text."""
    return [
        point["recipe"],
        f"{point['tokens']:.0f} ({point['share']:.0%})",
        _range(point["retention"]),
        *(_family(point["families"][name], family["fit"]) for name, family in part["families"].items()),
        f"{point['flops'] / 1e9:.3g}",
        f"{point['kv_bytes'] / 1e3:,.0f} kB",
        *("–" if point[name] is None else f"{point[name]:.1f}" for name in ("encode_ms", "prefill_ms", "overhead_ms")),
        *("" if point["same_time"] is None else told(point["same_time"][name]) for name in CONTROLS if _timed(point)),
    ]


def _range(figure: Record) -> str:
    """A retention with its interval, in percent."""
    if figure["value"] is None or figure["low"] is None:
        return _percent(figure)
    return f"{_percent(figure)} ({round(100 * figure['low'])}–{round(100 * figure['high'])})"


def _percent(figure: Record) -> str:
    return "–" if figure["value"] is None else f"{round(100 * figure['value'])}%"  # rounded first: there is no -0%


def _family(figure: Record, fit: bool) -> str:
    return _percent(figure) if fit else f"({_percent(figure)})"


def title(part: Record) -> str:
    """Return what a part is called."""
    seen = "one view" if part["views"] == 1 else f"a thumbnail and {part['views'] - 1} crops"
    tokens = part["points"][0]["kept"]
    return (
        f"Pictures of {part['side']} x {part['side']} pixels, seen as {seen}: {tokens:.0f} image tokens,"
        f" {part['questions']} questions of each family"
    )


def table(record: Record) -> Table:
    """Return the table for a terminal: families that are fit in some part, without keys and values."""
    from rich.box import SIMPLE
    from rich.table import Table

    parts, machine = record["parts"], record["machine"]
    unfit = {name for name in parts[0]["families"] if not any(part["families"][name]["fit"] for part in parts)}
    shown = [at for at, name in enumerate(_plain_names(parts[0])) if name not in {*unfit, "KV held", *TIMED}]
    made = Table(
        title="\n".join(findings(record)),
        title_justify="left",
        title_style="bold",
        caption=f"{record['model']['name']} {record['model']['dtype']}; {machine['device']}, {machine['threads']}"
        " threads. Cells: the share kept of what the picture adds to right answers, with its interval of 95%; in"
        " brackets where the models answer too badly to measure on. Dim: controls.",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name, (_, justify) in [list(zip(_plain_names(parts[0]), columns(parts[0]), strict=True))[at] for at in shown]:
        made.add_column(name.replace(" ", "\n"), justify=justify, vertical="top", header_style="dim", no_wrap=True)
    for part in parts:
        if len(parts) > 1:
            made.add_section()
            made.add_row(part["name"], style="bold")
        for _, group in groupby(part["points"], key=lambda point: point["curve"]):
            for point in group:
                row = cells(point, part)
                made.add_row(*(row[at] for at in shown), style="dim" if point["control"] else None)
            made.add_section()
    return made


def _plain_names(part: Record) -> list[str]:
    """Names of the columns, without brackets."""
    return [name.strip("()") for name, _ in columns(part)]


# -- plots -------------------------------------------------------------------------------------------------------------


def plots(record: Record) -> list[dict[str, Any]]:
    """Return the plots of every part: retention over tokens, FLOPs and time, and each family over tokens."""
    made = []
    for part in record["parts"]:
        where = "" if part["name"] == "pictures" else ", in crops"
        for name, key, heading, axis in AXES:
            about = {"id": f"{part['name']}-{name}", "title": heading + where, "note": _note(part)}
            made.append(about | _plot(part, key, axis, lambda point: point["retention"], heading))
        for family, known in part["families"].items():
            heading = family.upper() if family == "ocr" else family.capitalize()
            unfit = "" if known["fit"] else " (not fit to measure on)"
            note = f"{_ABOUT[family]} {known['full']:.0%} are answered on all tokens, {known['blind']:.0%} blind."
            if unfit:
                note += " That is too little for what a reducer keeps of it to mean anything."
            about = {"id": f"{part['name']}-{family}", "title": f"{heading}{where}{unfit}", "note": note}

            def of_family(point: Record, family: str = family) -> Record:
                return point["families"][family]

            made.append(about | _plot(part, AXES[0][1], AXES[0][3], of_family, f"{family}{where}"))
    return made


def _note(part: Record) -> str:
    fit = [name for name, family in part["families"].items() if family["fit"]]
    return (
        "Retention, (accuracy - blind) / (accuracy on all - blind), the mean over families that are fit to measure on"
        f" ({', '.join(fit) or 'none is'}). Whiskers: 95% of draws of the questions; of controls (dotted) see below."
    )


def _plot(part: Record, key: str, axis: str, figure: Callable[[Record], Record], label: str) -> dict[str, Any]:
    """Lines of retention over a cost."""
    traces, body = [], []
    shown = [point for point in part["points"] if figure(point)["value"] is not None and point[key]]
    for number, (name, group) in enumerate(groupby(shown, key=lambda point: point["curve"])):
        points = sorted(group, key=lambda point: point[key])
        values = [figure(point) for point in points]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [100 * point[key] for point in points],
                "y": [100 * value["value"] for value in values],
                "error_y": {
                    "type": "data",
                    "visible": not points[0]["control"],
                    "symmetric": False,
                    "array": [_reach(value, "high") for value in values],
                    "arrayminus": [_reach(value, "low") for value in values],
                    "thickness": 1,
                    "width": 3,
                },
                "line": {
                    "color": PALETTE[number % len(PALETTE)],
                    "width": 1.5 if points[0]["control"] else 2.5,
                    "dash": "dot" if points[0]["control"] else "solid",
                },
                "marker": {"size": 8, "symbol": number % 32},
                "text": [f"{point['recipe']} at {point['at']}<br>{_range(figure(point))}" for point in points],
                "hovertemplate": "%{text}<br>%{x:.0f}%<extra></extra>",
            }
        )
        body += [_line(point, figure(point), key) for point in points]
    return {
        "label": f"Lines, {label}: " + ", ".join(f"{line[0]} {line[4]}" for line in body),
        "figure": {
            "data": traces,
            "layout": layout(
                420,
                xaxis={"title": {"text": axis}, "type": "log", "tickvals": [3, 6, 12, 25, 50, 100]},
                yaxis={"title": {"text": "% of what the picture adds"}},
                shapes=[
                    {
                        "type": "line",
                        **{"x0": 0, "x1": 1, "xref": "paper", "y0": 100, "y1": 100},
                        "line": {"color": INK, "width": 1},
                    }
                ],
            ),
        },
        "head": ["reducer", "at", "tokens", axis, "kept of what the picture adds", "right"],
        "body": body,
    }


def _reach(figure: Record, end: str) -> float:
    """How far a whisker reaches, in percent; 0 where there is no interval."""
    return 0.0 if figure[end] is None else 100 * abs(figure[end] - figure["value"])


def _line(point: Record, figure: Record, key: str) -> list[str]:
    accuracy = figure.get("accuracy", point["accuracy"])
    cost = f"{point[key]:.1%}"
    return [point["recipe"], point["at"], f"{point['tokens']:.1f}", cost, _range(figure), f"{accuracy:.1%}"]


def render(record: Record) -> str:
    """Return the page for a record: HTML that asks for nothing from outside."""
    return page.render(
        Path(__file__).with_name("reduce.html.j2"),
        plots(record),
        record=record,
        findings=findings(record),
        tables=[
            (title(part), columns(part), [(point, cells(point, part)) for point in part["points"]], _by_model(part))
            for part in record["parts"]
        ],
    )


def _by_model(part: Record) -> list[tuple[str, list[str]]]:
    """Retention of each model alone, where there are several."""
    points: Sequence[Record] = part["points"] if len(part["points"][0]["models"]) > 1 else []
    return [
        (point["recipe"], ["–" if value is None else f"{value:.0%}" for value in point["models"].values()])
        for point in points
    ]
