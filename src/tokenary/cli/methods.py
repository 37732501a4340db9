"""``tokenary methods`` and ``tokenary show``: the catalogue. Listing imports no method."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.cli import output

if TYPE_CHECKING:
    from tokenary.core.method import Method


def methods(
    room: str = typer.Option(None, "--room", help="Only this room, for example decode or memory."),
    lossless: bool = typer.Option(
        None, "--lossless/--lossy", help="Only methods that keep the output, or that do not."
    ),
    as_json: bool = output.JSON,
) -> None:
    """List the methods.

    Example: [bold]tokenary methods --room decode --lossless[/bold]
    """
    from tokenary.core.registry import cards

    found = cards(room=room, lossless=lossless)
    if as_json:
        output.as_json([card.to_dict() for card in found])
        return
    rows = [[card.slug, card.room, card.slot, card.kind, card.summary] for card in found]
    output.table(["method", "room", "slot", "kind", "what it does"], rows)


def show(
    slug: str = typer.Argument(help="A method, as listed by `tokenary methods`."), as_json: bool = output.JSON
) -> None:
    """Show one method: its paper, its options, what it composes with, its claim and the record of it.

    Example: [bold]tokenary show keyformer[/bold]
    """
    from tokenary.core.registry import card, cards, method_class

    found = card(slug)
    options = _options(method_class(slug))
    composes = [other.slug for other in cards() if _composes(slug, other.slug)]
    claim, record = _claim(slug), _record(slug)
    if as_json:
        about = {"options": options, "composes_with": composes, "claim": claim, "record": record}
        output.as_json({**found.to_dict(), **about})
        return
    paper = f"arXiv {found.paper} ({found.year})" if found.paper else str(found.year or "no paper: a control")
    lines = [
        f"{found.slug}: {found.summary}",
        f"  {found.title}",
        f"  {paper}" + (f", code {found.code}" if found.code else ""),
        f"  room {found.room}, slot {found.slot}, {found.kind}",
        f"  training: {found.training}",
        f"  needs of the model: {', '.join(found.requires) or 'nothing'}",
        f"  composes with: {', '.join(composes) or 'nothing yet'}",
    ]
    lines += [f"  refuses {name}: {reason}" for name, reason in found.refuses]
    if claim:
        lines.append(f"  claim: {claim['statement']}")
    if record:
        lines.append(
            f"  verdict: {record['verdict']}; held out: {record.get('held_out', {}).get('verdict', 'not run')}"
        )
    elif claim:
        lines.append(f"  verdict: not measured yet (tokenary claims run {slug}, about {claim['minutes']:g} minutes)")
    typer.echo("\n".join(lines) + "\n")
    rows = [[o["name"], o["type"], o["range"], str(o["default"])] for o in options]
    output.table(["option", "type", "range", "default"], rows)


def _composes(one: str, other: str) -> bool:
    """Whether two methods stand in one recipe."""
    from tokenary.core.errors import RecipeError
    from tokenary.core.recipe import Recipe

    try:
        Recipe.parse([one, other])
    except RecipeError:
        return False
    return True


def _options(method: type[Method]) -> list[dict[str, Any]]:
    """Name, type, range and default of every option."""
    defaults = inspect.signature(method).parameters
    return [
        {"name": name, "type": _type(field), "range": _range(field), "default": _plain(defaults[name].default)}
        for name, field in method.schema().get("properties", {}).items()
    ]


def _plain(value: Any) -> Any:
    """Return a default as a JSON type; a budget as its text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part) for part in field["anyOf"]))
    if "const" in field or "enum" in field:
        return "choice"
    return "budget" if "examples" in field else str(field.get("type", "any"))


def _range(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(text for part in field["anyOf"] if (text := _range(part)))
    if "const" in field or "enum" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    low = [f"> {field['exclusiveMinimum']}"] if "exclusiveMinimum" in field else []
    low += [f">= {field['minimum']}"] if "minimum" in field else []
    high = [f"< {field['exclusiveMaximum']}"] if "exclusiveMaximum" in field else []
    high += [f"<= {field['maximum']}"] if "maximum" in field else []
    return ", ".join(low + high) or str(field.get("description", ""))


def _claim(slug: str) -> dict[str, Any] | None:
    from tokenary.cli.claims import describe, slugs

    return describe(slug) if slug in slugs() else None


def _record(slug: str) -> dict[str, Any] | None:
    path = Path("results/claims") / f"{slug}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
