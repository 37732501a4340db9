"""Measure which rotary frequencies of a model agree with their heads, for FASA.

The model reads pieces of WikiText-2 and goes on writing; at every token it writes, the top tokens of each head are
compared with those that each of its chunks finds alone. Writes the file that FASA reads:

    python scripts/calibrate_fasa.py --model smollm2 --out src/tokenary/memory/fasa/smollm2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenary.bench.quality import sliding_texts
from tokenary.data import wikitext2
from tokenary.memory.fasa.calibration import write
from tokenary.memory.fasa.chunks import measure_agreement, pairs_of
from tokenary.run import load


def main() -> None:
    """Calibrate one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1500, help="read before writing")
    parser.add_argument("--steps", type=int, default=64, help="tokens written after each text")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512])
    given = parser.parse_args()
    lm = load(given.model, dtype="float32")
    texts = sliding_texts(lm, wikitext2("valid")[:400_000], given.texts, given.tokens)
    pairs = pairs_of(lm.model, "rotation")
    agreement = measure_agreement(lm.model, texts, given.steps, pairs, sorted(given.budgets))
    write(given.out, lm.model, "rotation", agreement)
    for budget, mean in zip(agreement.budgets, agreement.mean, strict=True):
        best = mean.sort(-1, descending=True).values
        print(f"top-{budget}: best chunk {best[..., 0].mean():.3f}, all chunks {mean.mean():.3f}")


if __name__ == "__main__":
    main()
