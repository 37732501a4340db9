"""The router: from what the small model says of its own token to the probability that the token leads astray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenary.core.errors import InputError
from tokenary.core.files import sha256_of
from tokenary.core.seeding import substream
from tokenary.models.catalogue import WEIGHTS
from tokenary.models.smollm2_small import FOLDER as SMALL

FOLDER = WEIGHTS / "r2r"
TOP = 100


def top_logits(logits: Tensor, top: int = TOP) -> Tensor:
    """Return the largest logits (n, top) of (n, V), falling; the least one repeated where V < top."""
    values = logits.float().topk(min(top, logits.shape[-1])).values
    return torch.cat([values, values[:, -1:].expand(-1, top - values.shape[1])], dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy (n,) of the distributions of logits (n, V), in nats."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).nansum(-1)


def aleatoric(logits: Tensor, top: int = 10) -> Tensor:
    """Aleatoric uncertainty (n,) of logits (n, V), in nats (arXiv 2502.00290).

    The largest logits are read as evidence a of a Dirichlet distribution over their tokens; this is the expected
    entropy of what it draws, ``-sum_k a_k / a_0 (digamma(a_k + 1) - digamma(a_0 + 1))`` with ``a_0 = sum_k a_k``.
    """
    evidence = logits.float().topk(min(top, logits.shape[-1])).values.clamp(min=1e-6)
    total = evidence.sum(-1, keepdim=True)
    return -(evidence / total * (torch.digamma(evidence + 1) - torch.digamma(total + 1))).sum(-1)


def features(hidden_states: Tensor, token_embeddings: Tensor, logits: Tensor) -> Tensor:
    """Join what the router sees, (n, 2 d + 100); the logits as log-probabilities among themselves."""
    return torch.cat([hidden_states.float(), token_embeddings.float(), logits.float().log_softmax(-1)], dim=1)


class Router(nn.Module):
    """An MLP over the small model's last hidden state, the embedding of its token and its largest logits.

    Parameters
    ----------
    hidden : int
        Width of the small model.
    width : int
        Of the router.
    blocks : int
        Residual blocks: LayerNorm, four times wider linear, GELU, dropout, linear, dropout.
    dropout : float
        In training.
    input_dropout : float
        In training, of hidden state and embedding: with some thousand labels they are soon learnt by heart.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, hidden: int, width: int = 192, blocks: int = 2, dropout: float = 0.1, input_dropout: float = 0.8
    ) -> None:
        super().__init__()
        size = 2 * hidden + TOP
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.states = nn.Dropout(input_dropout)
        self.logits = nn.Linear(TOP, width)
        self.input = nn.Linear(2 * hidden + width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(4 * width, width),
                nn.Dropout(dropout),
            )
            for _ in range(blocks)
        )
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, hidden_states: Tensor, token_embeddings: Tensor, logits: Tensor) -> Tensor:
        """Return the log-odds (n,) of divergence.

        Parameters
        ----------
        hidden_states, token_embeddings : Tensor
            (n, d) each: the small model's last hidden state, and its input embedding of the token it chose.
        logits : Tensor
            (n, 100), from `top_logits`.
        """
        parts = (features(hidden_states, token_embeddings, logits) - self.mean) / self.scale
        states, top = parts.split([parts.shape[1] - TOP, TOP], dim=1)
        x = self.input(torch.cat([self.states(states), self.logits(top)], dim=1))
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)[:, 0]


class Trained:
    """Scores by the trained router: the probability of divergence."""

    def __init__(self, router: Router, small: PreTrainedModel) -> None:
        self.router, self.embed = router.to(small.device), small.get_input_embeddings()

    def __call__(
        self, hidden_states: Tensor, logits: Tensor, tokens: list[int], names: list[tuple[int, int]]
    ) -> Tensor:
        """Score the tokens (n) that the small model chose from logits (n, V) at hidden states (n, d)."""
        embedded = self.embed(torch.tensor(tokens, device=logits.device))
        return self.router(hidden_states, embedded, top_logits(logits)).sigmoid()


class Switch:
    """Scores by a function of the small model's logits alone."""

    def __init__(self, measure: Callable[[Tensor], Tensor]) -> None:
        self.measure = measure

    def __call__(
        self, hidden_states: Tensor, logits: Tensor, tokens: list[int], names: list[tuple[int, int]]
    ) -> Tensor:
        """Score the positions of logits (n, V)."""
        return self.measure(logits)


class Random:
    """The control: a number in [0, 1) that depends on the seed, the row and the position alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(
        self, hidden_states: Tensor, logits: Tensor, tokens: list[int], names: list[tuple[int, int]]
    ) -> Tensor:
        """Score the positions named (row, position)."""
        return torch.tensor([substream(self.seed, "r2r", *name).random() for name in names])


def read_config(folder: Path = FOLDER, small: Path = SMALL) -> dict[str, Any]:
    """Read sizes, threshold and calibration of the shipped router.

    Raises
    ------
    InputError
        If it is not there, or was trained on another small model than the one that stands beside it.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"no trained router: {file} is not there")
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["small_sha256"] != sha256_of(small / "model.safetensors"):
        raise InputError("the trained router belongs to another small model; run scripts/train_r2r_router.py")
    return config


def load_router(config: dict[str, Any], folder: Path = FOLDER) -> Router:
    """Load the shipped router."""
    router = Router(config["hidden"], config["width"], config["blocks"])
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    router.load_state_dict(weights)
    return router.eval()
