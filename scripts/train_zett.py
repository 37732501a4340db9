"""Train the hypernetwork of ZeTT for SmolLM2-135M: on its rows, then through the frozen model on sampled tokenizers.

    python scripts/train_zett.py --out src/tokenary/embed/zett/weights

About half an hour on one core. It reads enwik8 and the sources of Python's standard library, and writes
model.safetensors (float16), config.json, curve.json and report.json. A twentieth of the vocabulary's tokens is never
predicted in training; the report says how well their rows are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from tokenary import load
from tokenary.core.files import write_json, written_whole
from tokenary.core.seeding import substream
from tokenary.data import enwik8, stdlib_code
from tokenary.embed.zett.training import (
    LR,
    RowExamples,
    TextExamples,
    TokenizerSampler,
    cosines,
    descend,
    fresh,
    row_loss,
    set_rate,
)
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import roles, rust_tokenizer, tables
from tokenary.models.text_diffusion.corpus import clean_wikipedia

WIDTH, LAYERS = 256, 3
TEXT_LR, LEXICAL, ROW_BATCH = 3e-4, 0.5, 256
BATCH, LENGTH, NEGATIVES = 8, 48, 512
SNIPPET = 16_384


def texts(seed: int) -> Iterator[str]:
    """Yield pieces of Wikipedia prose without end, every fourth one Python source."""
    articles = "\n".join(islice(clean_wikipedia(enwik8(20_000_000)), 4000))
    code = stdlib_code(seed, 4_000_000)
    for number in range(1 << 30):
        kind = code if number % 4 == 3 else articles
        start = int(substream(seed, "zett text", number).integers(0, len(kind) - SNIPPET))
        yield kind[start : start + SNIPPET]


def main() -> None:
    """Train, and write what was learned."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--row-steps", type=int, default=900)
    parser.add_argument("--text-steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began, seed = time.perf_counter(), given.seed

    lm = load("smollm2", dtype="bfloat16", optimize=False)
    assert lm.tokenizer is not None
    lm.model.requires_grad_(False)
    rows = tables(lm.model)[0].detach().float()
    source = Vocabulary(rust_tokenizer(lm.tokenizer), roles(lm.tokenizer), rows=len(rows))
    ids = np.array(sorted(source.id_of.values()))
    held = substream(seed, "zett held out").random(len(ids)) < 0.05
    examples, unseen = (RowExamples(source, ids[part].tolist()) for part in (~held, held))
    check = unseen.batch(2048, substream(seed, "zett check"))
    net, optimizer = fresh(rows, seed, WIDTH, LAYERS)
    curve: list[dict[str, float]] = []

    for step in tqdm(range(given.row_steps), desc="rows", mininterval=10):
        set_rate(optimizer, LR, step, given.row_steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = row_loss(net, rows, examples.batch(512, substream(seed, "zett rows", step)))
        descend(net, optimizer, loss)
        if step % 100 == 99:
            cosine, mean = cosines(net, rows, check)
            curve.append({"phase": 1, "step": step + 1, "row_loss": loss.item(), "cosine": cosine, "mean": mean})
            tqdm.write(str(curve[-1]))

    stream_of_texts, snippets = texts(seed), texts(seed + 1)
    sampler = TokenizerSampler(stream_of_texts, seed=seed)
    reader = TextExamples(lm.model, source, rows, sampler, (text[:1024] for text in snippets))
    optimizer = torch.optim.AdamW(net.parameters(), lr=TEXT_LR, betas=(0.9, 0.95), weight_decay=0.01)
    for step in tqdm(range(given.text_steps), desc="text", mininterval=10):
        set_rate(optimizer, TEXT_LR, step, given.text_steps)
        stream = substream(seed, "zett text step", step)
        with torch.autocast("cpu", torch.bfloat16):
            text_loss = reader.loss(net, BATCH, LENGTH, NEGATIVES, stream)
            lexical = row_loss(net, rows, examples.batch(ROW_BATCH, stream))
        descend(net, optimizer, text_loss + LEXICAL * lexical)
        if step % 10 == 9:
            cosine, mean = cosines(net, rows, check)
            point = {"phase": 2, "step": step + 1, "text_loss": text_loss.item(), "row_loss": lexical.item()}
            curve.append(point | {"cosine": cosine, "mean": mean})
            tqdm.write(str(curve[-1]))

    with written_whole(given.out / "model.safetensors") as stream:
        stream.write(save({name: tensor.half() for name, tensor in net.state_dict().items()}))
    write_json(given.out / "config.json", {"hidden_size": rows.shape[1], "width": WIDTH, "layers": LAYERS})
    write_json(given.out / "curve.json", curve)
    cosine, mean = cosines(net, rows, check)
    report = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "row_steps": given.row_steps,
        "text_steps": given.text_steps,
        "text_tokens": given.text_steps * BATCH * LENGTH,
        "seed": seed,
        "parameters": sum(p.numel() for p in net.parameters()),
        "cosine_of_unseen_rows": cosine,
        "cosine_of_the_mean_of_pieces": mean,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "threads": torch.get_num_threads(),
    }
    write_json(given.out / "report.json", report)
    print(report)


if __name__ == "__main__":
    main()
