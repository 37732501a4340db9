"""R2R: at the same share of large-model tokens, a text that the large model finds likelier than entropy routing's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.data import gsm8k, humaneval, prompts
from tokenary.models import LM, find
from tokenary.models.smollm2_small import small_sibling
from tokenary.route.r2r.labels import overlap
from tokenary.run import Output, generate, load

SHARES = (0.1, 0.2, 0.35)  # asked for; what comes out is measured, and the quality at the wanted share interpolated
DRAFT = 4  # tokens of a draft of speculative decoding


@dataclass(frozen=True)
class Run:
    """What one way of routing wrote, one value a prompt."""

    share: float  # of large-model tokens, over all prompts
    nats: np.ndarray  # a token, under the large model
    likeness: np.ndarray  # F1 of the content words with the large model's own text
    repeats: np.ndarray  # share of 4-grams that stood before


def texts_of(name: str, count: int) -> list[str]:
    """Return the first prompts of a set that ships, of GSM8K or of HumanEval."""
    if name == "gsm8k":
        return [problem["question"] for problem in gsm8k()[:count]]
    if name == "humaneval":
        return [f"Complete this Python function.\n\n{problem['prompt']}" for problem in humaneval()[:count]]
    return [prompt.prompt for prompt in prompts(set=name)[:count]]


@torch.inference_mode()
def follow(model: PreTrainedModel, prompt: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """Logits (len(new), V) of a model where each new token is to come."""
    ids = torch.tensor([[*prompt, *new]], device=model.device)
    return model(ids, logits_to_keep=len(new) + 1, use_cache=False).logits[0, :-1].float()


def nats(model: PreTrainedModel, prompt: Sequence[int], new: Sequence[int]) -> float:
    """Mean loss of the large model on `new` after the prompt, in nats a token."""
    return float(torch.nn.functional.cross_entropy(follow(model, prompt, new), torch.tensor(new, device=model.device)))


def speculative_passes(small: PreTrainedModel, prompt: Sequence[int], new: Sequence[int]) -> int:
    """Passes of the large model if the small one drafted its greedy answer: each checks `DRAFT` tokens and adds one."""
    agrees = [a == b for a, b in zip(follow(small, prompt, new).argmax(-1).tolist(), new, strict=True)]
    at = passes = 0
    while at < len(new):
        drafted = agrees[at : at + DRAFT]
        at, passes = at + next((n for n, same in enumerate(drafted) if not same), len(drafted)) + 1, passes + 1
    return passes


def parameters(lm: LM, small: PreTrainedModel) -> dict[str, int]:
    """Count the parameters of both models from their shapes, since weights may be packed."""
    c: Any = lm.model.config
    layer = c.hidden_size * (2 * c.hidden_size + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size + 2)
    whole = find("smollm2").parameters
    return {"large": whole, "small": whole - layer * (c.num_hidden_layers - small.config.num_hidden_layers)}


def write(lm: LM, ids: list[list[int]], recipe: str | None, new: int) -> list[Output]:
    """Write with a recipe."""
    outputs = generate(lm, ids, recipe, max_new_tokens=new)
    lm.warm.clear()  # every recipe builds a small model of its own
    return outputs


def measure(lm: LM, ids: list[list[int]], outputs: list[Output], own: list[Output]) -> Run:
    """Measure texts beside the large model's own."""
    grams = [[tuple(o.token_ids[at : at + 4]) for at in range(len(o.token_ids) - 3)] for o in outputs]
    flags = [small for output in outputs for small in output.trace.from_draft]
    return Run(
        share=1.0 - float(np.mean(flags)),
        nats=np.array([nats(lm.model, prompt, o.token_ids) for prompt, o in zip(ids, outputs, strict=True)]),
        likeness=np.array([overlap(a.text, b.text) for a, b in zip(outputs, own, strict=True)]),
        repeats=np.array([1 - len(set(g)) / len(g) if g else 0.0 for g in grams]),
    )


