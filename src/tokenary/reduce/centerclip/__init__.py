"""CenterCLIP (Zhao et al. 2022, SIGIR, arXiv 2205.00823).

Frames of a clip repeat each other. Halfway through a video encoder, f consecutive frames become a segment: of its f N
patch tokens K stay, the medoids of K clusters, in their order, and its class tokens become their mean. From there on a
segment is a frame: its tokens attend to each other across time.

    P = [ 1/f on the class tokens of the f frames       ]     (K + 1) x f (N + 1)
        [ one 1 a row, at the medoid                    ]     or, with aggregate="mean", 1 / size at every member
    A = who is of which cluster, sizes = its row sums         the paper does not weigh by them: proportional=True does

The class row is the adapter's (``join=f``); the plan is the other K. Positions were added at the input and travel
inside the tokens; a model that reads positions gets the medoid's.

Clusters (k-medoids++): begin with the token of largest norm, then K - 1 times with the one that is farthest from all
chosen (KKZ). Each token goes to the nearest medoid, the medoid becomes the member with the smallest sum of distances,
until nothing moves; of two members, each as near to the other, that with the larger norm. No draw is made: the same
clip always keeps the same tokens, in whatever order they come. ``cluster="spectral"`` does the same on the K smoothest
modes of a graph of the tokens; as their rows all have length 1, what counts as the norm is what that was before.

Tokens of padded frames are of no cluster: hand `segment_tokens` to ``valid=``. (Their class tokens do count in the mean
of their segment, which the paper drops if its last frame is padding: `video_vector`.) The released code also can add a
learned embedding to each cluster, and cluster in several blocks with shorter and shorter segments; its own runs do
neither.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.reduce.base import Context, Kind, Point, Reducer
from tokenary.reduce.centerclip.clustering import (
    distances,
    gaussian,
    k_medoids,
    neighbour_graph,
    spectral_points,
    window,
)
from tokenary.reduce.centerclip.video import segment_tokens, token_shift, video_vector
from tokenary.reduce.mix import Mix

__all__ = ["CenterCLIP", "distances", "k_medoids", "segment_tokens", "token_shift", "video_vector"]

CARD = Card(
    slug="centerclip",
    cls="CenterCLIP",
    room="reduce",
    title="CenterCLIP: Token Clustering for Efficient Text-Video Retrieval",
    summary="makes one frame of a few: clusters their tokens halfway through the encoder and goes on with the medoids",
    slot="reduce",
    paper="2205.00823",
    year=2022,
    code="mzhaoshuai/CenterCLIP",
    requires=("images",),
)

FINE = 100  # patches of a frame from which a grid is a fine one


class CenterCLIP(Reducer):
    """Keep the medoids of the tokens of each segment.

    Parameters
    ----------
    keep : Budget
        How much stays of a segment.
    frames : int
        Consecutive frames of a segment, in an encoder alone; in a vision-language model each view is a segment.
    cluster : {"medoids", "spectral"}
        What is clustered: the tokens, or where they lie in the smoothest modes of a graph.
    metric : {"euclidean", "cosine"}
        How far tokens are apart.
    unit : bool
        Whether tokens are scaled to length 1 first.
    graph : {"neighbours", "gaussian"}
        Of ``spectral``: 5 nearest neighbours for each frame (5 more of frames with 100 patches), or weights
        exp(-d^2 / 2 sigma^2).
    sigma : float
        Of the weights.
    window : bool
        Of ``spectral``: only patches within 9 rows, 9 columns (19 of frames with 100 patches) and 7 frames are linked.
    aggregate : {"medoid", "mean"}
        What goes on: the medoid, or the mean of its cluster.
    proportional : bool
        Whether later layers weigh tokens by the sizes of their clusters.
    """

    at = "vision:50%"
    permutes = True

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.25),  # noqa: B008 (frozen)
        frames: Annotated[int, Field(ge=1)] = 4,
        cluster: Literal["medoids", "spectral"] = "medoids",
        metric: Literal["euclidean", "cosine"] = "euclidean",
        unit: bool = False,
        graph: Literal["neighbours", "gaussian"] = "neighbours",
        sigma: Annotated[float, Field(gt=0)] = 2.0,
        window: bool = False,
        aggregate: Literal["medoid", "mean"] = "medoid",
        proportional: bool = False,
    ) -> None:
        super().__init__(keep)
        self.frames, self.cluster, self.metric, self.unit = frames, cluster, metric, unit
        self.graph, self.sigma, self.window, self.aggregate = graph, sigma, window, aggregate
        self.proportional = proportional
        self.kind: Kind = "group" if aggregate == "medoid" else "merge"

    def attach(self, model: nn.Module, at: Point | str | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Let a model work on fewer tokens, an encoder with its frames joined; see `Reducer.attach`."""
        if not hasattr(model, "language"):
            options = {"join": self.frames, **options}
        return super().attach(model, at, **options)

    @torch.no_grad()
    def plan(self, x: Tensor, keep: int, context: Context) -> Mix:
        """Cluster the tokens of each segment."""
        allowed, norms = context.allowed(x), x.float().norm(dim=-1)
        apart = distances(F.normalize(x.float(), dim=-1) if self.unit else x, self.metric)
        if self.cluster == "spectral":
            points, norms = spectral_points(self._weights(apart, x, context), keep, allowed)
            apart = distances(points)
        medoids, there, assign = k_medoids(apart, norms, keep, allowed)
        mass = (assign[:, None] == torch.arange(keep, device=x.device)[:, None]).float()  # (B, K, N)
        if self.aggregate == "mean":
            return Mix.averages(mass, medoids, context.sizes)
        matrix = torch.zeros_like(mass).scatter(2, medoids[..., None], there[..., None].float())
        return Mix(matrix, mass=mass, anchors=medoids)

    def _weights(self, apart: Tensor, x: Tensor, context: Context) -> Tensor:
        """Return the graph of the tokens, (B, N, N) float64."""
        fine = context.grid[0] * context.grid[1] >= FINE
        if self.graph == "gaussian":
            weights = gaussian(apart, self.sigma)
        else:
            weights = neighbour_graph(apart, 5 * context.views + 5 * fine, context.allowed(x))
        if self.window:
            side = 19 if fine else 9
            weights = weights * window(context.places(x), side, side, 7)
        return weights
