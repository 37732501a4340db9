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
from typing import Any

from tokenary.cli.claims import NOT_YET, describe, ledger, read_records, slugs
from tokenary.cli.output import write_text
from tokenary.core.registry import cards

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "docs/reduce.md",
    "README.md",
    "docs/measuring.md",
    "docs/tokenizers.md",
    "docs/memory.md",
    "docs/codec.md",
    "docs/server.md",
)


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


def tokenize_speed() -> str:
    """Return the speed of the tokenize room over a plain encode, from ``results/timing/tokenize.json``."""
    record = _read("timing/tokenize.json")
    if record is None:
        return f"*{NOT_YET}: `scripts/time_tokenize.py` measures it.*"
    rows = [
        [name, f"{found['over_encode']:.2f}", f"{found['growth']:.1f}" if "growth" in found else "–"]
        for name, found in record["figures"].items()
    ]
    names = ["", "time over a plain encode", "a million equal characters over half a million"]
    about = f"{record['megabytes']} MB of enwik8, median of {record['rounds']} rounds; {record['device']}"
    return "\n".join([*markdown(names, rows), "", f"{about}, {record['cpus']} cores."])


def reads() -> str:
    """Return what reading a part of the cache costs, from ``results/timing/reads.json``."""
    record = _read("timing/reads.json")
    if record is None:
        return f"*{NOT_YET}: `scripts/time_reads.py` measures it.*"
    rows = [
        [name, *(f"{ratio:.2f}" for ratio in found), _length(record["crossover"].get(name))]
        for name, found in record["ratios"].items()
        if name != "everything"
    ]
    return "\n".join(markdown(["time over reading everything", *_lengths(record["lengths"]), "faster from"], rows))


def index_search() -> str:
    """Return how much faster HISA searches than a flat index, from ``results/timing/hisa.json``."""
    record = _read("timing/hisa.json")
    if record is None:
        return f"*{NOT_YET}: `scripts/time_hisa.py` measures it.*"
    rows = [
        [name, *(f"{found[what]['ratio']:.2f}" for what in ("scores", "search")), f"{found['evaluations']:.1f}"]
        for name, found in record["figures"].items()
    ]
    return "\n".join(markdown(["index", "scores", "whole search", "keys looked at"], rows))


def block_sparse() -> str:
    """Return the time of block-sparse prefill over SDPA, from ``results/timing/pbs-attn.json``."""
    record = _read("timing/pbs-attn.json")
    if record is None:
        return f"*{NOT_YET}: `scripts/time_block_sparse.py` measures it.*"
    ways = list(record["rows"][0]["ways"])
    rows = [
        [
            f"{row['shape']}, {row['kind']}",
            f"{row['positions']:,}",
            *(f"{row['ways'][way]['times_sdpa']:.2f}" for way in ways),
        ]
        for row in record["rows"]
    ]
    return "\n".join(markdown(["", "keys", *ways], rows))


def codec() -> str:
    """Return the archives of ``results/codec`` beside other compressors."""
    lines: list[str] = []
    packers = (_read("codec/packers.json") or {}).get("rows", {})
    for name, title in (("alice29", "alice29.txt"), ("enwik8", "the beginning of enwik8")):
        record = _read(f"codec/{name}.json")
        if record is None:
            continue
        one_lane = _read(f"codec/{name}-one-lane.json")
        found = {"tokenary compress": record["bits_per_byte"]} | record["rivals"]
        found |= {packer: row["bits_per_byte"] for packer, row in packers.get(name, {}).items()}
        if one_lane is not None:
            found[f"tokenary compress --with {one_lane['codec']}"] = one_lane["bits_per_byte"]
        rows = [[way, f"{bits:.3f}"] for way, bits in sorted(found.items(), key=lambda pair: pair[1])]
        back = {True: "It came back whole.", False: "**It did not come back.**", None: "It was not decompressed."}
        lines += [f"{title}, {record['bytes']:,} bytes. {back[record['came_back']]}", ""]
        lines += [*markdown(["", "bits a byte"], rows), ""]
    return "\n".join(lines).rstrip() or f"*{NOT_YET}: `scripts/measure_codec.py` measures it.*"


def codec_speed() -> str:
    """Return what lanes cost and give, and the speed beside plain decoding, from ``results/codec``."""
    speed, lanes = _read("codec/speed.json"), _read("codec/lanes.json")
    if speed is None or lanes is None:
        return f"*{NOT_YET}: `scripts/measure_codec.py speed` and `lanes` measure it.*"
    plain = speed["tokens_a_second_plain_decoding"]
    ways = ("tokens_a_second_encoding", "tokens_a_second_decoding")
    rows = [
        [count, *(f"{row[way]:.0f} ({row[way] / plain:.1f}x)" for way in ways)] for count, row in speed["lanes"].items()
    ]
    costs = [
        [count, f"{row['bits_per_byte']:.3f}", f"{row['tokens_a_second_decoding']:.0f}"]
        for count, row in lanes["lanes"].items()
    ]
    return "\n".join(
        [
            f"Tokens a second over the first {speed['tokens']:,} tokens of enwik8, one core of {speed['device']}; in"
            f" brackets over a plain loop that reads one token at a time in float32 and codes nothing ({plain:.1f}).",
            "",
            *markdown(["lanes", "compressing", "decompressing"], rows),
            "",
            f"One block of the first {lanes['bytes']:,} bytes, and decoding of its first 1,024 tokens:",
            "",
            *markdown(["lanes", "bits a byte", "tokens a second"], costs),
        ]
    )


