"""Train the CIFAR-10 classifier on one CPU core; interrupted, it goes on where it was.

    python scripts/train_cifar_vit.py --out src/tokenary/models/weights/cifar-vit --work out/cifar-vit

Writes ``model.safetensors`` (float16), ``config.json`` and ``report.json`` (settings, curve, accuracy on the 10,000
test pictures) to --out when the run is over; the checkpoint stands in --work. The curve is measured on 1,000 pictures
held out of the training split.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

from tokenary.core.files import write_json
from tokenary.data import cifar10
from tokenary.models.cifar_vit import ViTConfig, accuracy, load, save
from tokenary.models.cifar_vit.training import Trainer, Training
from tokenary.models.training import fast_products

HELD_OUT = 1000


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in (*fields(ViTConfig), *fields(Training)):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")
    args = parser.parse_args()
    config = ViTConfig(**{option.name: getattr(args, option.name) for option in fields(ViTConfig)})
    settings = Training(**{option.name: getattr(args, option.name) for option in fields(Training)})
    pixels, labels = (torch.from_numpy(array) for array in cifar10("train"))
    trainer = Trainer(config, settings, pixels[:-HELD_OUT], labels[:-HELD_OUT], args.work / "checkpoint.pt")
    state, start = trainer.state, time.monotonic()
    bar = tqdm(total=trainer.steps, initial=state.step, mininterval=10, unit="step")
    while state.step < trainer.steps:
        loss = trainer.run_epoch()
        if state.step % trainer.steps_an_epoch == 0:
            with fast_products():
                held_out = accuracy(trainer.model, pixels[-HELD_OUT:], labels[-HELD_OUT:])
            epoch = state.step // trainer.steps_an_epoch
            point = {"epoch": epoch, "seconds": round(state.seconds), "loss": round(loss, 4), "held_out": held_out}
            state.curve.append(point)
            bar.write(json.dumps(point))
        trainer.checkpoint.save()
        bar.update(state.step - bar.n)
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            bar.close()
            print(f"stopped at step {state.step} of {trainer.steps}; the same command goes on from there")
            return
    bar.close()
    save(trainer.model, args.out)
    model = load(args.out)  # what is reported is what was written, float16 and all
    test = cifar10("test")
    report = {
        "settings": {**config.to_dict(), **asdict(settings)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_pictures": len(trainer.pixels),
        "steps": state.step,
        "minutes": round(state.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "test_accuracy": accuracy(model, torch.from_numpy(test.pixels), torch.from_numpy(test.labels)),
        "curve": state.curve,
    }
    write_json(args.out / "report.json", report)
    print(f"accuracy on 10,000 test pictures: {report['test_accuracy']:.4f}, {report['minutes']} minutes")


if __name__ == "__main__":
    main()
