"""``tokenary claims``: run the experiments behind the methods, keep their records, write the ledger."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.cli import output

if TYPE_CHECKING:
    from tokenary.core.claim import Claim

app = typer.Typer(
    no_args_is_help=True,
    help="Run the experiments behind the methods.\n\nExample: [bold]tokenary claims run keyformer[/bold]",
)

_FOLDER = Path(__file__).resolve().parent.parent / "claims"
_RESULTS = typer.Option(Path("results"), "--results", help="The folder of records.")
NOT_YET = "not measured yet"


def sources() -> dict[str, Path]:
    """Find the claim files: those of ``tokenary/claims`` that hold ``CLAIM = Claim(...)``. Imports none of them."""
    return {
        path.stem.replace("_", "-"): path
        for path in sorted(_FOLDER.glob("*.py"))
        if re.search(r"^CLAIM = Claim\($", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def slugs() -> list[str]:
    """Return the methods that have a claim."""
    return list(sources())


def describe(slug: str) -> dict[str, Any]:
    """Read what a claim file states in literals (statement, metric, threshold, ...), without importing it."""
    tree = ast.parse(_path(slug).read_text(encoding="utf-8"))
    call = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.targets[0]) == "CLAIM"
    )
    found: dict[str, Any] = {"minutes": 1.0, "effect": "ratio"}
    for keyword in call.keywords:
        if keyword.arg:
            try:
                found[keyword.arg] = _literal(keyword.value)
            except ValueError:  # the function that runs it
                continue
    return found


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, or of a quotient of two: a threshold of ``1 / 0.7`` is "at least 30% less"."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _literal(node.left) / _literal(node.right)
    return ast.literal_eval(node)


def find(slug: str) -> Claim:
    """Import the claim of a method.

    Raises
    ------
    UnknownNameError
        If there is no method of that name, or it has no claim.
    """
    return importlib.import_module(f"tokenary.claims.{_path(slug).stem}").CLAIM


def model_of(slug: str) -> dict[str, str]:
    """Return name and hash of the catalogue model that a claim runs on, for its record."""
    from tokenary.core.files import sha256_of
    from tokenary.models.catalogue import find as find_model
    from tokenary.models.catalogue import local_source

    name = describe(slug).get("model", "smollm2")
    if not name:
        return {}
    entry = find_model(name)
    shipped = local_source(entry) if entry.folder else None
    return {"name": entry.name, "sha256": sha256_of(shipped) if shipped else entry.sha256}


def _path(slug: str) -> Path:
    from tokenary.core.errors import UnknownNameError

    known = sources()
    if slug not in known:
        raise UnknownNameError("claim", slug, known)
    return known[slug]


def read_records(results: Path) -> dict[str, dict[str, Any]]:
    """Read the records of all claims that were run, by slug.

    Raises
    ------
    InputError
        If a file there is no record.
    """
    from tokenary.core.errors import InputError

    records = {}
    for path in sorted((results / "claims").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record["slug"], record["verdict"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no record of a claim: {error}") from None
        records[path.stem] = record
    return records


# ---------------------------------------------------------------------------------------------- commands


@app.command("list")
def list_claims(results: Path = _RESULTS, as_json: bool = output.JSON) -> None:
    """List the claims and the verdicts of those that were run.

    Example: [bold]tokenary claims list[/bold]
    """
    records = read_records(results)
    rows = [{**describe(slug), "verdict": records.get(slug, {}).get("verdict", NOT_YET)} for slug in slugs()]
    if as_json:
        output.as_json(rows)
        return
    table = [[row["slug"], row["verdict"], f"{row['minutes']:g} min", row["statement"]] for row in rows]
    output.table(["method", "verdict", "takes", "claim"], table)


@app.command("run")
def run(
    slug: str = typer.Argument(None, help="A method that has a claim."),
    every: bool = typer.Option(False, "--all", help="Every claim, one after the other."),
    seed: int = typer.Option(0, help="Of every random draw."),
    timing: bool = typer.Option(False, "--timing", help="Only measure the wall-clock figures of a record again."),
    results: Path = _RESULTS,
    as_json: bool = output.JSON,
) -> None:
    """Run a claim and its held-out variation; write results/claims/SLUG.json.

    Example: [bold]tokenary claims run token-recycling[/bold]
    """
    from tokenary.core.errors import InputError

    if every == (slug is not None):
        raise InputError("name a claim, or give --all")
    chosen = slugs() if every else [slug]
    for name in chosen:
        _path(name)
    done = []
    for name in chosen:
        about = describe(name)
        output.note(f"{name}: {about['statement']} (about {about['minutes']:g} minutes on two cores)")
        record = timed_again(find(name), seed, results) if timing else find(name).record(seed, model_of(name))
        path = results / "claims" / f"{name}.json"
        output.write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        done.append(record)
        if not as_json:
            held_out = record.get("held_out", {}).get("verdict", "not run")
            typer.echo(f"{name}: {record['verdict']}; held out: {held_out}; {path}")
    if as_json:
        output.as_json(done)


def timed_again(claim: Claim, seed: int, results: Path) -> dict[str, Any]:
    """Return the record of a claim with wall-clock figures that were measured now.

    Raises
    ------
    InputError
        If the claim was not run yet, or has no such figures.
    """
    from tokenary.core.errors import InputError

    records = read_records(results)
    if claim.timing is None or claim.slug not in records:
        why = "has no wall-clock figures" if claim.timing is None else "was not run yet"
        raise InputError(f"{claim.slug} {why}")
    return {**records[claim.slug], "timing": claim.wall_clock(seed)}


@app.command("report")
def report(
    results: Path = _RESULTS,
    out: Path = typer.Option(Path("docs/ledger.md"), "--out", help="The page to write."),
) -> None:
    """Write the ledger: every claim with its figures and verdict, from the records alone.

    Example: [bold]tokenary claims report[/bold]
    """
    output.write_text(out, ledger(read_records(results)))
    typer.echo(str(out))


# ------------------------------------------------------------------------------------------------ the page


def ledger(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the ledger as Markdown: a row a method, then the figures of every record."""
    from tokenary.core.registry import cards

    stated = set(slugs())
    lines = [
        "# Ledger",
        "",
        "Written by `tokenary claims report` from `results/claims/*.json`; do not edit. A verdict is computed from the"
        " figures: `shown` needs the stated effect, beyond twice its own standard error, and a better figure than the"
        " control *random*. The held-out variation was fixed before it was run.",
        "",
        "| method | claim | measured | baseline | effect | needed | verdict | held out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in cards(baselines=False):
        if card.slug not in stated:
            lines.append(f"| {card.slug} | no claim yet | | | | | | |")
            continue
        lines.append(_row(card.slug, describe(card.slug), records.get(card.slug)))
    for slug, record in records.items():
        lines += ["", f"## {slug}", "", *_section(record)]
    return "\n".join(lines) + "\n"


def _row(slug: str, about: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    sign = "x" if about["effect"] == "ratio" else ""
    needed = f"{about['threshold']:g}{sign}"
    statement = about["statement"].replace("|", "\\|")
    if record is None or "value" not in record:
        verdict = NOT_YET if record is None else record["verdict"]
        return f"| {slug} | {statement} | {verdict} | | | {needed} | {verdict} | |"
    baseline, held_out = record["baseline"], record["held_out"]
    return (
        f"| {slug} | {statement} | {_figure(record)} {record['metric']} | {baseline['name']} {_figure(baseline)} |"
        f" {_effect(record, record)} | {needed} | **{record['verdict']}** |"
        f" {held_out['verdict']} ({_effect(held_out, record)}; {held_out['varied']}) |"
    )


def _figure(record: Mapping[str, Any]) -> str:
    spread = record.get("spread", 0.0)
    return f"{record['value']:.4g}" + (f" ± {spread:.2g}" if spread else "")


def _effect(record: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    return f"{record['size']:.3g}" + ("x" if claim["effect"] == "ratio" else "")


def _section(record: Mapping[str, Any]) -> list[str]:
    lines = [record["claim"] + ".", ""]
    if "value" not in record:
        return [*lines, f"Verdict: {record['verdict']}."]
    for title, part in (("Claim", record), (f"Held out: {record['held_out']['varied']}", record["held_out"])):
        lines += [f"{title} ({record['metric']}, {record['direction']} is better):", "", "| | value |", "|---|---|"]
        lines.append(f"| {record['slug']} | {_figure(part)} |")
        lines += [f"| {rival['name']} | {_figure(rival)} |" for rival in (part["baseline"], *part["controls"])]
        lines += ["", f"Effect {_effect(part, record)}: **{part['verdict']}**.", ""]
    if record.get("timing"):
        timing = record["timing"]
        figures = "; ".join(f"{name} {value:.3g}" for name, value in timing["figures"].items())
        lines += [f"Wall clock, {timing['threads']} threads: {figures}.", ""]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    model = record["model"]
    named = f"{model['name']} (sha256 {model['sha256'][:12]}…), " if model else ""
    return [
        *lines,
        f"{named}{record['n']} samples, {record['runs']} run(s), seed {record['seed']}, {record['minutes']:g} minutes"
        f" on {record['device']} with {record['threads']} threads, {record['started_at']}; {versions}.",
    ]
