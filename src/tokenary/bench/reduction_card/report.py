"""The page of a report card: sentences, the table, differences to random tokens with intervals, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenary.bench.reduction_card.overthinking import finding
from tokenary.bench.same_time import CONTROLS, told
from tokenary.core import page
from tokenary.core.page import INK, PALETTE, layout

Record = Mapping[str, Any]
#: Column of the table, and the figure in it; retention and cost have places of their own.
COLUMNS = (
    ("arm", ""), ("at", ""), ("tokens", ""), ("GFLOPs", ""), ("retention", ""),
    ("F1, adversarial", "adversarial: f1"), ("false yes, adversarial", "adversarial: false_yes"), ("recall", "recall"),
    ("false names", "false_names"), ("names found", "listing_recall"), ("grounding", "grounding_mass"),
    ("pointing", "pointing"), ("neighbours", "mutual_neighbours"), ("wrong picture", "wrong_image_agreement"),
)  # fmt: skip
#: Differences that are drawn: title, note, figures.
DRAWN = (
    (
        "hallucination", "Hallucination",
        "Shares of yes where no is right, by kind of negative, as answered and at the recall of random tokens; false "
        "names in lists. Lower is better, but only at the same recall: saying no, or nothing, lowers every rate.",
        ("random: false_yes", "popular: false_yes", "adversarial: false_yes", "random: false_yes at equal recall",
         "popular: false_yes at equal recall", "adversarial: false_yes at equal recall", "recall", "false_names",
         "answers_with_false_names", "listing_recall"),
    ),
    (
        "grounding", "Grounding and alignment",
        "Attention of answers on the patches of what was asked, through the token map; neighbours, alignment and "
        "retrieval of pictures and their captions, mean over layers.",
        ("grounding_mass", "pointing", "evidence", "mutual_neighbours", "linear_cka", "image_to_caption",
         "caption_to_image"),
    ),
    (
        "language", "The language model by itself",
        "Answers that stay the same with another picture, the distance to blind ones (nats), and repetition in lists.",
        ("wrong_image_agreement", "prior_divergence", "distinct_2", "named_twice"),
    ),
    (
        "map", "The token map",
        "What the map is like before any model reads it.",
        ("coverage", "redundancy", "conserved"),
    ),
)  # fmt: skip


def findings(record: Record) -> list[str]:
    """Return the sentences of the headline; nothing in them is fixed beforehand."""
    reducers = [arm for arm in record["arms"] if arm["role"] == "reducer"]
    found = [_retained(arm) for arm in reducers[:3]]
    lower = [arm["name"] for arm in reducers if _lowers(arm)]
    said = ", ".join(lower) if lower else "no reducer here"
    found.append(f"At the recall of random tokens, adversarial false yes is lower beyond the interval with {said}.")
    thinking = record["text"]["thinking"]
    return found if thinking is None else [*found, finding(thinking)]


def _retained(arm: Record) -> str:
    mean, over = arm["retention"]["mean"], arm["retention_over_random"]["mean"]
    if mean["value"] is None:
        return f"{arm['name']}: seeing does not help this model enough to speak of retention."
    than = "" if over["low"] is None else f" ({over['low']:+.2f} to {over['high']:+.2f})"
    return (
        f"{arm['name']} retains {mean['value']:.0%} of what the picture adds, {over['value']:+.2f} over random "
        f"tokens{than}."
    )


def _lowers(arm: Record) -> bool:
    high = arm["over_random"]["adversarial: false_yes at equal recall"]["high"]
    return high is not None and high < 0


def cells(arm: Record) -> list[str]:
    """Return one row of the table as text."""
    cost = arm["cost"]
    name = arm["name"] + (f" ({arm['seeds']} seeds)" if arm["seeds"] > 1 else "")
    first = [name, arm["at"], f"{cost['kept']:.1f}", f"{cost['gflops']:.2f}", _share(arm["retention"]["mean"])]
    return [*first, *(_share(arm["figures"].get(key)) for _, key in COLUMNS[5:])]


def _share(figure: Record | None) -> str:
    return "" if figure is None or figure["value"] is None else f"{figure['value']:.2f}"


def interval(figure: Record, sign: str = "") -> str:
    """Return a figure with its interval as text."""
    if figure["value"] is None:
        return "–"
    between = "" if figure["low"] is None else f", {figure['low']:{sign}.2f} to {figure['high']:{sign}.2f}"
    return f"{figure['value']:{sign}.2f}{between}"


def plots(record: Record) -> list[dict[str, Any]]:
    """Return plots of the differences to random tokens; see `tokenary.bench.report.plots`."""
    arms = [arm for arm in record["arms"] if arm["over_random"] is not None and arm["role"] != "blind"]
    families = [name for name, gate in record["gates"].items() if gate["counts"]]
    retention = {arm["name"] + arm.get("beside", ""): arm["retention_over_random"] for arm in arms}
    note = (
        "Retention is the share of what the picture adds to accuracy that is left, (reduced - blind) / (full - blind); "
        "families in which seeing adds too little are left out. Higher is better."
    )
    made = [_plot("retention", "Retention", note, ("mean", *families), arms, retention)]
    over = {arm["name"] + arm.get("beside", ""): arm["over_random"] for arm in arms}
    return made + [_plot(key, title, said, names, arms, over) for key, title, said, names in DRAWN]


def _plot(
    key: str, title: str, note: str, names: Sequence[str], arms: Sequence[Record], values: Mapping[str, Record]
) -> dict[str, Any]:
    """Draw points with intervals, one colour an arm; the line is random tokens at the same place and budget."""
    traces, body = [], []
    for number, arm in enumerate(arms):
        own = values[arm["name"] + arm.get("beside", "")]
        shown = [(name, own[name]) for name in names if name in own and own[name]["value"] is not None]
        body += [_line(arm, name, each) for name, each in shown]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": _label(arm),
                "x": [each["value"] for _, each in shown],
                "y": [name.replace("_", " ") for name, _ in shown],
                "error_x": {
                    "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                    "array": [(each["high"] or each["value"]) - each["value"] if each["high"] is not None else 0
                              for _, each in shown],
                    "arrayminus": [each["value"] - each["low"] if each["low"] is not None else 0 for _, each in shown],
                },
                "marker": {"size": 8 if arm["role"] == "reducer" else 6, "color": PALETTE[number % len(PALETTE)],
                           "symbol": number % 32},
                "opacity": 1.0 if arm["role"] == "reducer" else 0.6,
            }
        )  # fmt: skip
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": INK, "width": 1}}
    height = 140 + len(names) * max(34, 9 * len(arms))
    axis = {"autorange": "reversed", "categoryorder": "array", "categoryarray": [n.replace("_", " ") for n in names]}
    return {
        "id": key,
        "title": f"{title}: difference to random tokens",
        "note": note,
        "label": f"{title}, differences to random tokens: " + "; ".join(" ".join(row[:3]) for row in body),
        "figure": {
            "data": traces,
            "layout": layout(height, scattermode="group", xaxis={"title": {"text": "difference"}}, yaxis=axis,
                             shapes=[zero]),
        },
        "head": ["arm", "figure", "difference", "95% interval"],
        "body": body,
    }  # fmt: skip


def _label(arm: Record) -> str:
    return arm["name"] + (f", beside {arm['beside']}" if arm.get("beside") else "")


def _line(arm: Record, name: str, effect: Record) -> list[str]:
    between = "" if effect["low"] is None else f"{effect['low']:+.3f} to {effect['high']:+.3f}"
    return [_label(arm), name.replace("_", " "), f"{effect['value']:+.3f}", between]


def render(record: Record) -> str:
    """Return the page for a record: HTML that asks for nothing from outside."""
    return page.render(
        Path(__file__).parent.with_name("reduction_card.html.j2"),
        plots(record),
        record=record,
        findings=findings(record),
        columns=[(name, "left" if name in ("arm", "at") else "right") for name, _ in COLUMNS],
        rows=[(arm, cells(arm)) for arm in record["arms"]],
        reducers=[arm for arm in record["arms"] if arm["role"] == "reducer"],
        controls=CONTROLS,
        told=told,
        interval=interval,
    )
