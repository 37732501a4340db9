"""The questions of a report card: all families, existence by kind of negative, and pictures to list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tokenary.models.bench_vlm.batches import EVALUATION_SEED, Questions, collate, questions
from tokenary.models.bench_vlm.scenes import FAMILIES, Geometry, Scene, render

KINDS = ("positive", "random", "popular", "adversarial")
NEGATIVES = KINDS[1:]


@dataclass(frozen=True)
class Asked:
    """Questions of one split.

    Attributes
    ----------
    families : Questions
        As many of every family but listing.
    existence : Questions
        As many positives as negatives of all kinds, and as many of each kind.
    listing : list of Scene
        Pictures whose objects are listed, no two with the same list.
    """

    families: Questions
    existence: Questions
    listing: list[Scene]

    @classmethod
    def drawn(
        cls, geometry: Geometry, per_family: int, per_kind: int, listed: int, seed: int = 0, anyres: bool = False
    ) -> Asked:
        """Draw test questions that depend on the arguments alone."""
        own, start = tuple(f for f in FAMILIES if f != "listing"), EVALUATION_SEED + 100 * seed
        families = questions(geometry, "test", per_family, own, start, anyres)
        geometry = replace(geometry, side=2 * geometry.side) if anyres else geometry
        wanted = {"positive": 3 * per_kind, **dict.fromkeys(NEGATIVES, per_kind)}
        existence = existence_questions(geometry, wanted, start + 50)
        return cls(families, existence, _listing(geometry, listed, start + 60))


def existence_questions(geometry: Geometry, wanted: Mapping[str, int], seed: int) -> Questions:
    """Draw so many test questions of every kind of existence, one a picture."""
    left, scenes, index = dict(wanted), [], 0
    while any(left.values()):
        scene = render(geometry, "test", seed, index, ("existence",), turns=1)
        index += 1
        if left.get(scene.turns[0].kind):
            left[scene.turns[0].kind] -= 1
            scenes.append(scene)
    return Questions(collate(scenes, 48), scenes, [scene.turns[0] for scene in scenes])


def _listing(geometry: Geometry, count: int, seed: int) -> list[Scene]:
    """Pictures whose lists differ; where a small geometry has not so many, as many as a long search finds."""
    found: dict[str, Scene] = {}
    for index in range(40 * count):
        scene = render(geometry, "test", seed, index, ("listing",), turns=1)
        found.setdefault(scene.turns[0].answer, scene)
        if len(found) == count:
            break
    return list(found.values())


def trimmed(part: Questions, rows: slice) -> tuple[Tensor, Tensor]:
    """Return ids (B, L) of some questions with their answers, and which are answers, without columns of padding."""
    predicted = part.batch.predicted[rows]
    longest = int(predicted.any(0).nonzero().max()) + 1
    return part.batch.ids[rows, :longest], predicted[:, :longest]
