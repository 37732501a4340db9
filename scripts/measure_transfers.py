"""Bits a byte of a model under other tokenizers, by method, domain and sort of token: one JSON file a model.

    python scripts/measure_transfers.py --model smollm2 --to gpt2 --to qwen2.5 --to supertoken --to hindi

A target is a name of `tokenary tokenizer list`, ``supertoken`` (see the claim of tokenadapt), or ``hindi``: a BPE
learned from messages in Hindi, Marathi, Nepali and English, measured on the Universal Declaration in Hindi as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokenary.bench.bits import Window, windows
from tokenary.claims.transplanting import domains, moved, new_tokenizer
from tokenary.core.claim import device_name, versions
from tokenary.core.files import write_json
from tokenary.core.recipe import Step
from tokenary.core.registry import cards
from tokenary.data import udhr
from tokenary.models import load
from tokenary.tokenize.base import load_tokenizer
from tokenary.tokenize.parallel import django_catalogues
from tokenary.tokenize.training import train_bpe


def tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that a target names."""
    if name == "supertoken":
        return new_tokenizer("supertoken", 0)
    if name == "hindi":
        texts = [text for found in django_catalogues(["hi", "mr", "ne"]).values() for text in found.values()]
        return train_bpe(texts, 8192).tokenizer
    return load_tokenizer(name).tokenizer


def hindi(count: int) -> list[Window]:
    """Return windows of the Declaration in Hindi."""
    return windows("\n".join(udhr("hin").values()), count)


def main() -> None:
    """Measure every target, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--to", action="append", required=True)
    parser.add_argument("--method", action="append", help="tokenadapt:encoder=characters; all of the room without it")
    parser.add_argument("--count", type=int, default=6, help="windows of each domain")
    parser.add_argument("--steps", type=int, default=0, help="of training the rows afterwards")
    parser.add_argument("--train", action="append", help="a method whose rows are trained; all without it")
    parser.add_argument("--out", type=Path, default=Path("results/transfers"))
    given = parser.parse_args()
    lm = load(given.model)
    lm.model.requires_grad_(False)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{lm.name}.json"
    names = given.method or [card.slug for card in cards(room="embed")]
    record = {"model": lm.name, "fingerprint": lm.fingerprint, "dtype": str(lm.dtype), "count": given.count}
    record |= {"versions": versions(), "device": device_name(), "targets": {}}
    if file.is_file():  # what was measured of this model before stays
        before = json.loads(file.read_text(encoding="utf-8"))
        record["targets"] = before["targets"] if before["fingerprint"] == lm.fingerprint else {}
    for name in given.to:
        texts = domains(given.count) | ({"hindi": hindi(given.count)} if name == "hindi" else {})
        methods: dict[str, Any] = {method: Step.parse(method).build() for method in names}
        arms, facts = moved(lm, tokenizer(name), methods, texts, given.steps, given.train or names)
        record["targets"][name] = facts | {"bits_a_byte": {arm: found.details() for arm, found in arms.items()}}
        print(name, json.dumps(record["targets"][name], indent=1), flush=True)
        write_json(file, record)


if __name__ == "__main__":
    main()
