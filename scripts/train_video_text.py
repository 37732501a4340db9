"""Train the video-text network on one CPU core, then tune it to each way of reducing; interrupted, it goes on.

    python scripts/train_video_text.py --out src/tokenary/models/weights/video-text --work out/video-text

About 35 minutes. Writes ``model.safetensors`` (float16; the blocks behind the reduction once for each way, the rest
once), ``config.json`` and ``report.json`` (settings, curves on held-out stories) to --out; checkpoints stand in --work.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenary.claims.centerclip import ARMS, AT, attached
from tokenary.core.files import write_json
from tokenary.models.training import fast_products
from tokenary.models.video_text import VideoText, VideoTextConfig, candidates, gallery, ranks, save, similarity
from tokenary.models.video_text.loading import NONE, tail_names
from tokenary.models.video_text.retrieval import caption_vectors, twins
from tokenary.models.video_text.training import Pool, Trainer, Training
from tokenary.reduce.base import Point


def trained(trainer: Trainer, held_out: Any, every: int) -> dict[str, Any]:
    """Run to the end, with a point of the curve every so many steps; return the report."""
    state = trainer.state
    while state.step < trainer.settings.steps:
        loss = trainer.run(every)
        trainer.model.eval()
        with fast_products():
            cosines = similarity(trainer.model, held_out, trainer.within)
        twin = torch.tensor(twins(held_out.stories))
        before = (cosines.diagonal() > cosines.gather(1, twin.clamp_min(0)[:, None])[:, 0])[twin >= 0]
        point = {"step": state.step, "seconds": round(state.seconds), "loss": round(loss, 4)}
        point["recall_at_1"] = round(float((ranks(cosines) == 0).float().mean()), 4)
        point["before_its_twin"] = round(float(before.float().mean()), 4)
        state.curve.append(point)
        trainer.checkpoint.save()
        print(trainer.name, json.dumps(state.curve[-1]), flush=True)
    return {"minutes": round(state.seconds / 60, 1), "curve": state.curve}


def main() -> None:
    """Train, tune, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in fields(Training):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    parser.add_argument("--stories", type=int, default=8000, help="different training stories")
    parser.add_argument("--tune-steps", type=int, default=200)
    parser.add_argument("--tune-batch", type=int, default=48)
    parser.add_argument("--tune-lr", type=float, default=5e-4)
    parser.add_argument("--gallery", type=int, default=200, help="held-out clips for the curve")
    parser.add_argument("--every", type=int, default=100, help="steps between two points of it")
    parser.add_argument("--base-only", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    args = parser.parse_args()
    settings = Training(**{option.name: getattr(args, option.name) for option in fields(Training)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = VideoText(VideoTextConfig())
    stories = candidates("train", settings.seed, args.stories)
    pool = Pool(stories, caption_vectors(stories))
    model.fit_scale(pool.vectors)
    held_out = gallery("val", settings.seed, args.gallery)
    report = {"base": trained(Trainer(model, settings, pool, args.work / "base.pt"), held_out, args.every)}
    if args.base_only:
        return
    tail = tail_names(model.config, Point.parse(AT, model.config.layers).layers[-1])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning = Training(
        steps=args.tune_steps, batch=args.tune_batch, frames=settings.rendered, rendered=settings.rendered,
        lr=args.tune_lr, weight_decay=settings.weight_decay, dense=0.0, captions=0, seed=settings.seed + 1,
    )  # fmt: skip
    arms = {}
    for arm in (NONE, *ARMS):
        model.load_state_dict(start)
        within = partial(attached, model, arm, settings.rendered, settings.seed)
        trainer = Trainer(model, tuning, pool, args.work / f"{arm}.pt", arm, tail, within)
        report[arm] = trained(trainer, held_out, args.every)
        arms[arm] = {name: part.clone() for name, part in model.state_dict().items() if name.startswith(tail)}
    facts = {"seed": settings.seed, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    save(model, args.out, arms, **facts)
    about = {"settings": asdict(settings), "tuning": asdict(tuning), "threads": torch.get_num_threads(), **facts}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    write_json(args.out / "report.json", {**about, **report})


if __name__ == "__main__":
    main()
