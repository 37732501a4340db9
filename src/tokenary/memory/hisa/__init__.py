"""HISA (2026, arXiv 2603.28458): reads the tokens that a small indexer scores highest, found by searching blocks first.

DSA scores all past tokens with a *lightning indexer*, much cheaper than attention, and attends to the best k alone. The
indexer still looks at every token. HISA finds (nearly) the same tokens while looking at few, with the same indexer::

    J[t, b] = sum_j w[t, j] relu(q[t, j] . mean of k over block b)      C = the m best blocks, the first, and that of t
    I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s])     s in C             read the k best s

Up to k tokens everything is read; up to m blocks the result is DSA's; beyond, about L / B + m B scores are computed
instead of L. With ``search=flat`` it is DSA; with ``search=blocks`` whole blocks are read (block-sparse attention).

An indexer belongs to a model. That of SmolLM2-135M is shipped (``scripts/train_hisa_indexer.py``); for another model a
rough one is trained on a few texts that the model writes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError, RecipeError, UnsupportedModelError
from tokenary.hf.rotation import Rotation, rotation_of
from tokenary.memory.hisa.indexer import LightningIndexer, belongs_to, load_indexers
from tokenary.memory.hisa.layer import HisaLayer
from tokenary.memory.hisa.plan import Forced, Plan, Search
from tokenary.memory.hisa.training import distil
from tokenary.memory.learnt import fits, own_texts
from tokenary.memory.read_base import PartialRead

CARD = Card(
    slug="hisa",
    cls="HISA",
    room="memory",
    title="HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention",
    summary="reads the tokens that a small distilled indexer scores highest, found by searching blocks first",
    slot="read",
    paper="2603.28458",
    year=2026,
    code="MuLabPKU/TransArch",
    training="minutes",
    requires=("kv-cache", "rope"),
    refuses=(
        ("keep", "its index holds every token, and takes a token's place in the cache for its position"),
        ("store", "its index is made of keys as the model computed them, which a store does not keep"),
    ),
)
WEIGHTS = Path(__file__).with_name("weights")
OWN_LENGTH = 256  # tokens of a text that a model writes to train on

__all__ = ["CARD", "HISA"]


class HISA(PartialRead):
    """Read the tokens of highest index score.

    Parameters
    ----------
    read : Budget
        Tokens that a query reads, k, itself included; a share is of what it may see.
    block : int
        Tokens a block, B.
    blocks : int
        Blocks that are searched, m; more where the tokens would not fit in.
    ratio : float
        Search one of so many blocks instead (4 in the paper); 0 for a fixed number.
    forced : {"beside", "inside"}
        Whether the first block and that of the query come on top of m, or count among them.
    search : {"hierarchical", "flat", "blocks"}
        Blocks, then tokens; all tokens (DSA); or blocks alone, as many as `read` allows, all of whose tokens are read.
    prefill : {"dense", "sparse"}
        Whether the tokens of the prompt read everything, or what is found for them.
    weights : str
        Folder of a trained indexer; by default the one for SmolLM2-135M.
    train : int
        Short texts to train a rough one on where that does not fit; 0 to refuse the model instead.
    seed : int
        Of that training.

    Raises
    ------
    OptionError
        If a number of tokens does not fit into the blocks that are searched.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {"read": 8, "train": 2, "block": 4, "blocks": 3}

    def __init__(
        self,
        read: Budget = Budget(tokens=256),  # noqa: B008 (frozen)
        block: Annotated[int, Field(ge=1, le=4096)] = 32,
        blocks: Annotated[int, Field(ge=1)] = 32,
        ratio: Annotated[float, Field(ge=0)] = 0.0,
        forced: Forced = "beside",
        search: Search = "hierarchical",
        prefill: Literal["dense", "sparse"] = "dense",
        weights: str = "",
        train: Annotated[int, Field(ge=0, le=1000, json_schema_extra={"remote": False})] = 24,
        seed: int = 0,
    ) -> None:
        super().__init__(read)
        if search == "hierarchical" and not ratio and read.tokens is not None and read.tokens > blocks * block:
            raise OptionError("blocks", blocks, f"enough for read={read}: at least {-(-read.tokens // block)}")
        self.plan = Plan(block, blocks, ratio, forced, search)
        self.prefill, self.weights, self.train, self.seed = prefill, weights, train, seed
        self._ready: tuple[list[LightningIndexer], Rotation] | None = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Load the indexer of a model, or train one.

        Raises
        ------
        UnsupportedModelError
            The model has no rotary positions, or the indexer belongs to another one.
        InputError
            The folder of weights cannot be read.
        """
        rotation = rotation_of(model)
        folder = Path(self.weights) if self.weights else WEIGHTS
        if fits(model, *belongs_to(folder)):
            indexers = load_indexers(folder)
        elif self.weights or not self.train:
            raise UnsupportedModelError(
                "the indexer of hisa was trained for another model: train one with scripts/train_hisa_indexer.py"
                " --model NAME --out FOLDER and give weights=FOLDER"
            )
        else:
            indexers = train_on_own_texts(model, rotation, self.train, self.seed)
        self._ready = [indexer.to(model.device).requires_grad_(False) for indexer in indexers], rotation

    def most(self, seen: Tensor) -> Tensor:
        """Return how many of `seen` tokens a query reads at most: one block at least where blocks are read whole."""
        count = self.count(seen)
        return count.clamp(min=self.plan.block).minimum(seen) if self.plan.search == "blocks" else count

    def layer(self, index: int) -> HisaLayer:
        """Return fresh state for one layer.

        Raises
        ------
        RecipeError
            If it was not prepared for a model.
        """
        if self._ready is None:
            raise RecipeError("hisa belongs to a model: call prepare(model) first")
        indexers, rotation = self._ready
        return HisaLayer(self, indexers[index], rotation, self.plan)


def train_on_own_texts(model: PreTrainedModel, rotation: Rotation, texts: int, seed: int) -> list[LightningIndexer]:
    """Train an indexer on so many short texts that the model writes."""
    length = min(OWN_LENGTH, model.config.get_text_config(decoder=True).max_position_embeddings)
    *_, (indexers, _) = distil(model, rotation, own_texts(model, texts, length, seed), seed)
    return indexers
