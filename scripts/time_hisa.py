"""How much faster blocks are searched than all tokens, on one core: results/timing/hisa.json.

    OMP_NUM_THREADS=1 python scripts/time_hisa.py

Random index keys in two shapes: that of the indexer for SmolLM2 (4 heads of 32) and that of DeepSeek-V3.2 (64 heads of
128), each with blocks of 128, 64 of them searched, 2048 tokens read (the paper's setting). A figure is the median, over
rounds in which both take their turn, of the time of the flat index over that of HISA: of a query's scores (``scores``),
and of the whole search with the choice of tokens (``search``). Both run the same functions as the method itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenary.core.claim import device_name, versions
from tokenary.core.files import write_json
from tokenary.memory.hisa.blocks import BlockIndex
from tokenary.memory.hisa.indexer import score
from tokenary.memory.hisa.plan import Plan, evaluations
from tokenary.memory.hisa.search import search

SHAPES = {"smollm2": (4, 32), "deepseek-v3.2": (64, 128)}
BLOCK, BLOCKS, READ = 128, 64, 2048


def seconds(way: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def scores_through_blocks(queries: Tensor, weights: Tensor, index: BlockIndex, blocks: Tensor) -> None:
    """Compute every score that HISA computes, without choosing."""
    score(queries, weights, index.means)
    for row in range(len(queries)):
        one = slice(row, row + 1)
        score(queries[one], weights[one], index.of_blocks(blocks[one]))


def measure(heads: int, width: int, length: int, n_queries: int, rounds: int) -> dict[str, Any]:
    """Time one shape at one length."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(n_queries, heads, width, generator=generator)
    weights = torch.randn(n_queries, heads, generator=generator)
    index = BlockIndex(BLOCK, width)
    index.append(torch.randn(length, width, generator=generator))
    places, count = torch.full((n_queries,), length - 1), torch.full((n_queries,), READ)
    flat, tree = Plan(BLOCK, BLOCKS, search="flat"), Plan(BLOCK, BLOCKS)
    drawn = torch.rand(n_queries, length // BLOCK, generator=generator)
    blocks = drawn.topk(min(BLOCKS + 2, drawn.shape[1])).indices.sort(-1).values
    ways: dict[str, Callable[[], object]] = {
        "flat search": lambda: search(queries, weights, places, count, index, flat),
        "hisa search": lambda: search(queries, weights, places, count, index, tree),
        "flat scores": lambda: score(queries, weights, index.keys),
        "hisa scores": lambda: scores_through_blocks(queries, weights, index, blocks),
    }
    for way in ways.values():
        way()
    taken = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    found: dict[str, Any] = {
        "evaluations": evaluations(length, flat, READ) / evaluations(length, tree, READ),
        "milliseconds a query": {
            name: 1000 * statistics.median(one[name] for one in taken) / n_queries for name in ways
        },
    }
    for kind in ("search", "scores"):
        ratios = [one[f"flat {kind}"] / one[f"hisa {kind}"] for one in taken]
        found[kind] = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    return found


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/timing/hisa.json"))
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for shape, (heads, width) in SHAPES.items():
        for length in given.lengths:
            for n_queries in given.queries:
                name = f"{shape}, {length} tokens, {n_queries} queries"
                figures[name] = measure(heads, width, length, n_queries, given.rounds)
                print(name, figures[name], flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"rounds": given.rounds, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    write_json(given.out, record | {"versions": versions(), "device": device_name(), "figures": figures})


if __name__ == "__main__":
    main()
