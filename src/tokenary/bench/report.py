"""The report: one HTML page that holds everything it needs, made from the record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenary.core import page
from tokenary.core.page import INK, PALETTE, layout

Record = Mapping[str, Any]

#: Kinds of rows in the order of the table.
KINDS = ("recipe", "peer")
CONTROLS = ("random", "recent")
PLAIN = "plain"
N_TEXTS = 4
WINDOW = 16  # passes over which the curve of accepted tokens is averaged


# -- sentences and cells, shared by the terminal and the page ----------------------------------------------------------


def headline(record: Record) -> str:
    """Say in one or two sentences what the figures say; nothing in it is fixed beforehand."""
    return " ".join(findings(record))


def findings(record: Record) -> list[str]:
    """Return the sentences of the headline: on speed, then on quality, as far as each was measured."""
    rows = [row for row in record["rows"] if row["kind"] == "recipe"]
    drafts = [row for row in rows if row["lossless"] and row["name"] != PLAIN]
    parts = []
    if drafts:
        best = max(drafts, key=lambda row: row["ratio"]["median"])
        speed = best["ratio"]["median"]
        same = f"with identical output on {best['identical']} of {best['prompts']} prompts"
        if speed >= 1.03:
            parts.append(f"{best['name']} writes {speed:.2f} times as many tokens a second as plain greedy, {same}.")
        elif speed > 0.97:
            parts.append(f"No draft is faster than plain greedy; {best['name']} is as fast, {same}.")
        else:
            parts.append(f"No draft is faster than plain greedy: the best, {best['name']}, reaches {speed:.2f} times.")
    kept = [row for row in rows if row["quality"]]
    if kept:
        own = [row for row in kept if not _is_control(row["quality"]["recipe"])] or kept
        best = min(own, key=lambda row: row["quality"]["increase_percent"])
        point = best["quality"]
        rivals = [
            f"{row['quality']['recipe']} {_percent(row['quality']['increase_percent'])}"
            for row in kept
            if row is not best and _is_control(row["quality"]["recipe"])
        ]
        beside = f" ({', '.join(dict.fromkeys(rivals))})" if rivals else ""
        parts.append(
            f"{point['recipe']} holds {point['kv_share']:.0%} of the cache at"
            f" {_percent(point['increase_percent'])} perplexity{beside}."
        )
    filled = [row for row in rows if row.get("filled") and row["name"] != PLAIN]
    if filled:
        best = max(filled, key=lambda row: row["ratio"]["median"])
        parts.append(
            f"{best['name']} writes {best['ratio']['median']:.2f} times as many tokens a second as one token a pass;"
            f" what it fills costs the model itself {_nats(best['filled'])} more a token,"
            f" and {best['filled']['same']:.0%} of it is the same."
        )
    if not parts:
        parts.append(f"Plain greedy writes {rows[0]['tokens_per_second']['median']:.1f} tokens a second.")
    if not record["complete"]:
        parts[0] = f"Interrupted. {parts[0]}"
    return parts


def _is_control(recipe: str) -> bool:
    return recipe.partition(":")[0] in CONTROLS


def _percent(value: float) -> str:
    return f"{value:+.1f}%" if abs(value) < 1000 else f"{value:+,.0f}%"


def _nats(filled: Mapping[str, float]) -> str:
    return f"{filled['increase_nats']:+.2f} ± {filled['increase_stderr']:.2f} nats"


def _times(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f}×"


def columns(record: Record) -> list[tuple[str, Any]]:
    """Return name and alignment of the columns of the table."""
    parts = record["rows"][0]["ratio_by_workload"]
    names = ["speed", *parts, "tokens/pass", "cold", "first token", "KV held", "peak memory"]
    return [("recipe", "left"), *((name, "right") for name in names), ("output", "left")]


def cells(row: Mapping[str, Any], record: Record) -> list[str]:
    """Return one row of the table as text."""
    plain, ratio = record["rows"][0], row["ratio"]
    per_pass, cold = row["tokens_per_pass"], row["cold_tokens_per_pass"]
    kv = row["kv_bytes"]
    speed = f"{_times(ratio)} ({ratio['low']:.2f}–{ratio['high']:.2f})"
    return [
        row["name"],
        f"{row['tokens_per_second']['median']:.1f} tokens/s" if row is plain else speed,
        *(_times(part) for part in row["ratio_by_workload"].values()),
        "–" if per_pass is None else f"{per_pass:.2f}",
        "–" if cold is None else f"{cold:.2f}",
        f"{row['first_token_ms']:.0f} ms",
        "–" if kv is None else f"{kv / 1e6:.1f} MB" if kv >= 1e5 else f"{kv / 1e3:.0f} kB",
        f"{row['peak_bytes'] / 1e6:,.0f} MB",
        "the baseline" if row is plain else _output(row),
    ]


def _output(row: Mapping[str, Any]) -> str:
    """Whether the output is the same, or what quality was lost."""
    point = row["quality"]
    if point:
        error = (point["increase_percent_high"] - point["increase_percent_low"]) / 2
        return f"perplexity {_percent(point['increase_percent'])} ± {error:.1f} at {point['kv_share']:.0%} KV"
    if row.get("filled"):
        same, rows = row["filled"]["same"], row["rows_per_token"]
        return f"{_nats(row['filled'])}, {same:.0%} the same, {rows:.0f} rows/token"
    if row.get("branches"):
        return f"{row['branches']} texts a prompt"
    same = f"identical {row['identical']}/{row['prompts']}"
    if not row["lossless"]:
        return f"lossy, {same}"
    ties = row["near_ties"]
    return same + (f" ({ties} near-tie{'s' * (ties > 1)})" if ties else "")


# -- plots -------------------------------------------------------------------------------------------------------------


def plots(record: Record) -> list[dict[str, Any]]:
    """Return the plots: ``id, title, note, label`` (for those who cannot see it), ``figure``, ``head`` and ``body``.

    A figure is what Plotly draws; head and body are the same figures as a table.
    """
    made = [_speed(record), _per_pass(record), _curves(record), _over_time(record)]
    return [plot for plot in made if plot is not None]


def _speed(record: Record) -> dict[str, Any]:
    """Bars of the ratio to plain greedy, all prompts and each workload apart."""
    rows = [row for row in record["rows"] if row["name"] != PLAIN][::-1]  # Plotly draws from the bottom
    parts = ["all prompts", *record["rows"][0]["ratio_by_workload"]]
    names = [row["name"] for row in rows]
    traces = []
    for number, part in reversed(list(enumerate(parts))):
        ratios = [row["ratio"] if number == 0 else row["ratio_by_workload"][part] for row in rows]
        middle = [ratio["median"] for ratio in ratios]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": part,
                "y": names,
                "x": middle,
                "marker": {"color": PALETTE[number]},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [ratio["high"] - ratio["median"] for ratio in ratios],
                    "arrayminus": [ratio["median"] - ratio["low"] for ratio in ratios],
                    "color": INK,
                    "thickness": 1,
                    "width": 3,
                },
                "hovertemplate": "%{y}<br>%{x:.2f} times<extra>" + part + "</extra>",
            }
        )
    one = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": INK, "width": 1}}
    height = 90 + len(rows) * (18 * len(parts) + 14)
    drawn = layout(
        height,
        xaxis={"title": {"text": "tokens a second (plain greedy = 1)"}, "rangemode": "tozero"},
        bargap=0.28,
        shapes=[one],
    )
    drawn["legend"]["traceorder"] = "reversed"
    body = [
        [row["name"], *(_range(ratio) for ratio in (row["ratio"], *row["ratio_by_workload"].values()))]
        for row in rows[::-1]
    ]
    ranking = sorted(((row["ratio"]["median"], row["name"]) for row in rows), reverse=True)
    return {
        "id": "speed",
        "title": "Speed",
        "note": "Median of the rounds; whiskers from the least to the greatest. The line at 1 is plain greedy. "
        "Friendly prompts invite copying and repetition, hostile ones do not.",
        "label": "Bars of speed relative to plain greedy: " + ", ".join(f"{n} {v:.2f}" for v, n in ranking),
        "figure": {"data": traces, "layout": drawn},
        "head": ["recipe", *parts],
        "body": body,
    }


def _range(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"


def _per_pass(record: Record) -> dict[str, Any] | None:
    """Bars of tokens a pass, cold and warm."""
    rows = [row for row in record["rows"] if row["tokens_per_pass"] and row["cold_tokens_per_pass"]]
    if not rows:
        return None
    names = [row["name"] for row in rows]
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [row[field] for row in rows],
            "marker": {"color": color},
            "hovertemplate": "%{x}<br>%{y:.2f} tokens a pass<extra>" + name + "</extra>",
        }
        for name, field, color in (
            ("cold", "cold_tokens_per_pass", PALETTE[-1]),
            ("warm", "tokens_per_pass", PALETTE[0]),
        )
    ]
    one = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 1, "y1": 1, "line": {"color": INK, "width": 1}}
    return {
        "id": "passes",
        "title": "Tokens a pass",
        "note": "How many tokens one run of the model yields; plain greedy yields 1. With nodes=auto the size of a "
        "draft, and so this figure, depends on the machine. Cold: the method knows nothing yet. Warm: it has seen "
        "other prompts, never these.",
        "label": "Bars of tokens a pass: "
        + ", ".join(f"{r['name']} cold {r['cold_tokens_per_pass']:.2f}, warm {r['tokens_per_pass']:.2f}" for r in rows),
        "figure": {
            "data": traces,
            "layout": layout(
                320, yaxis={"title": {"text": "tokens a pass"}, "rangemode": "tozero"}, bargap=0.6, shapes=[one]
            ),
        },
        "head": ["recipe", "cold", "warm", "share of drafted tokens accepted"],
        "body": [
            [
                row["name"],
                f"{row['cold_tokens_per_pass']:.2f}",
                f"{row['tokens_per_pass']:.2f}",
                "–" if row["acceptance"] is None else f"{row['acceptance']:.1%}",
            ]
            for row in rows
        ],
    }


def _curves(record: Record) -> dict[str, Any] | None:
    """Lines of the perplexity's increase over the bytes held."""
    quality = record["quality"]
    curves = {name: points for name, points in (quality or {}).get("curves", {}).items() if name != PLAIN}
    if not curves:
        return None
    traces, body = [], []
    for number, (name, points) in enumerate(curves.items()):
        own = [point["increase_percent"] for point in points]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [100 * point["kv_share"] for point in points],
                "y": own,
                "line": {
                    "color": PALETTE[number % len(PALETTE)],
                    "width": 2,
                    "dash": "dot" if _is_control(name) else "solid",
                },
                "marker": {"size": 8, "symbol": number},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [p["increase_percent_high"] - p["increase_percent"] for p in points],
                    "arrayminus": [p["increase_percent"] - p["increase_percent_low"] for p in points],
                    "thickness": 1,
                    "width": 3,
                },
                "text": [point["recipe"] for point in points],
                "hovertemplate": "%{text}<br>%{x:.0f}% of the bytes<br>perplexity %{y:+.2f}%<extra></extra>",
            }
        )
        body += [
            [
                point["recipe"],
                f"{point['kv_share']:.1%}",
                f"{point['perplexity']:.3f}",
                _percent(point["increase_percent"]),
                f"{point['increase_nats']:+.4f} ± {point['increase_stderr']:.4f}",
            ]
            for point in points
        ]
    full = quality["curves"][PLAIN][0]
    return {
        "id": "quality",
        "title": "Quality over budget",
        "note": f"How much worse real prose ({quality['text']}) is predicted when less is remembered. "
        f"{quality['prompt_tokens']} tokens are read, the next {quality['new_tokens']} scored, {full['texts']} texts. "
        f"Full cache: perplexity {full['perplexity']:.2f}. Whiskers: one standard error of the paired difference. "
        "Dotted: controls.",
        "label": "Lines of the increase of perplexity over the share of bytes that is held; lower is better. "
        + ", ".join(f"{row[0]} {row[3]}" for row in body),
        "figure": {
            "data": traces,
            "layout": layout(
                380,
                xaxis={"title": {"text": "bytes of keys and values held at the end, % of the full cache"}},
                yaxis={"title": {"text": "increase of perplexity, %"}},
            ),
        },
        "head": ["policy", "bytes held", "perplexity", "increase", "nats a token"],
        "body": body,
    }


