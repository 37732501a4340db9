"""Train a bench VLM from scratch, on a GPU or on two CPU cores; interrupted, it goes on where it was.

    python scripts/train_bench_vlm.py --size xs --steps 10000 --compile --out out/xs-0
    python scripts/train_bench_vlm.py --size s --minutes 8.5 --batch 256 --workers 14 --compile --out out/s-0

Writes ``model.safetensors`` (float16), ``config.json`` and ``report.json`` (curve, accuracy with and without pictures,
gates) to --out; the checkpoint to --work.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # drawing is many small operations

import argparse
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenary.core.files import write_json
from tokenary.models.bench_vlm.loading import save
from tokenary.models.bench_vlm.training import State, Trainer, TrainingOptions


def arguments() -> argparse.Namespace:
    """Read the command line: one option a field of `TrainingOptions`, and where to run and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in fields(TrainingOptions):
        flag = f"--{option.name.replace('_', '-')}"
        if option.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kind = int if option.name == "steps" else type(option.default)
            parser.add_argument(flag, type=kind, default=option.default)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder of the checkpoint; --out/checkpoint without it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="a line now and then instead of a bar")
    return parser.parse_args()


def write(trainer: Trainer, folder: Path, final: dict[str, Any] | None = None) -> None:
    """Write the model and what is known of it; without `final` it is a snapshot of an unfinished run."""
    options, state = trainer.options, trainer.state
    on_gpu = trainer.device.type == "cuda"
    facts = {
        "seed": options.seed,
        "finished": final is not None,
        "steps": state.step,
        "scenes": state.scenes,
        "minutes": round(state.seconds / 60, 2),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    judged = {key: final[key] for key in ("full", "blind", "gates")} if final else {}
    save(trainer.model, folder, **facts, **judged)
    record = {**facts, "options": asdict(options), "final": final, "curve": state.curve}
    write_json(folder / "report.json", record)


def main() -> None:
    """Train, measure, write."""
    args = arguments()
    options = TrainingOptions(**{option.name: getattr(args, option.name) for option in fields(TrainingOptions)})
    torch.set_float32_matmul_precision("high")
    start = time.monotonic()
    trainer = Trainer(options, torch.device(args.device), args.work or args.out / "checkpoint")
    name = f"{options.size}-{options.seed}"
    if trainer.state.step:
        print(f"{name} goes on at step {trainer.state.step}, {trainer.progress:.0%} done", flush=True)
    bar = tqdm(total=1000, disable=args.quiet, unit="‰", mininterval=1.0, desc=name)
    shown_at, shown_scenes, points = start, trainer.state.scenes, len(trainer.state.curve)

    def report(state: State, parts: dict[str, Any]) -> None:
        nonlocal shown_at, shown_scenes, points
        now = time.monotonic()
        if len(state.curve) > points:
            points = len(state.curve)
            scores = " ".join(f"{family}={value:.2f}" for family, value in state.curve[-1]["accuracy"].items())
            bar.write(f"{name} {trainer.progress:4.0%} {scores}")
            write(trainer, args.out)
        if now - shown_at > 10:
            losses = " ".join(f"{part}={float(value):.3f}" for part, value in parts.items())
            line = f"step {state.step} {(state.scenes - shown_scenes) / (now - shown_at):.0f} scenes/s {losses}"
            shown_at, shown_scenes = now, state.scenes
            bar.set_postfix_str(line)
            if args.quiet:
                print(f"{name} {trainer.progress:4.0%} {line}", flush=True)
        bar.update(int(1000 * trainer.progress) - bar.n)

    try:
        trainer.run(report)
    except KeyboardInterrupt:
        trainer.checkpoint.save()
        print(f"stopped at step {trainer.state.step}; the same command goes on from there")
        return
    finally:
        bar.close()
    final = trainer.final_report()
    write(trainer, args.out, final)
    for family, gate in final["gates"].items():
        verdict = "passed" if gate["passed"] else "MISSED"
        print(f"{name} {family:10} full {final['full'][family]:.3f} blind {final['blind'][family]:.3f} {verdict}")
    state = trainer.state
    print(f"{args.out}: {state.step} steps, {state.scenes} scenes, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
