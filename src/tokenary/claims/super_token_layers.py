"""What the claim about super tokens tunes and measures: ways for early blocks of a ViT to attend to less."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenary.core.errors import InputError
from tokenary.core.files import one_line, sha256_of, write_json
from tokenary.core.seeding import substream
from tokenary.models.catalogue import WEIGHTS
from tokenary.models.cifar_vit import CifarViT
from tokenary.models.cifar_vit.training import augmented
from tokenary.models.training import fast_products, schedule
from tokenary.reduce.super_token import Cells, among_super_tokens

LAYERS = (0, 1, 2)  # the first half; the others attend to all, as the paper's late stages do
CELL = 2
WINDOW = 4
ARMS = ("super tokens", "hard grid", "random", "windows", "full")
FOLDER = WEIGHTS / "cifar-vit-super-token"


def attending(model: CifarViT, arm: str, seed: int = 0, cell: int = CELL) -> AbstractContextManager[None]:
    """Let the first blocks attend in one of the ways of `ARMS`, inside a ``with`` block.

    ``hard grid`` is pooling attention; ``random`` shares each token out among the nine super tokens around it by
    numbers that are drawn once and do not look at it; ``windows`` are of 4 x 4 patches, with the class token; ``full``
    changes nothing.
    """
    cells = dict.fromkeys(LAYERS, (cell, cell))
    if arm == "super tokens":
        return among_super_tokens(model, cells)
    if arm == "hard grid":
        return among_super_tokens(model, cells, association="hard")
    if arm == "random":
        return among_super_tokens(model, cells, association=_Drawn(seed))
    return _windows(model) if arm == "windows" else nullcontext()


class _Drawn:
    """A Q that is drawn once for every way of cutting a grid."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, x: Tensor, cells: Cells) -> Tensor:
        shape = (*cells.tokens.shape[1:], cells.neighbours.shape[1])
        logits = torch.from_numpy(2 * substream(self.seed, "super tokens", *shape).standard_normal(shape)).float()
        q = logits.masked_fill(~cells.near[0, :, None], float("-inf")).softmax(-1)
        return (q * cells.there[..., None]).expand(len(x), -1, -1, -1)


@contextlib.contextmanager
def _windows(model: CifarViT) -> Iterator[None]:
    """Mask what lies in other windows; the class token sees all and is seen by all."""
    rows, columns = model.grid
    window = torch.arange(rows)[:, None] // WINDOW * columns + torch.arange(columns) // WINDOW
    label = torch.cat([torch.tensor([-1]), window.flatten()])
    seen = (label[:, None] == label) | (label[:, None] < 0) | (label < 0)
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))

    def windowed(attention: Any) -> Any:
        def forward(x: Tensor, sizes: Tensor | None = None) -> Tensor:
            q, k, v = attention.project(x)
            weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias.to(q.dtype)).softmax(-1)
            return attention.out((weights @ v).transpose(1, 2).flatten(2))

        return forward

    attentions: list[Any] = [model.get_submodule(f"blocks.{layer}.attention") for layer in LAYERS]
    for attention in attentions:
        attention.forward = windowed(attention)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def tuned_names(model: CifarViT) -> list[str]:
    """Weights that are tuned: attention and its norm, in the first blocks."""
    parts = tuple(f"blocks.{layer}.{part}." for layer in LAYERS for part in ("norm1", "attention"))
    return [name for name, _ in model.named_parameters() if name.startswith(parts)]


def tune(
    model: CifarViT,
    arm: str,
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 125,
    lr: float = 5e-4,
    seed: int = 0,
) -> list[float]:
    """Tune the attention of the first blocks to one way of attending, in place; every arm sees the same pictures.

    Parameters
    ----------
    model : CifarViT
        It stays in its mode for inference: the statistics of the stem are not touched.
    arm : str
        One of `ARMS`.
    pixels, labels : Tensor
        (N, 32, 32, 3) uint8 and (N,).
    steps, batch, lr
        Of AdamW, with a cosine to zero.
    seed : int
        Of the order of pictures and their crops.

    Returns
    -------
    list of float
        The loss of every step.
    """
    wanted, losses = set(tuned_names(model)), []
    parameters = [p.requires_grad_(name in wanted) for name, p in model.named_parameters()]
    chosen = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.01)
    order = substream(seed, "super tokens", "order").permutation(len(pixels))
    with attending(model, arm, seed):
        for step in range(steps):
            rows = torch.from_numpy(order[torch.arange(step * batch, (step + 1) * batch).numpy() % len(order)])
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step / steps, 0.1)
            with fast_products():
                logits = model(augmented(pixels[rows], 3, seed, step))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    model.requires_grad_(False)
    return losses


def save_tuned(arms: dict[str, dict[str, Tensor]], folder: Path, base: Path, **facts: Any) -> None:
    """Write the tuned weights of all arms in float16, and what they were tuned from."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{arm}/{name}": part.half().contiguous() for arm, parts in arms.items() for name, part in parts.items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", {"base": sha256_of(base), **facts})


def load_tuned(folder: Path, base: Path) -> dict[str, dict[str, Tensor]]:
    """Read the tuned weights of all arms, float32.

    Raises
    ------
    InputError
        They are not there, broken, or tuned from other weights than those in the file `base`.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        made_from = about["base"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder.name}: run scripts/tune_super_token.py first: {one_line(error)}") from error
    if made_from != sha256_of(base):
        raise InputError(f"{folder.name}: tuned from other weights; run scripts/tune_super_token.py again")
    arms: dict[str, dict[str, Tensor]] = {arm: {} for arm in ARMS}
    for key, part in state.items():
        arm, _, name = key.partition("/")
        arms[arm][name] = part.float()
    return arms
