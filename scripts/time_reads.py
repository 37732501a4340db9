"""Time what reading a part of a cache costs: one decoded token in one layer, against attention to everything.

Keys and values are random, of the shape of SmolLM2-135M (9 query heads, 3 key heads, 64 dimensions); how long a choice
takes does not depend on what they hold. Everything a method does while decoding is inside the clock. Writes ratios to
attention with everything read (below 1 is faster), and the length from which on a method is faster:

    python scripts/time_reads.py --out results/timing/reads.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenary.core.claim import device_name, versions
from tokenary.hf.cache import PassInfo, TokenLayer
from tokenary.hf.rotation import Rotation
from tokenary.memory.fasa import FASA
from tokenary.memory.fasa.chunks import dominant
from tokenary.memory.read_oracle import ReadOracle
from tokenary.memory.read_recent import ReadRecent
from tokenary.memory.token_select import TokenSelect

HEADS, KV_HEADS, SIZE = 9, 3, 64
PAIRS = torch.stack([torch.arange(SIZE // 2), torch.arange(SIZE // 2) + SIZE // 2], dim=1)


def readers() -> dict[str, Any]:
    """Layers of every method at its default budget."""
    made: dict[str, Any] = {}
    for name, reuse in {"token-select": 1.0, "token-select, reuse": -1.0}.items():
        policy = TokenSelect(reuse=reuse)
        policy.rotation = Rotation(PAIRS, 1e5 ** -(torch.arange(SIZE // 2) / (SIZE // 2)))
        made[name] = policy.layer(1)
    generator = torch.Generator().manual_seed(0)
    agreement = torch.rand(HEADS, SIZE // 2, generator=generator)  # sets that differ between heads as much as they can
    for name, shared in (("fasa", False), ("fasa, sets=group", True)):
        fasa = FASA(dense=0)
        fasa._dims = [PAIRS[dominant(agreement, SIZE // 8, HEADS // KV_HEADS, shared)].flatten(1)]
        made[name] = fasa.layer(0)
    made["read-oracle"], made["read-recent"] = ReadOracle().layer(1), ReadRecent().layer(1)
    return made


def filled(length: int) -> TokenLayer:
    """A layer that holds `length` random tokens, one of them just come."""
    layer = TokenLayer([PassInfo()])
    for count in (length - 1, 1):
        layer.shared[0] = PassInfo(positions=torch.zeros(1, count, dtype=torch.long), prompt=count > 1)
        layer.update(*torch.randn(2, 1, KV_HEADS, count, SIZE).unbind(0))
    return layer


def everything(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to everything, as the cache does."""
    folded = query.reshape(1, KV_HEADS, -1, SIZE)
    return scaled_dot_product_attention(folded, key, value)


def measure(length: int, repeats: int) -> dict[str, float]:
    """Median seconds of everything, interleaved, after a pass that is thrown away."""
    layer, query = filled(length), torch.randn(1, HEADS, 1, SIZE)
    key, value = layer.keys, layer.values
    assert key is not None and value is not None
    states, times = readers(), dict[str, list[float]]()
    for repeat in range(repeats + 1):
        for name, state in {"everything": None, **states}.items():
            began = time.perf_counter()
            if state is None or state.attend(layer, query, key, value, None, SIZE**-0.5) is None:
                everything(query, key, value)
            if repeat:
                times.setdefault(name, []).append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def crossover(lengths: list[int], ratios: list[float]) -> float | None:
    """Length from which on a ratio stays below 1, between measured ones by their logarithms; None if it never does."""
    if ratios[-1] >= 1:
        return None
    last = max((at for at, ratio in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return float(lengths[0])
    low, high = math.log(ratios[last]), math.log(ratios[last + 1])
    share = low / (low - high)
    return lengths[last] ** (1 - share) * lengths[last + 1] ** share


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/timing/reads.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        seconds = [measure(length, given.repeats) for length in given.lengths]
    ratios = {name: [found[name] / found["everything"] for found in seconds] for name in seconds[0]}
    record = {
        "what": "one decoded token in one layer: time over that of attention to everything",
        "shape": {"query_heads": HEADS, "key_heads": KV_HEADS, "head_dim": SIZE, "dtype": "float32"},
        "lengths": given.lengths,
        "ratios": {name: [round(ratio, 3) for ratio in found] for name, found in ratios.items()},
        "crossover": {name: crossover(given.lengths, found) for name, found in ratios.items() if name != "everything"},
        "milliseconds of everything": [round(1000 * found["everything"], 3) for found in seconds],
        "repeats": given.repeats,
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, found in record["ratios"].items():
        print(f"{name:22}", *(f"{ratio:8.2f}" for ratio in found), record["crossover"].get(name))


if __name__ == "__main__":
    main()
