"""Measures the codec room beyond its claim: whole archives of longer texts, beside general compressors.

    python scripts/measure_codec.py enwik8 --bytes 262144
    python scripts/measure_codec.py enwik8 --bytes 262144 --codec nacrith:lanes=1 --name enwik8-one-lane
    python scripts/measure_codec.py alice29 --decode
    python scripts/measure_codec.py binaries
    python scripts/measure_codec.py lanes
    python scripts/measure_codec.py speed
    python scripts/measure_codec.py packers --packer "paq8px -12L=./paq8px -12L {in} {out}"

Each writes results/codec/NAME.json. One thread; the size of the model is not counted.
"""

from __future__ import annotations

import argparse
import bz2
import datetime
import io
import json
import lzma
import shlex
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from tokenary.codec.backends import codec_from, machine_of, reader_for
from tokenary.codec.files import compress, decompress, machine_for
from tokenary.core.claim import device_name, versions
from tokenary.core.files import cache_folder
from tokenary.core.packages import fetch_member

FOLDER = Path("results/codec")
ALICE = "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0"


def alice29() -> bytes:
    """Alice's Adventures in Wonderland (1865), the file of the Canterbury corpus, from the source archive of brotli."""
    file = cache_folder() / "data" / "alice29.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        member = "brotli-1.2.0/tests/testdata/alice29.txt"
        fetch_member("pypi-sdist", "brotli==1.2.0", member, ALICE, file)
    return file.read_bytes()


