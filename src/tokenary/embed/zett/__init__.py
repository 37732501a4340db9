"""ZeTT: a hypernetwork predicts the rows of any tokenizer's tokens from their old pieces.

    E'[t] = H(E[p_1], ..., E[p_m]),    p = the pieces of t under the old tokenizer, m <= 7

H is trained once a model (``scripts/train_zett.py``), on tokenizers sampled anew at every step, and then serves any
tokenizer. Unlike the paper, tokens that both vocabularies have are copied, H is narrow, and an untied head is asked for
like the input table instead of by a second output. A prediction is written in a basis of D old rows, chosen by
pivoting, so that the transfer is a token map like any other; that is exact, since D such rows span the space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.embed.base import Mixture, Transplant, pieces_of
from tokenary.embed.zett.net import Hypernetwork, surface
from tokenary.hf.tokenizer import Vocabulary

CARD = Card(
    slug="zett",
    cls="ZeTT",
    room="embed",
    slot="vocabulary",
    title="Zero-Shot Tokenizer Transfer",
    summary="a small network, trained once a model, predicts the embedding rows of any tokenizer's tokens",
    paper="2405.07883",
    year=2024,
    code="bminixhofer/zett",
    training="minutes",
)
WEIGHTS = Path(__file__).with_name("weights")
_CHUNK = 2048


class ZeTT(Transplant):
    """Predicts rows with a hypernetwork.

    Parameters
    ----------
    weights : str
        Folder of a trained hypernetwork; by default the one for SmolLM2-135M.
    steps : int
        Train a new one instead, so many steps, to predict the model's own rows from their pieces; that takes no text.
    seed : int
        Of that training.
    """

    reads_rows = True
    toy_options: ClassVar[dict[str, int]] = {"steps": 3}

    def __init__(self, weights: str = "", steps: Annotated[int, Field(ge=0, le=100_000)] = 0, seed: int = 0) -> None:
        self.weights, self.steps, self.seed = weights, steps, seed

    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Predict the rows, and write them in a basis of old ones.

        Raises
        ------
        UnsupportedModelError
            The hypernetwork belongs to another model.
        InputError
            Its folder cannot be read.
        """
        net = self._network(source, rows)
        parts = pieces_of(source, target, new)
        some = [place for place, part in enumerate(parts) if part]
        made = predict(net, rows, [parts[place] for place in some])
        basis = pivots(rows, sorted(source.id_of.values()))
        weight = torch.linalg.solve(rows[basis].double(), made.double(), left=False)
        owner = torch.repeat_interleave(torch.tensor(some, dtype=torch.int64), len(basis))
        return Mixture(owner, basis.repeat(len(some)), weight.flatten().float())

    def _network(self, source: Vocabulary, rows: Tensor) -> Hypernetwork:
        if self.steps:
            from tokenary.embed.zett.training import train_on_rows

            return train_on_rows(source, rows, self.steps, self.seed)
        net = load_network(Path(self.weights) if self.weights else WEIGHTS)
        if net.mean.shape[0] != rows.shape[1] or torch.cosine_similarity(net.mean, rows.mean(0), dim=0) < 0.9:
            raise UnsupportedModelError(
                "the hypernetwork of zett was trained for another model: train one with scripts/train_zett.py, or give"
                " steps=2000 to train a simple one here"
            )
        return net


def load_network(folder: Path) -> Hypernetwork:
    """Load a trained hypernetwork.

    Raises
    ------
    InputError
        The folder lacks its files.
    """
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no hypernetwork (config.json, model.safetensors)")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    net = Hypernetwork(torch.zeros(2, config["hidden_size"]), config["width"], config["layers"])
    net.load_state_dict(weights)
    return net.eval()


@torch.inference_mode()
def predict(net: Hypernetwork, rows: Tensor, parts: Sequence[Sequence[int]]) -> Tensor:
    """Return the predicted rows (N, D) of tokens with these pieces, of which none is empty; `rows` is (V, D)."""
    found = [rows.new_zeros(0, rows.shape[1])]
    for start in range(0, len(parts), _CHUNK):
        ids, mask = surface(parts[start : start + _CHUNK])
        found.append(net(rows[ids], mask))
    return torch.cat(found)


def pivots(rows: Tensor, among: Sequence[int]) -> Tensor:
    """Choose D rows that span the space well: each time the one that the chosen ones leave most of.

    Parameters
    ----------
    rows : Tensor
        (V, D).
    among : sequence of int
        Candidates, of which eight times D evenly spaced ones are looked at.

    Returns
    -------
    Tensor
        (D,) int64.

    Raises
    ------
    UnsupportedModelError
        The rows span less than D dimensions.
    """
    size = rows.shape[1]
    ids = torch.tensor(among)
    ids = ids[torch.linspace(0, len(ids) - 1, min(len(ids), 8 * size)).long()]
    left = rows[ids].double()
    least = 1e-6 * left.norm(dim=-1).max()
    chosen: list[Tensor] = []
    for _ in range(size):
        lengths = left.norm(dim=-1)
        best = lengths.argmax()
        if lengths[best] <= least:
            raise UnsupportedModelError(f"the rows of this model span {len(chosen)} of {size} dimensions")
        chosen.append(best)
        direction = left[best] / lengths[best]
        left = left - torch.outer(left @ direction, direction)
    return ids[torch.stack(chosen)]
