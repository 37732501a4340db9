"""TokenAdapt: under a vocabulary of supertokens, a mixture by likeness loses less than the plain mean of the pieces."""

from __future__ import annotations

from tokenary.claims.transplanting import Kind, domains, moved, new_tokenizer
from tokenary.core.claim import Claim, Outcome, standard_error
from tokenary.embed.focus import Focus
from tokenary.embed.mean_of_pieces import MeanOfPieces
from tokenary.embed.omp import OMP
from tokenary.embed.random_rows import RandomRows
from tokenary.embed.strings import Encoder
from tokenary.embed.tokenadapt import TokenAdapt
from tokenary.models import load


def run(
    seed: int = 0, kind: Kind = "supertoken", count: int = 8, steps: int = 20, encoder: Encoder = "minilm"
) -> Outcome:
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
    encoder : str
        Of every method that compares strings.
    """
    lm, to, texts = load("smollm2"), new_tokenizer(kind, seed), domains(count)
    lm.model.requires_grad_(False)
    methods = {
        "tokenadapt": TokenAdapt(encoder=encoder),
        "mean-of-pieces": MeanOfPieces(),
        "random": RandomRows(seed),
        "local only": TokenAdapt(weight=0, encoder=encoder),
        "global only": TokenAdapt(weight=1, encoder=encoder),
        "rescaled": TokenAdapt(rescale=True, encoder=encoder),
        "focus": Focus(encoder=encoder),
        "omp": OMP(donor=encoder),
    }
    arms, facts = moved(lm, to, methods, texts, steps, ("tokenadapt", "mean-of-pieces"))
    method, baseline = arms["tokenadapt"], arms["mean-of-pieces"]
    return Outcome(
        method=method.figure(),
        baseline=baseline.figure(),
        controls=(arms["none"].figure(), arms["random"].figure()),
        n=len(method.per_byte),
        paired_spread=standard_error(method.per_byte - baseline.per_byte),
        details={**facts, "dtype": str(lm.dtype), "bits_a_byte": {name: arm.details() for name, arm in arms.items()}},
    )


CLAIM = Claim(
    slug="tokenadapt",
    statement="Moved to a vocabulary of 8,192 supertokens without training, SmolLM2 needs at least 2% fewer bits a byte"
    " on real text with TokenAdapt's rows than with the mean of the pieces",
    metric="bits a byte of prose, code and digits",
    direction="lower",
    threshold=1.02,
    run=run,
    variation="another tokenizer: superwords learned by another algorithm, from code",
    held_out={"kind": "superword of code"},
    minutes=12,
    fast={"kind": "bpe", "count": 1, "steps": 0, "encoder": "characters"},
)
