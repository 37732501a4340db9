"""Train the feature maps and gates of still on SmolLM2-135M, or another model, by attention transfer.

    python scripts/train_still.py --out src/tokenary/memory/still/weights

About twenty minutes on one core. Each update reads one text of Wikipedia prose (enwik8). The maps of the method and
those of its controls learn from the same passes. Written are model.safetensors (int8 rows, gates of rank 32) and a file
for each control, config.json, curve.json and report.json. The texts of the curve's measurements are never trained on.

With --rank a second stage follows: low-rank updates of the projections by the loss of the next token. It writes a model
of its own into OUT/tuned, to be used with the same maps: --model OUT/tuned --with still:weights=OUT.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from tokenary import load
from tokenary.core.files import write_json
from tokenary.data import enwik8
from tokenary.memory.learnt import mark
from tokenary.memory.still import STILL
from tokenary.memory.still.maps import Maps, save_maps
from tokenary.memory.still.passes import Pass, passes
from tokenary.memory.still.routing import Rule
from tokenary.memory.still.training import Variant, middle_layers, transfer
from tokenary.memory.still.tuning import tune
from tokenary.models.text_diffusion.corpus import clean_wikipedia

VARIANTS = (
    Variant(),
    Variant(routing="recent"),
    Variant(routing="random"),
    Variant(features="hedgehog"),
    Variant(rescale=True),
)
CHECKS = 2  # held-out texts


@torch.no_grad()
def error(found: dict[int, Pass], maps: Mapping[int, Maps] | None, rule: Rule) -> float:
    """Mean over layers of the squared error over the mean square; without maps, that of the exact branch alone."""
    first, errors = 2 * rule.chunk, []
    for layer, seen in found.items():
        truth, (plan, exact) = seen.softmax(first), seen.exact(rule, layer, first)
        said = exact.sums / exact.mass if maps is None else seen.hybrid(maps[layer], rule, plan, exact, first)
        errors.append(float((said - truth).square().mean() / truth.square().mean()))
    return sum(errors) / len(errors)


def main() -> None:
    """Train, and write what was learned."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", type=int, nargs="+", help="by default some in the middle")
    parser.add_argument("--steps", type=int, default=150, help="texts, one update each")
    parser.add_argument("--length", type=int, default=1024, help="tokens a text")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--salient", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0, help="of low-rank updates, for a second stage; 0 for none")
    parser.add_argument("--rank-steps", type=int, default=100, help="texts of the second stage")
    given = parser.parse_args()
    began = time.perf_counter()

    second = given.rank_steps if given.rank else 0
    lm = load(given.model, dtype="float32", optimize=False) if second else load(given.model)
    assert lm.tokenizer is not None
    rule = Rule(given.chunk, given.salient)
    layers = given.layers or middle_layers(lm.model)
    articles = "\n".join(islice(clean_wikipedia(enwik8(4_000_000)), 400))
    ids = lm.tokenizer(articles, verbose=False)["input_ids"]
    texts = [
        ids[at : at + given.length] for at in range(0, (CHECKS + given.steps + second) * given.length, given.length)
    ]
    assert len(texts[-1]) == given.length, "the text is too short"
    held_out = [passes(lm.model, text, layers) for text in texts[:CHECKS]]

    def measured(variant: Variant, maps: Mapping[int, Maps] | None) -> float:
        return sum(error(found, maps, variant.rule(rule)) for found in held_out) / len(held_out)

    curve: list[dict[str, object]] = []
    steps = transfer(lm.model, layers, texts[CHECKS : CHECKS + given.steps], VARIANTS, rule, given.seed)
    maps: dict[str, dict[int, Maps]] = {}
    for step, (maps, loss) in enumerate(tqdm(steps, total=given.steps), start=1):
        if step == 1 or step % 30 == 0 or step == given.steps:
            found = {variant.name: measured(variant, maps[variant.name]) for variant in VARIANTS}
            curve.append({"step": step, "loss": loss, "held_out": found})
            tqdm.write(str(curve[-1]))

    for name, trained in maps.items():
        save_maps(given.out, name, trained, mark(lm.model) if name == "model" else None)
    one = maps["model"][layers[0]]
    sizes = {"heads": one.heads, "size": one.size, "hidden": one.gate.in_features}
    config = {**sizes, "layers": layers, "model_layers": lm.model.config.num_hidden_layers}
    write_json(given.out / "config.json", {**config, "chunk": rule.chunk, "salient": rule.salient})
    write_json(given.out / "curve.json", curve)
    report = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "steps": given.steps,
        "text_tokens": given.steps * given.length,
        "seed": given.seed,
        "parameters": sum(p.numel() for each in maps["model"].values() for p in each.parameters()),
        "held_out": curve[-1]["held_out"],
        "held_out_of_the_exact_branch_alone": {
            variant.routing: measured(variant, None) for variant in VARIANTS if variant.features == "norm"
        },
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "threads": torch.get_num_threads(),
    }
    write_json(given.out / "report.json", report)
    print(report)
    if second:
        policy = STILL(rule.chunk, rule.salient, weights=str(given.out))
        policy.prepare(lm.model)
        losses = list(tqdm(tune(lm.model, policy, texts[-second:], given.rank, seed=given.seed), total=second))
        lm.model.save_pretrained(given.out / "tuned")
        lm.tokenizer.save_pretrained(given.out / "tuned")
        write_json(given.out / "tuned" / "losses.json", losses)


if __name__ == "__main__":
    main()
