"""Make our masked-diffusion language model, or its any-subset autoregressive sister, from enwik8.

    python scripts/train_text_diffusion.py prepare --data .carry
    python scripts/train_text_diffusion.py train --data .carry --out out/text-diffusion --minutes 60
    python scripts/train_text_diffusion.py train --data .carry --out out/any-subset --objective any-subset --minutes 60

`prepare` needs enwik8 (fetched through tokenary.data); `train` needs nothing but the folder that `prepare` wrote, takes
a GPU where there is one, goes on where it was broken off, and writes a transformers folder, curve.json and report.json.
`--init FOLDER` starts from another network of the same sizes: on few tokens masked diffusion learns slowly from
nothing, and the any-subset network already answers at masks. report.json of each shipped network holds its settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from tokenary.core.files import write_json
from tokenary.models.text_diffusion.corpus import (
    Corpus,
    clean_wikipedia,
    encode_corpus,
    token_bytes,
    train_tokenizer,
)
from tokenary.models.text_diffusion.training import Training, train


def prepare(data: Path, vocab: int, held_out: float) -> None:
    """Clean, tokenize and split enwik8 into `data`: train.npy, held_out.npy (uint16), tokenizer.json, corpus.json."""
    from tokenary.data import enwik8

    data.mkdir(parents=True, exist_ok=True)
    dump = enwik8()
    articles = list(clean_wikipedia(dump))
    # the pieces are learnt from the training articles alone
    tokenizer = train_tokenizer(articles[: round(len(articles) * (1 - held_out))], vocab)
    corpus = encode_corpus(articles, tokenizer, held_out)
    tokenizer.save(str(data / "tokenizer.json"))
    sizes = token_bytes(tokenizer)
    about = {"source": "enwik8", "source_sha256": hashlib.sha256(dump).hexdigest(), "articles": len(articles)}
    for name, tokens in corpus._asdict().items():
        np.save(data / f"{name}.npy", tokens)
        about[name] = {"tokens": len(tokens), "bytes": int(sizes[tokens].sum())}
    write_json(data / "corpus.json", about)
    print(json.dumps(about))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="enwik8 -> tokens")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--vocab", type=int, default=4096)
    one.add_argument("--held-out", type=float, default=0.02)
    two = commands.add_parser("train", help="tokens -> model")
    two.add_argument("--data", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--checkpoint", type=Path, help="file of the training state (default OUT/checkpoint.pt)")
    two.add_argument("--objective", choices=("diffusion", "any-subset"), default="diffusion")
    two.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("steps", "batch", "length", "short-every", "warmup", "seed", "evaluation-rows"):
        two.add_argument(f"--{name}", type=int)
    for name in ("minutes", "lr", "weight-decay", "ema", "evaluate-every", "save-every"):
        two.add_argument(f"--{name}", type=float)
    two.add_argument("--init", type=Path, help="folder of a model of the same sizes to start from, of either objective")
    two.add_argument("--compile", action="store_true", default=None)
    for name in ("hidden", "layers", "heads", "intermediate"):
        two.add_argument(f"--{name}", type=int, help="size of the network")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        return prepare(arguments.data, arguments.vocab, arguments.held_out)
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    torch.set_float32_matmul_precision("high")
    report = train(
        Corpus(*(np.load(arguments.data / f"{name}.npy") for name in Corpus._fields)),
        Tokenizer.from_file(str(arguments.data / "tokenizer.json")),
        arguments.out,
        Training(**{key: value for key, value in given.items() if key in Training.__dataclass_fields__}),
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        init=arguments.init,
        sizes={key: value for key, value in given.items() if key in ("hidden", "layers", "heads", "intermediate")},
    )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
