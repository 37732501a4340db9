"""A card: what a method is, written once at the top of its file and read without importing it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

ROOMS = (
    "tokenize",
    "embed",
    "mix",
    "reduce",
    "memory",
    "route",
    "quantize",
    "decode",
    "learn",
    "probe",
    "tasks",
    "codec",
)

#: Kinds of models beside causal ones.
MODEL_KINDS = ("diffusion", "any-subset")


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything about a method that can be known before it runs.

    A method file holds exactly one ``CARD = Card(...)`` whose arguments are literals, so that listings read it from
    the source text. The options are not here: they are the signature of the class named by `cls`.

    Parameters
    ----------
    slug : str
        Name on the command line and of the file (``-`` for ``_``).
    cls : str
        Class in the same file that implements the method.
    room : str
        One of `ROOMS`; equals the package the file stands in.
    title : str
        Title of the paper, or a plain name for a baseline.
    summary : str
        What it does for the user, in one line.
    slot : str
        The place it takes in a recipe; two methods of one slot do not compose.
    paper : str
        arXiv number, or empty.
    year : int
        Year of publication.
    code : str
        ``owner/name`` of the authors' repository, or empty.
    lossless : bool
        The output equals, token for token or in distribution, what it would be without the method.
    training : {"none", "minutes", "hours", "gpu"}
        What must be trained before it can be used.
    requires : tuple of str
        What the model must offer: ``"kv-cache"``, ``"rope"``, ``"attention-logits"``, ``"images"``, ..., or which kind
        it must be of: `MODEL_KINDS`, causal without one.
    refuses : tuple of (str, str)
        ``(slot or slug, reason)``: what it cannot be combined with.
    baseline : bool
        A control that others are measured against, not one of the collected papers.
    """

    slug: str
    cls: str
    room: str
    title: str
    summary: str
    slot: str
    paper: str = ""
    year: int = 0
    code: str = ""
    lossless: bool = False
    training: Literal["none", "minutes", "hours", "gpu"] = "none"
    requires: tuple[str, ...] = ()
    refuses: tuple[tuple[str, str], ...] = ()
    baseline: bool = False

    def __post_init__(self) -> None:
        if self.room not in ROOMS:
            raise ValueError(f"card {self.slug!r}: room {self.room!r} is none of {', '.join(ROOMS)}")

    @property
    def kind(self) -> str:
        """What it is, in a word or two: lossless, lossy, measures or trains, and whether it is a baseline."""
        does = "measures" if self.slot == "measure" or self.room == "probe" else ""
        does = does or ("trains" if self.room == "learn" else "lossless" if self.lossless else "lossy")
        return does + (", baseline" if self.baseline else "")

    @property
    def model_kinds(self) -> tuple[str, ...]:
        """The kinds of models that it works on; see `LM.kind`."""
        return tuple(kind for kind in MODEL_KINDS if kind in self.requires) or ("causal",)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain JSON types."""
        return asdict(self)
