"""Tune the first blocks of the CIFAR-10 classifier to attend among super tokens, and to the rivals of the claim.

    python scripts/tune_super_token.py

Every arm starts from the classifier that ships and sees the same pictures in the same order; only the attention of the
first three blocks and its norms learn. Writes ``model.safetensors`` and ``config.json`` to --out. An arm takes one to
two minutes on a core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from tokenary.claims.super_token_layers import ARMS, FOLDER, save_tuned, tune, tuned_names
from tokenary.data import cifar10
from tokenary.models.cifar_vit import load
from tokenary.models.cifar_vit.loading import SHIPPED

HELD_OUT = 1000  # as in the classifier's own training


def main() -> None:
    """Tune all arms, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pixels, labels = (torch.from_numpy(array[:-HELD_OUT]) for array in cifar10("train"))
    arms, report = {}, {}
    for arm in ARMS:
        model, start = load(args.model), time.process_time()
        losses = tune(model, arm, pixels, labels, steps=args.steps, seed=args.seed)
        names = tuned_names(model)
        arms[arm] = {name: part.detach().clone() for name, part in model.state_dict().items() if name in names}
        quarter = max(1, len(losses) // 4)
        report[arm] = {
            "first_loss": round(statistics.fmean(losses[:quarter]), 4),
            "last_loss": round(statistics.fmean(losses[-quarter:]), 4),
            "core_seconds": round(time.process_time() - start),
        }
        print(arm, report[arm], flush=True)
    facts = {"steps": args.steps, "seed": args.seed, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    save_tuned(arms, args.out, args.model / "model.safetensors", **facts, curve=report)


if __name__ == "__main__":
    main()
