"""Time reading a prompt block-sparsely, selection included, against SDPA; writes results/timing/pbs-attn.json.

    python scripts/time_block_sparse.py [--device cuda] [--repeats 3] [--whole 2048 ...] [--piece 2048 32768 ...]

Keys and values are random, in the shapes of real models. Random keys are all alike, so the share of the attention that
is asked for (`mass`) is the share of blocks that is read: real density, no real selection. A *whole* prompt is read in
one pass, and SDPA is causal. A *piece* is the last 1024 tokens of a longer prompt, and SDPA gets a mask, as it does in
`Target.prefill`; since SDPA with a mask is slow on CPUs, the same kernel over all blocks (mass 1, keys unsorted) stands
beside it. Ways are interleaved; the median counts. The crossover is where the time ratio becomes 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenary.core.claim import device_name, versions
from tokenary.memory.pbs_attn import PBSAttn

SHAPES = {"SmolLM2-135M": (9, 3, 64), "Qwen2.5-1.5B": (12, 2, 128)}  # query heads, key heads, size of a head
MASSES = (0.1, 0.25, 0.5)
PIECE = 1024
OUTPUT = Path(__file__).parents[1] / "results" / "timing" / "pbs-attn.json"


def dense(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Return full attention, as the package computes it: causal for a whole prompt, masked for a piece."""
    heads, n_queries, size = query.shape
    n_keys = key.shape[1]
    if n_queries == n_keys:
        q, k, v = query[None], key[None], value[None]
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    places = torch.arange(n_keys, device=query.device)
    seen = places <= places[-n_queries:, None]
    term = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -math.inf)
    mask = term.repeat(heads // len(key), 1)
    folded = query.reshape(len(key), -1, size)
    return lambda: scaled_dot_product_attention(folded, key, value, attn_mask=mask)


def timed(ways: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way, interleaved; a first round is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                found[name].append(time.perf_counter() - began)
    return found


def measure(shape: str, n_queries: int, n_keys: int, repeats: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Time one shape: sorted keys at every mass, unsorted keys at one and at all of it, over SDPA."""
    heads, kv_heads, size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def states(count: int, tokens: int) -> Tensor:
        return torch.randn(count, tokens, size, generator=generator).to(device, dtype)

    query, key, value = states(heads, n_queries), states(kv_heads, n_keys), states(kv_heads, n_keys)
    policies = {f"mass={mass}": PBSAttn(mass=mass) for mass in MASSES}
    for mass in (MASSES[1], 1):
        policies[f"mass={mass},order=none"] = PBSAttn(mass=mass, order="none")
    layers = {name: policy.layer(0) for name, policy in policies.items()}
    ways: dict[str, Callable[[], Any]] = {"sdpa": dense(query, key, value)}
    for name, state in layers.items():
        ways[name] = lambda state=state: state.read(query, key, value, size**-0.5)
    seconds = timed(ways, repeats, device)
    base = statistics.median(seconds["sdpa"])
    return {
        "shape": shape,
        "queries": n_queries,
        "positions": n_keys,
        "sdpa_seconds": base,
        "sdpa_spread": max(seconds["sdpa"]) / min(seconds["sdpa"]),
        "ways": {
            name: {
                "density": round(layers[name].density, 4),
                "times_sdpa": round(statistics.median(seconds[name]) / base, 3),
                "spread": round(max(seconds[name]) / min(seconds[name]), 3),
            }
            for name in layers
        },
    }


def crossover(rows: list[dict[str, Any]], way: str) -> float | None:
    """Positions from which a way is faster than SDPA, log-linear between lengths; None where it never is."""
    points = [(math.log(row["positions"]), row["ways"][way]["times_sdpa"]) for row in rows]
    for at, (length, ratio) in enumerate(points):
        if all(later < 1 for _, later in points[at:]):
            if at == 0:
                return round(math.exp(length))
            before, slower = points[at - 1]
            return round(math.exp(before + (length - before) * (slower - 1) / (slower - ratio)))
    return None


def main() -> None:
    """Run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--piece", type=int, nargs="*", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    record: dict[str, Any] = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "repeats": args.repeats,
        "rows": [],
        "crossover": {},
    }
    with torch.inference_mode():
        for shape in SHAPES:
            for kind, lengths in (("whole", args.whole), ("piece", args.piece)):
                rows = []
                for length in lengths:
                    n_queries = length if kind == "whole" else min(PIECE, length)
                    row = {"kind": kind, **measure(shape, n_queries, length, args.repeats, args.device, dtype)}
                    rows.append(row)
                    told = {name: (way["density"], way["times_sdpa"]) for name, way in row["ways"].items()}
                    print(f"{shape} {kind} {length}: {told}", flush=True)
                record["rows"] += rows
                ways = rows[0]["ways"] if rows else {}
                record["crossover"][f"{shape}, {kind}"] = {way: crossover(rows, way) for way in ways}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["crossover"], indent=1))


if __name__ == "__main__":
    main()