def compare_memory() -> str:
    """Return what the memory room costs and loses on long texts, from ``results/compare-memory*``."""
    from tokenary.bench.memory_report import cells, columns, findings

    lines: list[str] = []
    found = (json.loads(path.read_text("utf-8")) for path in (ROOT / "results").glob("compare-memory*/results.json"))
    for record in sorted(found, key=lambda each: (each["model"]["name"] != "smollm2", each["settings"]["context"])):
        names = [name for name, _ in columns(record)]
        settings, machine = record["settings"], record["machine"]
        about = (
            f"{record['model']['name']} in {record['model']['dtype']}, {settings['prompts']} text"
            f"{'s' * (settings['prompts'] > 1)} of {settings['context']:,} tokens, seed {settings['seed']};"
            f" {machine['device']}; {record['date'][:10]}."
        )
        notes = [f"- {note}" for note in (*record["left_out"], *record["warnings"])]
        rows = [cells(point) for point in record["points"]]
        title = f"### {record['model']['name']}, {settings['context']:,} tokens"
        lines += [title, "", " ".join(findings(record)), "", *markdown(names, rows), "", about, "", *notes, ""]
    command = "tokenary compare --room memory --context 8192 --peers --out results/compare-memory"
    return "\n".join(lines).rstrip() or f"*{NOT_YET}: `{command}` measures it.*"


def past_context() -> str:
    """Return the headlines of long texts past the context that their model was made for."""
    from tokenary.bench.memory_report import findings

    found = (json.loads(path.read_text("utf-8")) for path in (ROOT / "results").glob("compare-memory*/results.json"))
    past = [record for record in found if record["settings"]["context"] > record["model"]["context"]]
    said = [f"{record['model']['name']}: {' '.join(findings(record))}" for record in past]
    return "\n\n".join(said) or f"*{NOT_YET}: `tokenary compare --room memory --context 12288` measures it.*"


def compare_reduce() -> str:
    """Return what reducers of image tokens keep, from ``results/compare-reduce``."""
    from tokenary.bench.reduce_report import cells, columns, findings, title

    record = _read("compare-reduce/results.json")
    if record is None:
        return f"*{NOT_YET}: `tokenary compare --room reduce --crops --out results/compare-reduce` measures it.*"
    lines = [" ".join(findings(record)), ""]
    for part in record["parts"]:
        names = [name for name, _ in columns(part)]
        lines += [title(part) + ".", "", *markdown(names, [cells(point, part) for point in part["points"]]), ""]
    machine = record["machine"]
    lines += [f"{machine['device']}, {machine['threads']} threads; {record['date'][:10]}.", ""]
    return "\n".join([*lines, *(f"- {note}" for note in (*record["left_out"], *record["warnings"]))])


def servers() -> str:
    """Return tokens a second of servers, from ``results/timing/servers.json``."""
    record = _read("timing/servers.json")
    if record is None:
        return f"*{NOT_YET}: `scripts/time_servers.py` measures it.*"
    rows = [
        [name]
        + [f"{one[n]['tokens_per_second']:.0f} ({one[n]['over_tokenary']:.2f}×)" for n in ("1", "8")]
        + [f"{1000 * one['8']['median_first_token_seconds']:.0f} ms"]
        for name, one in record["figures"].items()
    ]
    names = ["", "tokens/s, 1 client", "8 clients", "first token, 8 clients"]
    about = f"SmolLM2, answers of {record['tokens']} tokens, {record['rounds']} rounds in turns; {record['device']}"
    return "\n".join(
        [*markdown(names, rows), "", f"{about}, {record['cpus']} cores. In brackets: over `tokenary serve`."]
    )


def _read(name: str) -> dict[str, Any] | None:
    """Return a record of ``results``, if there is one."""
    path = ROOT / "results" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lengths(lengths: list[int]) -> list[str]:
    return [f"{length:,} tokens" for length in lengths]


def _length(tokens: float | None) -> str:
    return "–" if tokens is None else f"{round(tokens, -2):,.0f} tokens"


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
    "compare-memory": compare_memory,
    "compare-reduce": compare_reduce,
    "tokenize-speed": tokenize_speed,
    "servers": servers,
    "reads": reads,
    "index-search": index_search,
    "block-sparse": block_sparse,
    "past-context": past_context,
    "codec": codec,
    "codec-speed": codec_speed,
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