def _over_time(record: Record) -> dict[str, Any] | None:
    """Lines of tokens a pass over time, from nothing learned, and after the warm-up."""
    traces, body = [], []
    for number, (name, runs) in enumerate(record["passes"].items()):
        for state in ("cold", "warm"):
            tokens = [1 + accepted for _, accepted in runs[state]]
            if not tokens:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name if state == "cold" else f"{name}, warm",
                    "x": list(range(1, len(tokens) + 1)),
                    "y": running_mean(tokens, WINDOW),
                    "line": {
                        "color": PALETTE[number % len(PALETTE)],
                        "width": 2 if state == "cold" else 1.5,
                        "dash": "solid" if state == "cold" else "dot",
                    },
                    "hovertemplate": "pass %{x}<br>%{y:.2f} tokens a pass<extra>" + f"{name}, {state}" + "</extra>",
                }
            )
            quarters = [tokens[len(tokens) * i // 4 : len(tokens) * (i + 1) // 4] for i in range(4)]
            body.append([name, state, *(f"{sum(q) / len(q):.2f}" if q else "–" for q in quarters)])
    if not traces:
        return None
    return {
        "id": "time",
        "title": "Learning while it runs",
        "note": f"Tokens a pass, averaged over the last {WINDOW} passes, through the same prompts one after the other. "
        "Solid: starting cold, from the very first pass. Dotted: after the warm-up on other prompts.",
        "label": "Lines of tokens a pass over time, by quarters of the run: "
        + ", ".join(f"{row[0]} {row[1]} {', '.join(row[2:])}" for row in body),
        "figure": {
            "data": traces,
            "layout": layout(
                360,
                xaxis={"title": {"text": "pass"}},
                yaxis={"title": {"text": "tokens a pass"}, "rangemode": "tozero"},
            ),
        },
        "head": ["recipe", "state", "first quarter", "second", "third", "last"],
        "body": body,
    }


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to ``window - 1`` before it."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(round(sum(part) / len(part), 4))
    return means


# -- texts -------------------------------------------------------------------------------------------------------------


def texts(record: Record) -> list[dict[str, Any]]:
    """Return a few prompts, of every workload in turn, with what each drafting recipe said.

    A text is a list of runs ``(drafted, text)``: neighbouring tokens of one origin together.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for prompt in record["prompts"]:
        groups.setdefault(prompt["workload"], []).append(prompt)
    in_turn = [group[turn] for turn in range(len(record["prompts"])) for group in groups.values() if turn < len(group)]
    made = []
    for prompt in in_turn[:N_TEXTS]:
        said = []
        for output in record["outputs"]:
            if output["prompt"] == prompt["id"] and output["recipe"] != PLAIN:
                pairs = list(zip(output["from_draft"], output["pieces"], strict=True))
                runs = [
                    (k, "".join(text for _, text in group)) for k, group in groupby(pairs, key=lambda pair: pair[0])
                ]
                drafted = sum(output["from_draft"])
                said.append(
                    {
                        "recipe": output["recipe"],
                        "runs": runs,
                        "drafted": drafted,
                        "tokens": len(pairs),
                        "passes": output["passes"],
                        "share": drafted / len(pairs) if pairs else 0.0,
                    }
                )
        if said:
            made.append({**prompt, "said": said})
    return made


# -- the page ----------------------------------------------------------------------------------------------------------


def render(record: Record) -> str:
    """Return the page for a record of `compare`: HTML that asks for nothing from outside."""
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        plots(record),
        record=record,
        findings=findings(record),
        columns=columns(record),
        rows=[(row, cells(row, record)) for kind in KINDS for row in record["rows"] if row["kind"] == kind],
        texts=texts(record),
    )