def rivals(data: bytes) -> dict[str, float]:
    """Bits a byte of general compressors at their strongest ordinary setting."""
    import brotli
    import zstandard

    sizes = {
        "gzip -9": len(zlib.compress(data, 9)) + 12,
        "bzip2 -9": len(bz2.compress(data, 9)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "zstd -19": len(zstandard.ZstdCompressor(level=19).compress(data)),
        "brotli -q 11": len(brotli.compress(data, quality=11, lgwin=24)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def packers(size: int, commands: list[str]) -> dict[str, Any]:
    """Bits a byte and seconds of other programs on both texts, beside those that were measured before.

    Each is asked as ``NAME=COMMAND {in} {out}``.
    """
    from tokenary.data.loaders import enwik8

    known = FOLDER / "packers.json"
    rows: dict[str, dict[str, Any]] = json.loads(known.read_text())["rows"] if known.is_file() else {}
    for text, data in (("alice29", alice29()), ("enwik8", enwik8(size))):
        for asked in commands:
            name, _, command = asked.partition("=")
            with tempfile.TemporaryDirectory() as folder:
                source, out = Path(folder) / "text", Path(folder) / "packed"
                source.write_bytes(data)
                words = [word.replace("{in}", str(source)).replace("{out}", str(out)) for word in shlex.split(command)]
                began = time.perf_counter()
                subprocess.run(words, check=True, capture_output=True)
                seconds, packed = time.perf_counter() - began, out.stat().st_size
            rows.setdefault(text, {})[name] = {"bits_per_byte": 8 * packed / len(data), "seconds": seconds}
            print(text, name, rows[text][name], flush=True)
    return {"bytes_of_enwik8": size, "rows": rows}


def archive(data: bytes, codec: str, block: int, decode: bool) -> dict[str, Any]:
    """Compress, and decompress if asked; sizes, times and whether the bytes came back."""
    import torch

    from tokenary.models import load

    torch.set_num_threads(1)
    lm = load("smollm2", dtype="float32")
    machine = machine_for(lm, codec_from(codec), reader_for(lm))
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "x", time.perf_counter()
        found = compress(io.BytesIO(data), out, lambda: (lm, machine), block=block, progress=_print(len(data)))
        seconds, back, took = time.perf_counter() - began, None, None
        if decode:
            sink, began = io.BytesIO(), time.perf_counter()
            decompress(io.BytesIO(out.read_bytes()), sink, lambda header: machine_of(header, lm))
            back, took = sink.getvalue() == data, time.perf_counter() - began
    return {
        "bytes": len(data),
        "archive_bytes": found.packed,
        "bits_per_byte": 8 * found.packed / len(data),
        "coded": found.coded,
        "codec": machine.codec.spec(),
        "block": block,
        "backend": machine.reader.name,
        "model": {"name": lm.name, "sha256": lm.fingerprint},
        "seconds_to_compress": seconds,
        "seconds_to_decompress": took,
        "came_back": back,
    }


def _print(size: int) -> Any:
    last = [0.0]

    def told(done: float, coded: int) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            print(f"{done:.0f} of {size} bytes, {8 * coded / max(done, 1):.4f} bits a byte", flush=True)

    return told


def lanes(size: int) -> dict[str, Any]:
    """Bits a byte of one block of enwik8 in 1 to 16 lanes, and tokens a second of decoding the first 1,024 tokens.

    Lanes are as many as asked, however short.
    """
    import torch

    from tokenary.codec.lockstep import cut, decode, encode, lane_lengths
    from tokenary.data.loaders import enwik8
    from tokenary.models import load

    torch.set_num_threads(1)
    lm, data, rows = load("smollm2", dtype="float32"), enwik8(size), {}
    for count in (1, 2, 4, 8, 16):
        codec = codec_from(f"nacrith:lanes={count},least=64")
        machine = machine_for(lm, codec, reader_for(lm))
        tokens = [token for segment in machine.spelling.segments(data) for token in segment.tokens]
        width = machine.reader.vocab_size

        def coded(ids: list[int], count: int = count, machine: Any = machine, width: int = width) -> list[bytes]:
            method = machine.codec
            opened = method.open(machine.reader, count)
            return encode(opened, method.ensemble(width, count), cut(ids, count), machine.start)

        whole = sum(map(len, coded(tokens)))
        first = tokens[:1024]
        data_first = coded(first)
        began = time.perf_counter()
        opened = codec.open(machine.reader, count)
        back = decode(opened, codec.ensemble(width, count), lane_lengths(len(first), count), data_first, machine.start)
        rows[count] = {
            "bits_per_byte": 8 * whole / len(data),
            "tokens_a_second_decoding": len(first) / (time.perf_counter() - began),
            "came_back": [token for lane in back for token in lane] == first,
        }
        print(count, rows[count], flush=True)
    return {"bytes": size, "lanes": rows}


def speed(size: int) -> dict[str, Any]:
    """Tokens a second of the beginning of enwik8, at most 2,048 tokens, in 1 and 8 lanes, and of plain decoding.

    Plain decoding is transformers' own pass, one token at a time behind a cache, in the same weights as float32, with
    nothing coded. Beside it stands which share of our decoding the model's passes take; the rest is the ensemble, the
    n-grams and the coder.
    """
    import torch

    from tokenary.codec.lockstep import cut, decode, encode, lane_lengths
    from tokenary.data.loaders import enwik8
    from tokenary.models import load

    torch.set_num_threads(1)
    lm, rows = load("smollm2", dtype="float32"), {}
    reader, codec = reader_for(lm), codec_from("nacrith")
    machine, width = machine_for(lm, codec, reader), reader.vocab_size
    tokens = [token for segment in machine.spelling.segments(enwik8(size)) for token in segment.tokens][:2048]
    encode(codec.open(reader, 2), codec.ensemble(width, 2), cut(tokens[:64], 2), machine.start)  # compiles
    for count in (1, 8):
        began = time.perf_counter()
        coded = encode(codec.open(reader, count), codec.ensemble(width, count), cut(tokens, count), machine.start)
        middle, opened = time.perf_counter(), _Timed(codec.open(reader, count))
        back = decode(opened, codec.ensemble(width, count), lane_lengths(len(tokens), count), coded, machine.start)
        took = time.perf_counter() - middle
        rows[count] = {
            "tokens_a_second_encoding": len(tokens) / (middle - began),
            "tokens_a_second_decoding": len(tokens) / took,
            "share_of_decoding_in_the_model": opened.seconds / took,
            "came_back": [token for lane in back for token in lane] == tokens,
        }
        print(count, rows[count], flush=True)
    past, began = None, time.perf_counter()
    with torch.inference_mode():
        for token in tokens[:256]:
            past = lm.model(torch.tensor([[token]]), past_key_values=past, use_cache=True).past_key_values
    plain = min(len(tokens), 256) / (time.perf_counter() - began)
    return {"tokens": len(tokens), "lanes": rows, "tokens_a_second_plain_decoding": plain}


class _Timed:
    """Lanes that add up how long they compute."""

    def __init__(self, lanes: Any) -> None:
        self.lanes, self.exact, self.drop, self.seconds = lanes, lanes.exact, lanes.drop, 0.0

    def read(self, tokens: Any) -> Any:
        began = time.perf_counter()
        states = self.lanes.read(tokens)
        self.seconds += time.perf_counter() - began
        return states

    def logits(self, states: Any) -> Any:
        began = time.perf_counter()
        logits = self.lanes.logits(states)
        self.seconds += time.perf_counter() - began
        return logits


def binaries() -> dict[str, Any]:
    """Archives of data that are not text, as a share above the smallest of raw, gzip, bzip2 and xz."""
    import random

    import numpy as np

    draws = random.Random(0)
    kinds = {
        "zeros, 10 MB": bytes(10_000_000),
        "random, 1 MB": draws.randbytes(1_000_000),
        "already packed, 1 MB": lzma.compress(draws.randbytes(1_000_000)),
        "float64 noise, 2 MB": np.random.default_rng(0).normal(size=250_000).tobytes(),
        "a compiled library": max(Path(np.__file__).parent.rglob("*.so"), key=lambda p: p.stat().st_size).read_bytes()[
            :2_000_000
        ],
        "every byte in turn": bytes(range(256)) * 100,
        "one byte": b"\x00",
        "nothing": b"",
    }
    rows = {}
    for name, data in kinds.items():
        packed = [
            len(data),
            len(zlib.compress(data, 9)) + 12,
            len(bz2.compress(data, 9)),
            len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        ]
        with tempfile.TemporaryDirectory() as folder:
            found = compress(io.BytesIO(data), Path(folder) / "x", _no_model)
        best = min(packed)
        rows[name] = {
            "bytes": len(data),
            "archive_bytes": found.packed,
            "best_plain_bytes": best,
            "within_0.1_percent_and_64_bytes": found.packed <= 1.001 * best + 64,
        }
    return {"rows": rows}


def _no_model() -> Any:
    raise AssertionError("no model is needed for these")


def main() -> None:
    """Run one measurement and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("enwik8", "alice29", "binaries", "lanes", "speed", "packers"))
    parser.add_argument("--bytes", type=int, default=1 << 18, help="of enwik8")
    parser.add_argument("--first", type=int, default=0, help="of enwik8, where to begin")
    parser.add_argument("--codec", default="nacrith")
    parser.add_argument("--block", type=int, default=1 << 18)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--packer", action="append", default=[], help="another program, as NAME=COMMAND {in} {out}")
    parser.add_argument("--name", default=None, help="of the record")
    asked = parser.parse_args()
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if asked.what == "binaries":
        record = binaries()
    elif asked.what == "lanes":
        record = lanes(asked.bytes)
    elif asked.what == "speed":
        record = speed(asked.bytes)
    elif asked.what == "packers":
        record = packers(asked.bytes, asked.packer)
    else:
        if asked.what == "enwik8":
            from tokenary.data.loaders import enwik8

            data = enwik8(asked.first + asked.bytes)[asked.first :]
        else:
            data = alice29()
        record = archive(data, asked.codec, asked.block, asked.decode) | {"rivals": rivals(data)}
    record |= {"what": asked.what, "started_at": began, "versions": versions(), "device": device_name(), "threads": 1}
    file = FOLDER / f"{asked.name or asked.what}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
