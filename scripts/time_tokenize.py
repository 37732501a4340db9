"""How fast the tokenize room is, over a plain encode of `tokenizers` on the same text: results/timing/tokenize.json.

    python scripts/time_tokenize.py

Every way takes its turn in every round; a figure is the median of its seconds over those of plain encoding in the same
round. ``growth`` is the time for a million equal characters over that for half a million: 2 where it is linear. Rules
of merging are kept from round to round, and remember what they were asked; new ones were asked nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tokenary.core.claim import device_name, versions
from tokenary.core.files import write_json
from tokenary.data import enwik8
from tokenary.tokenize import DynamicTokenization, StochasTok, TokenizerInformation, TokenPremium, TriadicSuffix
from tokenary.tokenize.audit import audit
from tokenary.tokenize.base import load_tokenizer
from tokenary.tokenize.corpus import plan_files
from tokenary.tokenize.dynamic_tokenization import LargeVocabulary, PairRules, merge_batch
from tokenary.tokenize.stochastok import SplitTable
from tokenary.tokenize.supertoken import train_supertokens
from tokenary.tokenize.token_premium.superword import train_superwords
from tokenary.tokenize.tokenizer_information import raw_size

CHUNK = 10_000


def ways(texts: list[str], file: Path) -> dict[str, Callable[[list[str]], object]]:
    """Return what is timed, by name; each takes texts."""
    tokenizer = load_tokenizer("gpt2")
    triadic = TriadicSuffix()
    marked, ruled = triadic.extend(tokenizer, rules=False), triadic.extend(tokenizer, rules=True)
    stochastok, table = StochasTok(p=0.1), SplitTable.of(tokenizer)
    dynamic = DynamicTokenization(share=0.5)
    rules = dynamic.rules(tokenizer)
    sample = texts[:200]
    large = LargeVocabulary(
        tokenizer, merge_batch([row.tolist() for row in tokenizer.encode_batch(sample)], rules, 5000)
    )
    superword, supertoken = train_superwords(sample, 4096), train_supertokens(sample, 4096)

    def merged(some: list[str], known: PairRules) -> object:
        return dynamic.retokenize([row.tolist() for row in tokenizer.encode_batch(some)], known)

    def measured(measures: list[object]) -> object:
        raw_size.cache_clear()
        return audit([tokenizer], plan_files([file]), measures, vocabulary=False)  # type: ignore[arg-type]

    return {
        "encode": tokenizer.encode_batch,
        "triadic-suffix": marked.encode_batch,
        "triadic-suffix, rules in the file": ruled.encode_batch,
        "stochastok": lambda some: [stochastok.expand(row, table) for row in tokenizer.encode_batch(some)],
        "dynamic-tokenization": lambda some: merged(some, rules),
        "dynamic-tokenization, new rules": lambda some: merged(some, dynamic.rules(tokenizer)),
        "large vocabulary": lambda some: [large.encode(text) for text in some],
        "superword": superword.encode_batch,
        "supertoken": supertoken.encode_batch,
        "audit": lambda some: measured([]),
        "audit, all measures": lambda some: measured([TokenPremium(), TokenizerInformation()]),
    }


def seconds(way: Callable[[list[str]], object], texts: list[str]) -> float:
    """Time one call."""
    start = time.perf_counter()
    way(texts)
    return time.perf_counter() - start


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/timing/tokenize.json"))
    given = parser.parse_args()
    whole = enwik8(given.megabytes * 1_000_000).decode(errors="ignore")
    texts = [whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    file = given.out.parent / "tokenize.tmp"
    file.write_text(whole, encoding="utf-8")
    try:
        found = ways(texts, file)
        for way in found.values():
            way(texts[:20])
        rounds = [{name: seconds(way, texts) for name, way in found.items()} for _ in range(given.rounds)]
    finally:
        file.unlink()
    figures = {}
    for name, way in found.items():
        ratios = [one[name] / one["encode"] for one in rounds]
        figures[name] = {
            "mb_per_second": given.megabytes / statistics.median(one[name] for one in rounds),
            "over_encode": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
        if "audit" not in name:
            half = min(seconds(way, ["a" * 500_000]) for _ in range(2))
            figures[name]["growth"] = min(seconds(way, ["a" * 1_000_000]) for _ in range(2)) / half
        print(name, figures[name], flush=True)
    record = {"megabytes": given.megabytes, "rounds": given.rounds, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    write_json(given.out, record | {"versions": versions(), "device": device_name(), "figures": figures})


if __name__ == "__main__":
    main()
