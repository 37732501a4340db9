"""Window-Diffusion: far fewer rows computed than by the full decoder, at one schedule and nearly the same quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.claims.denoising import MUSIC, Denoised, denoise, gapped, judged, own_loss, same, timed, works
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.decode.confidence import Confidence
from tokenary.decode.denoise import Pass, WindowState
from tokenary.decode.window_diffusion import WindowDiffusion
from tokenary.models import LM
from tokenary.run import load

LIMIT = float(np.log(1.05))  # a perplexity 5% above the full decoder's, in nats


class RandomWindow(WindowDiffusion):
    """The control: as many masks active and in the window, but drawn at random (the first one always among them)."""

    def begin(self) -> WindowState:
        """Begin with a refresh."""
        return _RandomPhase(super().begin())


class _RandomPhase(WindowState):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def plan(self, masked: Tensor, fresh: Tensor) -> Pass:
        """Take the plan's sizes, and draw which masks they are."""
        found = self.inner.plan(masked, fresh)
        if found.computed is None or found.attended is None:
            self.kept = None
            return found
        masks = masked.nonzero()[:, 0]
        order = substream(0, "random-window", int(self.inner.step)).permutation(len(masks))
        shuffled = masks[torch.from_numpy(np.concatenate([[0], order[order != 0]]))]
        active = shuffled[: int(masked[found.computed].sum())]
        if self.kept is None:
            self.kept = shuffled[: int(masked[found.attended].sum())]
            self.decoded = ~masked
        others = found.computed[~masked[found.computed]]
        seen = self.decoded.clone()
        seen[self.kept] = True
        return Pass(torch.cat([active, others]).sort().values, seen.nonzero()[:, 0])


def prompts_of(lm: LM, text: str, count: int, length: int, seed: int) -> list[list[int]]:
    """Cut `count` evenly spaced prompts of `length` tokens out of a text; the seed moves them all."""
    (ids,) = works(lm, text)
    step = (len(ids) - length) // count
    shift = int(substream(seed, "prompts").integers(0, max(1, step - length)))
    return [ids[shift + i * step : shift + i * step + length] for i in range(count)]


def run(
    seed: int = 0,
    texts: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 448,
    window: int = 64,
    active: int = 16,
    refresh: int = 32,
    share: float = 0.0,
    text: str = "enwik8",
    model: str = "wiki-diffusion",
) -> Outcome:
    """Continue real text greedily, or fill its gaps, one token a pass in every arm, in float32.

    SmolLM2 judges what was written; no judge being there for music, that is judged by the model itself. An arm whose
    loss may, within twice its error, be more than `LIMIT` above the full decoder's is counted with that one's rows.

    Parameters
    ----------
    seed : int
        Chooses where the prompts begin, or what is masked.
    texts, prompt_tokens, new_tokens : int
        Prompts, and tokens of each and of its continuation.
    window, active, refresh : int
        Of Window-Diffusion.
    share : float
        Above 0, nothing is continued: this share of the tokens, `prompt_tokens` and `new_tokens` together, is masked.
        A model of music needs it.
    text : {"enwik8", "prose"}
        Held-out Wikipedia, or what ships.
    model : str
        A masked-diffusion model.
    """
    lm = load(model, dtype="float32")
    judge, mask = None if model == MUSIC else load("smollm2", dtype="float32"), lm.model.config.mask_token_id
    if share:
        pieces = gapped(lm, text, texts, prompt_tokens + new_tokens, share, seed)
        prompts, new_tokens = [piece.template for piece in pieces], 0
    else:
        prompts = prompts_of(lm, text, texts, prompt_tokens, seed)
    options: dict[str, Any] = {"window": window, "active": active, "refresh": refresh}
    makers: dict[str, Any] = {
        "full": None,
        "window-diffusion": WindowDiffusion(**options),
        "no buffer": WindowDiffusion(**options, buffer=False),
        "no transient": WindowDiffusion(**options, transient=False),
        "random": RandomWindow(**options),
        **{f"refresh {n}": WindowDiffusion(window=window, active=active, refresh=n) for n in (8, 64) if n != refresh},
    }
    unmasker = Confidence(block=0)
    arms: dict[str, Denoised] = {
        name: denoise(lm, prompts, unmasker, method, new_tokens) for name, method in makers.items()
    }
    losses = {
        name: own_loss(lm, arm.sequences, prompts)
        if judge is None
        else judged(judge, lm, arm.sequences, 0 if share else prompt_tokens)
        for name, arm in arms.items()
    }
    full = arms["full"]

    def counted(name: str) -> np.ndarray:
        rise = losses[name] - losses["full"]
        holds = rise.mean() + 2 * standard_error(rise) <= LIMIT  # a rise lost in the noise is not known to be small
        return arms[name].rows if holds else full.rows

    def figure(name: str) -> Figure:
        rows = counted(name)
        return Figure.of(name, rows)

    return Outcome(
        method=figure("window-diffusion"),
        baseline=figure("full"),
        controls=(
            Figure("none", float(full.rows.mean())),
            figure("random"),
            figure("no buffer"),
            figure("no transient"),
        ),
        n=texts,
        paired_spread=standard_error(full.rows - counted("window-diffusion")),
        details={
            name: {
                "rows_a_token": round(float(arm.rows.mean()), 2),
                "loss": round(float(losses[name].mean()), 4),
                "rise_over_full": round(float((losses[name] - losses["full"]).mean()), 4),
                "its_error": round(standard_error(losses[name] - losses["full"]), 4),
                "same_as_full": round(same(arm.sequences, full.sequences, prompts, mask), 4),
            }
            for name, arm in arms.items()
        },
    )


def timing(seed: int = 0, texts: int = 2, new_tokens: int = 448) -> dict[str, float]:
    """Continue texts with the full decoder and with windows, in turns."""
    lm = load("wiki-diffusion", dtype="float32")
    prompts = prompts_of(lm, "enwik8", texts, 64, seed)
    windows = {"full decoder": None, "window-diffusion": WindowDiffusion(), "refresh 8": WindowDiffusion(refresh=8)}
    ways = {
        name: lambda row, window=window: denoise(lm, [prompts[row]], Confidence(block=0), window, new_tokens)
        for name, window in windows.items()
    }
    return timed(ways, texts, rounds=2)


CLAIM = Claim(
    slug="window-diffusion",
    statement="At one token a pass, Window-Diffusion computes at least 5 times fewer rows than the full decoder while "
    "the perplexity of the text under SmolLM2 rises by at most 5%, beyond twice the error",
    metric="rows computed a token; the full decoder's where perplexity may rise by more than 5%",
    direction="lower",
    threshold=5.0,
    run=run,
    variation="the pretrained midisim fills gaps in Bach's chorales, judged by its own pseudo-likelihood",
    held_out={"model": "midisim", "texts": 4, "new_tokens": 128, "share": 0.3},
    model="wiki-diffusion",
    minutes=15,
    fast={
        "texts": 2,
        "prompt_tokens": 32,
        "new_tokens": 48,
        "window": 16,
        "active": 6,
        "refresh": 8,
        "text": "prose",
    },
    timing=timing,
)
