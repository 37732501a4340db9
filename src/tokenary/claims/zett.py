"""ZeTT: rows that a hypernetwork predicts serve a tokenizer it never saw better than the mean of the pieces."""

from __future__ import annotations

from tokenary.claims.transplanting import Kind, domains, moved, new_tokenizer
from tokenary.core.claim import Claim, Outcome, standard_error
from tokenary.embed.focus import Focus
from tokenary.embed.mean_of_pieces import MeanOfPieces
from tokenary.embed.random_rows import RandomRows
from tokenary.embed.tokenadapt import TokenAdapt
from tokenary.embed.zett import ZeTT
from tokenary.models import load


def run(seed: int = 0, kind: Kind = "supertoken", count: int = 8, steps: int = 20) -> Outcome:
    """Measure bits a byte of a novel, of code and of worked sums, right after the transplant.

    Parameters
    ----------
    seed : int
        Of the tokenizer and the random rows.
    kind : str
        Of tokenizer; see `new_tokenizer`.
    count : int
        Windows of each domain.
    steps : int
        Of training the rows afterwards, for the details.
    """
    lm, to, texts = load("smollm2"), new_tokenizer(kind, seed), domains(count)
    lm.model.requires_grad_(False)
    methods = {
        "zett": ZeTT(),
        "mean-of-pieces": MeanOfPieces(),
        "random": RandomRows(seed),
        "focus": Focus(),
        "tokenadapt, local only": TokenAdapt(weight=0, encoder="characters"),
    }
    arms, facts = moved(lm, to, methods, texts, steps, ("zett", "mean-of-pieces"))
    method, baseline, whole = arms["zett"], arms["mean-of-pieces"], arms["none"]
    gap = baseline.per_byte.mean() - whole.per_byte.mean()
    return Outcome(
        method=method.figure(),
        baseline=baseline.figure(),
        controls=(whole.figure(), arms["random"].figure()),
        n=len(method.per_byte),
        paired_spread=standard_error(method.per_byte - baseline.per_byte),
        details={
            **facts,
            "dtype": str(lm.dtype),
            "gap_closed": float((baseline.per_byte.mean() - method.per_byte.mean()) / gap),
            "bits_a_byte": {name: arm.details() for name, arm in arms.items()},
        },
    )


CLAIM = Claim(
    slug="zett",
    statement="Moved without training to a vocabulary of 8,192 supertokens that its hypernetwork never saw, SmolLM2"
    " needs at least 5% fewer bits a byte on real text with ZeTT's rows than with the mean of the pieces",
    metric="bits a byte of prose, code and digits",
    direction="lower",
    threshold=1.05,
    run=run,
    variation="another tokenizer: a unigram one, learned from code",
    held_out={"kind": "unigram of code"},
    minutes=10,
    fast={"kind": "bpe", "count": 1, "steps": 0},
)
