"""``load``: one door for catalogue names, folders, GGUF files and hub ids."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tokenary.core.errors import FetchError, InputError, OptionError, UnknownNameError, UnsupportedModelError
from tokenary.core.files import one_line, sha256_of
from tokenary.models.catalogue import converted_folder, find
from tokenary.models.convert import convert, quiet
from tokenary.models.fetch import get
from tokenary.models.lm import LM
from tokenary.models.midisim import MidisimConfig, MidisimModel
from tokenary.models.text_diffusion.net import TextDiffusionConfig, TextDiffusionModel
from tokenary.models.text_diffusion.net import load_tokenizer as load_diffusion_tokenizer

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "f32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "float64": torch.float64,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: Networks that transformers does not know, by the model_type of their folders.
_OURS: dict[str, type[PreTrainedModel]] = {
    TextDiffusionConfig.model_type: TextDiffusionModel,
    MidisimConfig.model_type: MidisimModel,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load(
    name: str | os.PathLike[str] = "smollm2",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    progress: bool = False,
) -> LM:
    """Load a language model, ready to run.

    Parameters
    ----------
    name : str or path
        A catalogue name (fetched first where it is not on this machine), a transformers folder, a ``.gguf`` file
        (converted once into the cache folder), or a hub id ``org/name``. An existing path wins over a name.
    dtype : str or torch.dtype
        ``"auto"`` is bfloat16 on a GPU and on a CPU with bfloat16 instructions, else float32.
    device : str or torch.device, optional
        By default the GPU where there is one.
    progress : bool
        Draw a progress bar on stderr while a catalogue model is fetched.

    Raises
    ------
    UnknownNameError
        Neither a file, nor a hub id, nor a catalogue name.
    InputError
        A folder without config or with broken weights, a corrupt GGUF.
    UnsupportedModelError
        Neither a causal language model nor one that fills masks and is known here.
    FetchError
        The hub or a registry gave nothing.
    OptionError
        A wrong dtype or device.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return _from_folder(path, path.name or text, str(path), dtype, device)
    if path.is_file():
        return _from_file(path, dtype, device)
    if path.is_absolute() or text.startswith((".", "~")) or path.suffix == ".gguf":
        raise InputError(f"no such file or folder: {text}")
    if _HUB_ID.fullmatch(text):
        return _from_folder(_snapshot(text), text, f"hub {text}", dtype, device)
    try:
        entry = find(text)
    except UnknownNameError as error:
        error.args = (f"{error} (nor is it a file, a folder or a hub id org/name)",)
        raise
    if entry.kind == "vision":
        where = f"tokenary.models.{entry.name.replace('-', '_')}"
        raise UnsupportedModelError(f"{entry.name} looks at pictures and is no language model: see {where}.load")
    return _from_folder(get(entry, progress), entry.name, entry.source, dtype, device)


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model, not its weights; None where the model has none.

    Parameters
    ----------
    name : str or path
        As `load` takes it; a model that is not on this machine is fetched.

    Raises
    ------
    UnknownNameError, InputError, FetchError
        As `load` does.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = convert(path, "gguf", sha256_of(path))
    elif path.is_absolute() or text.startswith((".", "~")) or path.suffix == ".gguf":
        raise InputError(f"no such file or folder: {text}")
    else:
        folder = _snapshot(text) if _HUB_ID.fullmatch(text) else get(find(text), progress=False)
    try:
        with quiet():
            return _tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{text}: its tokenizer cannot be loaded: {one_line(error)}") from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)  # says now whether the device is there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError("device", str(device), "cpu, or another device that this torch and machine have") from error
    return resolved


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise OptionError("dtype", dtype, f"auto or one of {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def _from_file(file: Path, dtype: torch.dtype, device: torch.device) -> LM:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(f"{file.name} is not a GGUF file (a model is a folder, a .gguf file or a name)")
    folder = convert(file, "gguf", sha256_of(file))
    return _from_folder(folder, file.stem, str(file), dtype, device)


def _snapshot(hub_id: str) -> Path:
    """Bring a hub repository's safetensors, configs and tokenizer; never code or pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        with quiet():
            return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is no hub id: {one_line(error)}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise FetchError(f"cannot fetch {hub_id} from the hub: {one_line(error)}") from error


def _from_folder(folder: Path, name: str, source: str, dtype: torch.dtype, device: torch.device) -> LM:
    """Load a transformers folder; every way it can be broken is one line."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{name}: the folder has no config.json, so it is no transformers model")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{name}: the folder has no .safetensors weights")
    try:
        with quiet():
            model: Any = _model(folder, name, dtype)
            tokenizer = _tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: cannot be loaded, its files are broken or do not fit: {one_line(error)}") from error
    return LM(name, model.to(device).eval(), tokenizer, _fingerprint(folder, weights), source)


def _model(folder: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    ours = _OURS.get(_model_type(folder))
    if ours is not None:
        return _checked(ours.from_pretrained(folder, output_loading_info=True, **options))
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"{name}: {config.model_type} is not a causal language model")
    return _checked(AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options))


def _checked(loaded: Any) -> PreTrainedModel:
    """Take a model from its loading report, unless weights are missing."""
    model, report = loaded
    if report["missing_keys"]:  # transformers only warns, and goes on with random weights
        raise ValueError(f"weights lack {sorted(report['missing_keys'])[0]}")
    return model


def _model_type(folder: Path) -> str:
    return str(PretrainedConfig.get_config_dict(folder)[0].get("model_type"))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    kind = _model_type(folder)
    if kind == TextDiffusionConfig.model_type:
        return load_diffusion_tokenizer(folder / "tokenizer.json")
    if kind in _OURS:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _fingerprint(folder: Path, weights: list[Path]) -> str:
    if folder == converted_folder(folder.name):  # converted here: named by the hash of its source file
        return folder.name
    hashes = [sha256_of(file) for file in weights]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
