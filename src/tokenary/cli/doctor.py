"""``tokenary doctor``: what this machine and this installation can and cannot do."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from tokenary.cli import output

#: The versions that every release is tested with; minor ones of transformers do change the interfaces that `hf` uses.
TESTED = {"python": "3.11", "torch": "2.13", "transformers": "5.23"}
EXTRAS = {
    "models": ("onnx",),
    "codec": ("constriction", "zstandard", "brotli"),
    "ray": ("ray",),
    "dev": ("pytest", "hypothesis", "ruff", "mypy"),
}
PEERS = {"llama-cpp-python": "llama_cpp", "cyllama": "cyllama"}


def doctor(as_json: bool = output.JSON) -> None:
    """Say what this machine can do, and what is missing.

    Example: [bold]tokenary doctor[/bold]
    """
    found = examine()
    if as_json:
        output.as_json(found)
        return
    rows = []
    for name, value in found["versions"].items():
        tested = TESTED.get(name)
        word = "" if tested is None else "tested" if _matches(value, tested) else f"not tested; {tested} is"
        rows.append([name, value, word])
    machine = found["machine"]
    rows += [
        ["processor", machine["cpu"], f"{machine['cores']} cores, torch uses {machine['threads']} threads"],
        ["bfloat16 on the CPU", _yes(machine["cpu_bf16"]), ", ".join(machine["cpu_features"])],
        ["packed linear layers", _yes(machine["packing"]), "oneDNN"],
        ["memory", output.size(machine["memory_bytes"]), f"{output.size(machine['memory_free_bytes'])} free"],
        ["GPU", machine["gpu"] or "none", ""],
        ["model cache", found["cache"], f"{output.size(found['cache_free_bytes'])} free on its disk"],
        ["models ready", ", ".join(found["models_ready"]) or "none", "tokenary models get NAME fetches one"],
        ["TOKENARY_DATA", found["data"] or "not set", "folder of public data sets; else they are downloaded"],
    ]
    rows += [
        [f"extra {name}", _yes(there), "" if there else f"pip install 'tokenary[{name}]'"]
        for name, there in found["extras"].items()
    ]
    rows += [[name, _yes(there), "a peer of tokenary compare --peers"] for name, there in found["peers"].items()]
    output.table(["", "here", ""], rows)
    typer.echo()
    for text in found["can"]:
        typer.echo(f"can:    {text}")
    for text in found["cannot"]:
        typer.echo(f"cannot: {text}")


def examine() -> dict[str, Any]:
    """Look at the machine and the installation; return plain JSON types."""
    import shutil

    import psutil
    import torch

    from tokenary.core.claim import device_name
    from tokenary.models.catalogue import cache_folder, list_models

    capabilities = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "sve")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = psutil.virtual_memory()
    bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    machine = {
        "platform": platform.platform(),
        "cpu": _processor(device_name() if gpu is None else platform.processor()),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cpu_features": [name for name in names if capabilities.get(name)],
        "cpu_bf16": bf16,
        "packing": torch.backends.mkldnn.is_available(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "gpu": gpu,
    }
    found: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("tokenary", "torch", "transformers", "tokenizers", "numpy", "numba")},
        },
        "tested": TESTED,
        "machine": machine,
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(existing).free,
        "models_ready": [row["name"] for row in list_models() if row["on_disk"]],
        "data": os.environ.get("TOKENARY_DATA"),
        "extras": {name: all(map(_installed, needed)) for name, needed in EXTRAS.items()},
        "peers": {name: _installed(module) for name, module in PEERS.items()},
    }
    found["can"], found["cannot"] = _verdicts(found)
    return found


def _verdicts(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What follows from the findings, in plain words."""
    machine, can, cannot = found["machine"], [], []
    can.append(
        f"decode in {'bfloat16' if machine['cpu_bf16'] or machine['gpu'] else 'float32'} (the default of --dtype auto)"
    )
    if machine["gpu"]:
        can.append(f"use the GPU, {machine['gpu']}")
    else:
        cannot.append("run claims that need a GPU: their verdict stays 'needs a GPU'")
    if not (machine["cpu_bf16"] or machine["gpu"]):
        cannot.append("decode in bfloat16 at a profit: the processor has no instructions for it")
    if machine["packing"]:
        can.append("pack linear layers for oneDNN's kernels")
    else:
        cannot.append("pack linear layers: this torch has no oneDNN, so greedy decoding is slower")
    for name, tested in TESTED.items():
        if not _matches(found["versions"][name], tested):
            cannot.append(f"vouch for {name} {found['versions'][name]}: tested with {tested}")
    if "smollm2" in found["models_ready"]:
        can.append("run tokenary compare without a download")
    else:
        cannot.append("run the default model before it is fetched: tokenary models get smollm2 (93 MB)")
    if not found["extras"]["models"]:
        cannot.append("fetch minimind2-small: pip install 'tokenary[models]'")
    if machine["memory_free_bytes"] < 2e9:
        cannot.append("be sure of SmolLM2-135M in float32 with a long context: less than 2 GB of memory is free")
    if found["data"] and not os.path.isdir(found["data"]):
        cannot.append(f"read TOKENARY_DATA: no such folder: {found['data']}")
    return can, cannot


def _matches(found: str, tested: str) -> bool:
    return found == tested or found.startswith(tested + ".")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _processor(name: str) -> str:
    return name or platform.machine()


def _yes(value: bool) -> str:
    return "yes" if value else "no"
