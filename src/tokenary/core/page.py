"""What our HTML pages are made with: one file each that asks for nothing from outside, plots in the page's colours."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Readable on light and on dark ground (contrast above 3 with both).
PALETTE = ("#3b7dd8", "#c9701a", "#1f9384", "#c2527a", "#8468cf", "#93802f", "#7a8794")
INK, LINE = "var(--ink)", "var(--line)"  # replaced by the page's script when the theme changes


def render(template: Path, plots: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """Fill a template, and give it the library that draws, the figures, and the only scripts that may run.

    Parameters
    ----------
    template : Path
        A Jinja file. It is given ``plots``, ``figures``, ``library``, ``script`` and ``hashes`` besides `values`.
    plots : sequence of mapping
        Each with ``id`` and ``figure`` (data and layout of Plotly).
    **values
        Whatever else the template shows; escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    library, script = get_plotlyjs(), Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(
        plots=plots,
        figures=Markup(script_json({plot["id"]: plot["figure"] for plot in plots})),  # the signs of markup are escaped
        library=Markup(library),
        script=Markup(script),
        # Only these two scripts may run, whatever the values hold.
        hashes=[_csp_hash(library), _csp_hash(script)],
        **values,
    )


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Return the layout of a plot, in the colours of the page."""
    axis = {"gridcolor": LINE, "zerolinecolor": LINE, "linecolor": LINE, "automargin": True}
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        "xaxis": axis | more.pop("xaxis", {}),
        "yaxis": axis | more.pop("yaxis", {}),
    } | more


def script_json(value: Any) -> str:
    """Return JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, code)
    return text


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
