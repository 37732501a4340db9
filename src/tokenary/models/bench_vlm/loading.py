"""Save and load trained models: half-precision safetensors, and a JSON file with the sizes and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokenary.core.errors import InputError, UnknownNameError
from tokenary.core.files import write_json
from tokenary.models.bench_vlm.model import SIZES, BenchVLM, VLMConfig
from tokenary.models.bench_vlm.vocabulary import VOCABULARY
from tokenary.models.catalogue import WEIGHTS

PREFIX = "bench-vlm-"  # of the folders of models that ship


def save(model: BenchVLM, folder: Path, **facts: Any) -> None:
    """Write ``model.safetensors`` (float16) and ``config.json`` to a folder.

    Parameters
    ----------
    model : BenchVLM
        Its weights may be on any device.
    folder : Path
        Made where it is not there.
    facts : JSON values
        Written into the configuration beside the sizes: seed, steps, accuracies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    state.pop("language.lm_head.weight", None)  # tied to the embedding
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"sizes": model.config.to_dict(), "vocabulary": list(VOCABULARY.tokens), **facts}
    write_json(folder / "config.json", config)


def load(name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> BenchVLM:
    """Load a trained model in eval mode.

    Parameters
    ----------
    name : str or Path
        One of `available`, for example ``"s-0"`` (size and training seed), or a folder that `save` wrote.
    dtype : torch.dtype
        Of the weights in memory.
    device : str
        Where they go.

    Raises
    ------
    UnknownNameError
        Neither a folder nor a model that is there.
    InputError
        The folder was written with another vocabulary or is damaged.
    """
    folder = folder_of(name)
    try:
        config = json.loads((folder / "config.json").read_text())
        sizes, vocabulary = VLMConfig(**config["sizes"]), tuple(config["vocabulary"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is no configuration of a bench VLM") from error
    if vocabulary != VOCABULARY.tokens:
        raise InputError(f"{folder} was trained with another vocabulary than this version of the package has")
    model = BenchVLM(sizes)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or set(missing) - {"language.lm_head.weight"}:
        raise InputError(f"{folder / 'model.safetensors'} does not fit its config.json")
    return model.to(device=device, dtype=dtype).eval()


def folder_of(name: str | Path) -> Path:
    """Return the folder of a model that ships, or the one that is given.

    Raises
    ------
    UnknownNameError
        Neither a folder nor a model that is there.
    """
    for folder in (Path(name), WEIGHTS / f"{PREFIX}{name}"):
        if (folder / "config.json").exists():
            return folder
    raise UnknownNameError("bench VLM", str(name), available())


def facts_of(name: str | Path) -> dict[str, Any]:
    """Return what was written down of a model: sizes, seed, steps, accuracies, ``gates`` where its training ended."""
    facts: dict[str, Any] = json.loads((folder_of(name) / "config.json").read_text(encoding="utf-8"))
    return facts


def available() -> list[str]:
    """Names of the models that ship with the package, the largest first."""
    names = (path.parent.name.removeprefix(PREFIX) for path in WEIGHTS.glob(f"{PREFIX}*/config.json"))
    sizes = list(SIZES)
    return sorted(names, key=lambda name: (-sizes.index(size_of(name)), name))


def size_of(name: str) -> str:
    """Return the size in the name of a model that ships."""
    return name.rpartition("-")[0]
