"""Distil a lightning indexer onto SmolLM2-135M, or another model with rotary positions, for hisa.

    python scripts/train_hisa_indexer.py --out src/tokenary/memory/hisa/weights

About twenty minutes on one core. It reads Wikipedia prose of enwik8, and writes model.safetensors (float16),
config.json, curve.json and report.json. The text of the curve's measurements is never trained on.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from tokenary import load
from tokenary.core.files import write_json, written_whole
from tokenary.core.seeding import substream
from tokenary.data import enwik8
from tokenary.hf.rotation import Rotation, rotation_of
from tokenary.memory.hisa.indexer import LightningIndexer
from tokenary.memory.hisa.training import HEADS, WIDTH, Looks, captured, distil, divergence, looks
from tokenary.memory.learnt import mark
from tokenary.models.text_diffusion.corpus import clean_wikipedia

#: How many texts of how many tokens.
LENGTHS = {2048: 60, 4096: 12, 8192: 6}
CHECK, TOP = 4096, 128


@torch.no_grad()
def measure(indexers: list[LightningIndexer], check: list[Looks], rotation: Rotation) -> dict[str, float]:
    """Mean over layers of the loss, and of the attention that the 128 tokens chosen, and the best 128, get."""
    pairs = list(zip(indexers, check, strict=True))
    shares = [captured(indexer, look, rotation, TOP) for indexer, look in pairs]
    return {
        "kl": sum(divergence(indexer, look, rotation).item() for indexer, look in pairs) / len(pairs),
        "captured": sum(share for share, _ in shares) / len(pairs),
        "best": sum(best for _, best in shares) / len(pairs),
    }


def main() -> None:
    """Train, and write what was learned."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--share", type=float, default=1.0, help="of the texts; below one for a try")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began, seed = time.perf_counter(), given.seed

    lm = load(given.model)
    assert lm.tokenizer is not None
    rotation = rotation_of(lm.model)
    articles = "\n".join(islice(clean_wikipedia(enwik8(8_000_000)), 800))
    ids = lm.tokenizer(articles, verbose=False)["input_ids"]
    lengths = [length for length, count in LENGTHS.items() for _ in range(max(1, round(count * given.share)))]
    substream(seed, "hisa lengths").shuffle(lengths)
    longest = min(lm.context_length, max(lengths))
    texts, at = [], CHECK
    for length in lengths:
        texts.append(ids[at : at + min(length, longest)])
        at += len(texts[-1])
    assert len(texts[-1]) == min(lengths[-1], longest), "the text is too short"

    check = looks(lm.model, ids[:CHECK], torch.arange(TOP, CHECK, 16))
    curve: list[dict[str, float]] = []
    indexers: list[LightningIndexer] = []
    for step, (indexers, loss) in enumerate(tqdm(distil(lm.model, rotation, texts, seed), total=len(texts)), start=1):
        if step % 6 == 0 or step == len(texts):
            curve.append(
                {"texts": step, "tokens": len(texts[step - 1]), "loss": loss} | measure(indexers, check, rotation)
            )
            tqdm.write(str(curve[-1]))

    first = indexers[0]
    tensors = {name: tensor.half().contiguous() for name, tensor in nn.ModuleList(indexers).state_dict().items()}
    with written_whole(given.out / "model.safetensors") as stream:
        stream.write(save(tensors | {"mark": mark(lm.model)}))
    sizes = {"query_size": first.query.in_features, "key_size": first.key.in_features}
    write_json(given.out / "config.json", {**sizes, "heads": HEADS, "width": WIDTH, "layers": len(indexers)})
    write_json(given.out / "curve.json", curve)
    report = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "texts": len(texts),
        "text_tokens": sum(map(len, texts)),
        "seed": seed,
        "parameters": sum(p.numel() for p in nn.ModuleList(indexers).parameters()),
        "held_out": curve[-1],
        "captured_by_layer": [captured(i, look, rotation, TOP) for i, look in zip(indexers, check, strict=True)],
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "threads": torch.get_num_threads(),
    }
    write_json(given.out / "report.json", report)
    print(report)


if __name__ == "__main__":
    main()
