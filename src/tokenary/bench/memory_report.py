"""The report of ``compare --room memory``: sentences, the table, a plot for each workload, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenary.bench.haystack import TASKS
from tokenary.core import page
from tokenary.core.page import INK, PALETTE, layout

Record = Mapping[str, Any]
#: What of a full cache's bytes, or tokens read, counts as little in the headline: a quarter, and some bookkeeping.
CHEAP = 0.3
#: What is hidden and asked for; the other workloads have a loss only.
HIDDEN = ("needle", "multi-needle", "key-value")
_ABOUT = {
    "needle": "One of three hidden sentences is asked for.",
    "multi-needle": "All three hidden sentences are asked for.",
    "key-value": "The number of a word is asked for, from a list that stands in the text.",
    "copy": "A passage of the text begins again, and its rest is predicted.",
    "perplexity": "The prose that follows the text is predicted.",
}


def findings(record: Record) -> list[str]:
    """Return the sentences of the headline; nothing in them is fixed beforehand."""
    points = record["points"]
    full = points[0]
    found = [f"Behind {record['settings']['context']:,} tokens, {_hidden(full)} with the full cache."]
    best = _best([point for point in points if not point["control"] and not point["peer"]])
    if best:
        found.append(f"At up to {CHEAP:.0%} of the cost, {best['recipe']} does least harm: {_worth(best)}.")
        rivals = {"the controls": "control", "other programs": "peer"}
        for name, kind in rivals.items():
            rival = _best([point for point in points if point[kind] and point is not full])
            if rival:
                found.append(f"Of {name}, {rival['recipe']} does: {_worth(rival)}.")
    return ["Interrupted. " + found[0], *found[1:]] if not record["complete"] else found


def _best(points: Sequence[Record]) -> Record | None:
    """Of the cheap memories the one with the least loss, all workloads alike."""
    return min((point for point in points if point["share"] <= CHEAP), key=_increase, default=None)


def _increase(point: Record) -> float:
    """Mean over the workloads, in nats a token."""
    return sum(task["increase"] for task in point["tasks"].values()) / len(point["tasks"])


def _worth(point: Record) -> str:
    more = _increase(point)
    change = f"{abs(more):.2f} nats a token {'more' if more > 0 else 'less'} than with all"
    return f"{change}, {_hidden(point)}, {_cost(point)}"


def _hidden(point: Record) -> str:
    """How much of what was hidden is found."""
    tasks = [point["tasks"][task] for task in HIDDEN]
    asked = sum(task["questions"] for task in tasks)
    right = sum(task["right"] * task["questions"] for task in tasks)
    return f"{right / asked:.0%} of what was hidden is found"


def _cost(point: Record) -> str:
    return f"{point['kv_share']:.0%} of the bytes, {point['read_share']:.0%} of the tokens read"


def columns(record: Record) -> list[tuple[str, Any]]:
    """Return name and alignment of the columns of the table."""
    return [("memory", "left"), *((name, "right") for name in ("KV held", "tokens read", *TASKS, "seconds"))]


def cells(point: Record) -> list[str]:
    """Return one row of the table as text."""
    return [
        point["recipe"],
        f"{point['kv_bytes'] / 1e6:.1f} MB ({point['kv_share']:.0%})",
        f"{point['read_tokens']:,.0f} ({point['read_share']:.0%}{_prompt(point)}",
        *(_cell(point["tasks"][task]) for task in TASKS),
        f"{point['seconds']:.1f}",
    ]


def _prompt(point: Record) -> str:
    """Which share of the pairs of the text itself was looked at, where not all were."""
    return ")" if point["prompt_share"] is None else f"; text {point['prompt_share']:.0%})"


def _cell(task: Record) -> str:
    return f"{task['loss']:.2f}" + ("" if task["right"] is None else f" ({task['right']:.0%})")


def plots(record: Record) -> list[dict[str, Any]]:
    """Return a plot for each workload; see `tokenary.bench.report.plots`."""
    return [_plot(record, task) for task in TASKS]


def _plot(record: Record, task: str) -> dict[str, Any]:
    """Lines of the loss over the share of bytes held, or of tokens read."""
    full, others = record["points"][0], record["points"][1:]
    traces, body = [], [_line(full, task)]
    for number, (name, group) in enumerate(groupby(others, key=lambda point: point["curve"])):
        points = sorted(group, key=lambda point: point["share"])
        faint = points[0]["control"] or points[0]["peer"]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [100 * point["share"] for point in points],
                "y": [point["tasks"][task]["loss"] for point in points],
                "line": {
                    "color": PALETTE[number % len(PALETTE)],
                    "width": 1.5 if faint else 2.5,
                    "dash": "dash" if points[0]["peer"] else "dot" if faint else "solid",
                },
                "marker": {"size": 8, "symbol": number % 32},
                "text": [f"{point['recipe']}<br>{_cost(point)}<br>{_cell(point['tasks'][task])}" for point in points],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
        body += [_line(point, task) for point in points]
    line = {
        "type": "line",
        **{"x0": 0, "x1": 1, "xref": "paper"},
        **dict.fromkeys(("y0", "y1"), full["tasks"][task]["loss"]),
        "line": {"color": INK, "width": 1},
    }
    return {
        "id": task,
        "title": task[0].upper() + task[1:],
        "note": f"{_ABOUT[task]} Lower is better. The line is the full cache; dotted: controls; dashed: others.",
        "label": f"Lines of the loss on {task} over the share of bytes held or tokens read: "
        + ", ".join(f"{row[0]} {row[3]}" for row in body),
        "figure": {
            "data": traces,
            "layout": layout(
                420,
                xaxis={
                    "title": {"text": "bytes held, or tokens read where that is less, % of the full cache"},
                    "type": "log",
                },
                yaxis={"title": {"text": "nats a token of the answer"}},
                shapes=[line],
            ),
        },
        "head": ["memory", "bytes held", "tokens read", "loss", "increase", *(["found"] if task in HIDDEN else [])],
        "body": body,
    }


def _line(point: Record, task: str) -> list[str]:
    found = point["tasks"][task]
    return [
        point["recipe"],
        f"{point['kv_share']:.1%}",
        f"{point['read_share']:.1%}",
        f"{found['loss']:.3f}",
        f"{found['increase']:+.3f} ± {found['stderr']:.3f}",
        *([] if found["right"] is None else [f"{found['right']:.0%}"]),
    ]


def render(record: Record) -> str:
    """Return the page for a record: HTML that asks for nothing from outside."""
    return page.render(
        Path(__file__).with_name("memory.html.j2"),
        plots(record),
        record=record,
        findings=findings(record),
        columns=columns(record),
        rows=[(point, cells(point)) for point in record["points"]],
    )