def at_share(runs: Sequence[Run], share: float) -> Run:
    """Interpolate every prompt's figures between the runs whose shares lie around the wanted one."""
    runs = sorted(runs, key=lambda run: run.share)
    above = next(at for at, run in enumerate(runs) if run.share >= share)
    low, high = runs[max(above - 1, 0)], runs[above]
    width = high.share - low.share
    weight = (share - low.share) / width if width else 1.0

    def mixed(name: Literal["nats", "likeness", "repeats"]) -> np.ndarray:
        return (1 - weight) * getattr(low, name) + weight * getattr(high, name)

    return Run(share, mixed("nats"), mixed("likeness"), mixed("repeats"))


def run(
    seed: int = 0,
    sets: Sequence[str] = ("chat", "writing", "summarise", "gsm8k"),
    count: int = 10,
    max_new_tokens: int = 64,
    share: float = 0.2,
) -> Outcome:
    """Write with the shipped pair in float32, greedily, and score the texts by the large model.

    Parameters
    ----------
    seed : int
        Of the random router.
    sets : sequence of str
        Prompt sets, ``gsm8k`` and ``humaneval`` among them.
    count : int
        Prompts of each set, at most.
    max_new_tokens : int
        Tokens a prompt.
    share : float
        Share of the tokens that the large model writes.
    """
    lm = load("smollm2", dtype="float32")
    ids = lm.encode([text for name in sets for text in texts_of(name, count)])
    own = write(lm, ids, None, max_new_tokens)
    large = measure(lm, ids, own, own)
    small = measure(lm, ids, write(lm, ids, "r2r:large_share=0", max_new_tokens), own)
    curves: dict[str, list[Run]] = {}
    for router in ("trained", "entropy", "random"):
        recipes = [f"r2r:router={router},large_share={wanted},seed={seed}" for wanted in SHARES]
        runs = [measure(lm, ids, write(lm, ids, recipe, max_new_tokens), own) for recipe in recipes]
        curves[router] = [small, *runs, large]
    found = {name: at_share(runs, share) for name, runs in curves.items()}
    ways = {"small alone": small, "large alone": large, **found}
    sibling = small_sibling(lm)
    sizes = parameters(lm, sibling)
    passes = sum(speculative_passes(sibling, prompt, o.token_ids) for prompt, o in zip(ids, own, strict=True))

    def figure(name: str, run: Run) -> Figure:
        return Figure.of(name, run.nats)

    likeness = found["trained"].likeness - found["entropy"].likeness
    return Outcome(
        method=figure("r2r", found["trained"]),
        baseline=figure("entropy", found["entropy"]),
        controls=(
            figure("none", small),
            figure("random", found["random"]),
            figure("large alone", large),
        ),
        n=len(ids),
        paired_spread=standard_error(found["trained"].nats - found["entropy"].nats),
        details={
            "share": share,
            "likeness_to_large": {name: float(way.likeness.mean()) for name, way in ways.items()},
            "likeness_gain_over_entropy": [float(likeness.mean()), standard_error(likeness)],
            "repeated_4_grams": {name: float(way.repeats.mean()) for name, way in ways.items()},
            "curves": {
                name: [
                    {"share": r.share, "nats": float(r.nats.mean()), "likeness": float(r.likeness.mean())} for r in runs
                ]
                for name, runs in curves.items()
            },
            "parameters": sizes | {"activated at the share": round(sizes["small"] + share * sizes["large"])},
            # lossless, but the large model reads every token: what it writes is its own text, at this share of passes
            "speculative decoding, large passes a token": passes / sum(len(o.token_ids) for o in own),
        },
    )


CLAIM = Claim(
    slug="r2r",
    statement="With a fifth of the tokens written by the large model, R2R's texts cost the large model at least 0.03 "
    "nats a token less than those of entropy routing",
    metric="loss of the large model on the text written, nats a token",
    direction="lower",
    threshold=0.03,
    effect="difference",
    run=run,
    variation="code, French and German prompts, on which neither the small model nor the router was trained",
    held_out={"sets": ("code", "french", "german", "humaneval")},
    minutes=25,
    fast={"sets": ("chat",), "count": 3, "max_new_tokens": 16},
)
