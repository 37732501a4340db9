"""Puts the figures of ``results/`` into the pages, between their markers; no number there is typed by hand.

A page holds ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``; what stands between them is replaced. What has not
been measured says so. Run ``python docs/build.py`` after a measurement; ``--check`` fails where a page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tokenary.cli.claims import NOT_YET, describe, ledger, read_records, slugs
from tokenary.cli.output import write_text
from tokenary.core.registry import cards

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/measuring.md", "docs/tokenizers.md")


def compare() -> str:
    """Return the table of ``results/compare/results.json``."""
    path = ROOT / "results" / "compare" / "results.json"
    if not path.is_file():
        return f"*{NOT_YET}: `make bench` measures it.*"
    from tokenary.bench import Comparison
    from tokenary.bench.report import KINDS, cells, columns, headline

    record = Comparison.read(path).record
    names = [name for name, _ in columns(record)]
    rows = [cells(row, record) for kind in KINDS for row in record["rows"] if row["kind"] == kind]
    model, machine, settings = record["model"], record["machine"], record["settings"]
    about = (
        f"{model['name']} in {model['dtype']}, {len(record['prompts'])} prompts of {settings['max_new_tokens']} new"
        f" tokens, {settings['rounds']} rounds in turns, seed {settings['seed']}; {machine['device']},"
        f" {machine['threads']} threads; torch {record['versions']['torch']}, transformers"
        f" {record['versions']['transformers']}; {record['date'][:10]}."
    )
    notes = [f"- {warning}" for warning in record["warnings"]]
    return "\n".join([headline(record), "", *markdown(names, rows), "", about, *(["", *notes] if notes else [])])


def verdicts() -> str:
    """Return the claims and their verdicts, from ``results/claims``."""
    records = read_records(ROOT / "results")
    rows = []
    for slug in slugs():
        record = records.get(slug, {})
        held_out = record.get("held_out", {}).get("verdict", NOT_YET if not record else "not run")
        rows.append([slug, describe(slug)["statement"], record.get("verdict", NOT_YET), held_out])
    return "\n".join(markdown(["method", "claim", "verdict", "held out"], rows))


def methods() -> str:
    """Return the catalogue."""
    rows = [[f"`{card.slug}`", card.room, card.kind, card.summary] for card in cards()]
    return "\n".join(markdown(["method", "room", "kind", "what it does"], rows))


def transfers() -> str:
    """Return bits a byte of models under other tokenizers, from ``results/transfers``."""
    lines: list[str] = []
    for path in sorted((ROOT / "results" / "transfers").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for target, found in record["targets"].items():
            arms = found["bits_a_byte"]
            after = found["after_training"]
            domains = [name for name in next(iter(arms.values())) if name in ("prose", "code", "digits", "hindi")]
            trained = [f"after {found['trained_steps']} steps"] * bool(after)
            rows = [
                [arm.replace("none", "own tokenizer"), *(f"{figures[name]:.2f}" for name in domains)]
                + [_mean(after[arm], domains) if arm in after else "–"] * bool(after)
                for arm, figures in sorted(arms.items(), key=lambda pair: sum(pair[1][name] for name in domains))
            ]
            lines += [
                f"{record['model']} with the tokenizer of {target}: {found['new']:,} of {found['vocabulary']:,} tokens"
                f" are new, {found['running_new']:.0%} of the running ones.",
                "",
                *markdown(["bits a byte", *domains, *trained], rows),
                "",
            ]
    return "\n".join(lines).rstrip() or f"*{NOT_YET}: `scripts/measure_transfers.py` measures it.*"


def _mean(figures: dict[str, float], names: list[str]) -> str:
    return f"{sum(figures[name] for name in names) / len(names):.2f}"


def markdown(names: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


BLOCKS: dict[str, Callable[[], str]] = {
    "compare": compare,
    "verdicts": verdicts,
    "methods": methods,
    "transfers": transfers,
}


def filled(text: str) -> str:
    """Return a page with every block made anew."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)"
        text = re.sub(pattern, lambda m, made=block: f"{m[1]}{made()}\n{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Write the pages, or with ``--check`` only compare them."""
    made = {ROOT / page: filled((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    made[ROOT / "docs" / "ledger.md"] = ledger(read_records(ROOT / "results"))
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python docs/build.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        write_text(path, made[path])
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
