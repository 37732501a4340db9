"""Training either objective for a number of steps or minutes, and the likelihood on held-out text.

Every draw of step s comes from a generator seeded by (seed, s), so a run that was broken off and resumed sees the
same batches and masks as one that was not. With ``steps`` the learning rate follows the step, with ``minutes`` it
follows the clock (the time already trained is in the checkpoint).
"""

from __future__ import annotations

import copy
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from tokenary.core.errors import InputError, OptionError
from tokenary.core.files import write_json
from tokenary.core.seeding import substream
from tokenary.models.text_diffusion.corpus import Corpus, token_bytes
from tokenary.models.text_diffusion.net import (
    Objective,
    TextDiffusionModel,
    build,
    load_text_diffusion,
    save_text_diffusion,
)
from tokenary.models.text_diffusion.objective import any_subset_nll, diffusion_nll, sample_masks
from tokenary.models.training import Checkpoint, State, fast_products, set_rate


@dataclass(frozen=True)
class Training:
    """Settings of a run.

    Attributes
    ----------
    objective : {"diffusion", "any-subset"}
        What is learnt.
    steps, minutes : optional
        How long; exactly one of them.
    batch, length : int
        Rows and tokens of a step.
    short_every : int
        Every so many steps the rows are cut in four, so that short texts are known too; 0 never.
    lr, warmup, weight_decay, clip : float
        AdamW with betas (0.9, 0.98), linear warm-up over `warmup` steps, cosine to zero, gradient norm at most `clip`.
    ema : float
        Decay of the averaged weights, which are the ones kept; smaller in the first steps.
    seed : int
        Of weights, batches and masks.
    compile : bool
        Compile the loss; where that fails, say so and go on without.
    evaluate_every, save_every : float
        Minutes between held-out estimates, and between checkpoints.
    evaluation_rows : int
        Held-out rows of the estimates along the way; the last one takes all.
    """

    objective: Objective = "diffusion"
    steps: int | None = None
    minutes: float | None = None
    batch: int = 512
    length: int = 256
    short_every: int = 8
    lr: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    compile: bool = False
    evaluate_every: float = 1.0
    save_every: float = 2.0
    evaluation_rows: int = 256

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if (self.steps is None) == (self.minutes is None):
            raise OptionError("steps", self.steps, "either steps or minutes")
        if (self.steps or self.minutes or 0) <= 0:
            raise OptionError("minutes", self.minutes, "more than zero (or steps, more than zero)")
        if self.length % 4:
            raise OptionError("length", self.length, "a multiple of 4")


def train(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: str | Path,
    settings: Training,
    *,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    sizes: dict[str, int] | None = None,
    init: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, or go on from the checkpoint, and write model, ``curve.json`` and ``report.json`` to `out`.

    Parameters
    ----------
    corpus : Corpus
        Token ids.
    tokenizer : tokenizers.Tokenizer
        Saved beside the weights; gives the bytes of a token.
    out : path
        Folder of the model; the averaged weights so far are written there at every estimate.
    settings : Training
        How.
    checkpoint : path, optional
        File of the training state (four times the float32 weights), ``out/checkpoint.pt`` by default.
    device : str or torch.device
        The forward pass runs in bfloat16 where the machine has instructions for it.
    sizes : dict, optional
        Arguments of `build` other than the defaults.
    init : path, optional
        Folder of a model of the same sizes, of either objective, whose weights are the first ones. The network of
        any-subset autoregression answers at masks too, and knows the language long before one that sees masks alone.
    progress : bool
        Show a bar.

    Returns
    -------
    dict
        The report.

    Raises
    ------
    InputError
        If a part of the corpus is shorter than one row, the checkpoint is of another run, or the first weights are of
        other sizes or of another tokenizer.
    """
    out, device = Path(out), torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    if min(map(len, corpus)) < settings.length:
        raise InputError(f"training and held-out text need at least {settings.length} tokens each")
    tokens = torch.from_numpy(corpus.train.astype(np.int32)).to(device)
    held_out = rows_of(corpus.held_out, settings.length)
    part = held_out[torch.linspace(0, len(held_out) - 1, min(settings.evaluation_rows, len(held_out))).long()]
    vocab = tokenizer.get_vocab_size()
    sizes = {"vocab": vocab, "context": settings.length, **(sizes or {})}
    model = build(seed=settings.seed, objective=settings.objective, **sizes)
    model.to(device)  # type: ignore[arg-type]
    origin = "" if init is None else _take_weights(model, tokenizer, Path(init))
    run = _Run(model, settings, origin, Path(checkpoint or out / "checkpoint.pt"))
    if settings.objective == "diffusion" and device.type == "cpu":
        # without a mask to add, plain products are several times faster backwards than the fused kernel of the CPU
        run.model.set_attn_implementation("eager")
    state, loss_of = run.state, _Loss(settings.compile)
    start, saved, evaluated = time.perf_counter() - state.seconds, state.seconds, state.seconds
    bar = tqdm(
        total=1.0,
        initial=run.progress(),
        disable=not progress,
        mininterval=5,
        bar_format="{percentage:3.0f}% {postfix}",
    )
    while run.progress() < 1:
        loss, lr = run.step(tokens, loss_of)
        if state.step % 20 == 0 or device.type == "cpu":
            value = loss.item()  # waits for the device, so that the clock below tells the truth
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {state.step}")
            state.seconds = time.perf_counter() - start
            bar.set_postfix_str(f"step {state.step} loss {value:.3f} lr {lr:.1e}", refresh=False)
            bar.update(min(run.progress(), 1) - bar.n)
        last = run.progress() >= 1
        if last or state.seconds - evaluated >= 60 * settings.evaluate_every:
            with fast_products(device.type):
                bits = evaluate(run.averaged, part, tokenizer, samples=4)["bits_per_byte"]
            seen = state.step * settings.batch * settings.length
            point = {"step": state.step, "seconds": round(state.seconds, 1), "tokens": seen}
            state.curve.append(point | {"train_nats_per_token": loss.item(), "held_out_bits_per_byte": bits})
            write_json(out / "curve.json", state.curve)
            save_text_diffusion(run.averaged, tokenizer, out)
            evaluated = state.seconds
        if last or state.seconds - saved >= 60 * settings.save_every:
            run.checkpoint.save()
            saved = state.seconds
    bar.close()
    lm = load_text_diffusion(out, device=device)  # what is reported is what was written, float16 and all
    kept = cast(TextDiffusionModel, lm.model)
    report = {
        "settings": asdict(settings),
        "init_sha256": origin,
        "parameters": sum(p.numel() for p in kept.parameters()),
        "weights_sha256": lm.fingerprint,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "tokens_seen": state.step * settings.batch * settings.length,
        "corpus_tokens": len(corpus.train),
        "compiled": loss_of.compiled,
        "held_out": evaluate(kept, held_out if device.type == "cuda" else part, tokenizer, samples=8),
        "unigram_bits_per_byte": unigram_bits_per_byte(corpus, tokenizer),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out / "report.json", report)
    return report


def rows_of(tokens: np.ndarray, length: int) -> Tensor:
    """Cut tokens into rows, (R, length) long; the rest is left out."""
    rows = len(tokens) // length
    return torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length)


def batch_of(tokens: Tensor, settings: Training, step: int) -> tuple[Tensor, Tensor]:
    """Draw the rows and masked positions of one step, (B, N) long and bool, on the device of `tokens`."""
    generator = torch.Generator(tokens.device)
    generator.manual_seed(int(substream(settings.seed, "text-diffusion", step).integers(2**62)))
    short = settings.short_every and step % settings.short_every == settings.short_every - 1
    cuts = 4 if short else 1
    rows, length = settings.batch * cuts, settings.length // cuts
    starts = torch.randint(len(tokens) - length + 1, (rows, 1), generator=generator, device=tokens.device)
    ids = tokens[starts + torch.arange(length, device=tokens.device)].long()
    if settings.objective == "diffusion":
        return ids, sample_masks(rows, length, generator)
    # A generator must know nearly empty rows: half of them are, the other half keeps sparse infilling good.
    parts = ((rows - rows // 2, (0.0, 1.0)), (rows // 2, (0.85, 0.99)))
    return ids, torch.cat([sample_masks(count, length, generator, share) for count, share in parts if count])


def schedule(step: int, progress: float, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up in steps, cosine to zero over the whole run."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def training_loss(model: TextDiffusionModel, input_ids: Tensor, masked: Tensor) -> Tensor:
    """Scalar loss, nats a token: the diffusion bound, or the mean over all masked tokens for any-subset models.

    The any-subset loss counts every masked token alike (the joint objective, not re-weighted), so rows with many
    masked tokens count for more.
    """
    if model.config.objective == "diffusion":
        return diffusion_nll(model, input_ids, masked).mean()
    share = masked.sum(1) / masked.sum()
    return (any_subset_nll(model, input_ids, masked) * share).sum()


@torch.no_grad()
def evaluate(
    model: TextDiffusionModel, rows: Tensor, tokenizer: Tokenizer, *, samples: int = 8, seed: int = 0, batch: int = 256
) -> dict[str, float]:
    """Likelihood of held-out rows.

    Parameters
    ----------
    model : TextDiffusionModel
        Of either objective.
    rows : Tensor
        (R, N) long.
    tokenizer : tokenizers.Tokenizer
        Gives the bytes of a token ([EOS] has none; its nats count).
    samples : int
        Draws of the masked set a row.
    seed, batch : int
        Of the masks, which are the same for every model; sequences a pass.

    Returns
    -------
    dict
        ``nats_per_token, standard_error, bits_per_byte, rows, samples``. For diffusion an upper bound on the negative
        log-likelihood. For any-subset models the exact one, left to right with nothing visible, and beside it
        ``infill_nats_per_token``, a masked token given a random visible set of random size.
    """
    device = next(model.parameters()).device
    size = torch.from_numpy(token_bytes(tokenizer))[rows].sum().item()
    generator = torch.Generator(device).manual_seed(seed)
    any_subset = model.config.objective == "any-subset"
    draw = any_subset_nll if any_subset else diffusion_nll
    joint, nll = [], []
    for chunk in rows.split(max(1, batch // samples)):
        ids = chunk.to(device)
        if any_subset:
            joint.append(any_subset_nll(model, ids, torch.ones_like(ids, dtype=torch.bool)))
        # the draws of one row are stratified, so that its mean has little noise
        masked = torch.cat([sample_masks(samples, ids.shape[1], generator) for _ in ids])
        nll.append(draw(model, ids.repeat_interleave(samples, 0), masked).view(-1, samples).mean(1))
    infill = torch.cat(nll).double()
    value = torch.cat(joint).double() if any_subset else infill
    mean = value.mean().item()
    result = {
        "nats_per_token": mean,
        "standard_error": value.std().item() / len(value) ** 0.5,
        "bits_per_byte": mean * rows.numel() / math.log(2) / size,
        "rows": len(rows),
        "samples": samples,
    }
    return result | ({"infill_nats_per_token": infill.mean().item()} if any_subset else {})


def unigram_bits_per_byte(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Bits a byte of a model that knows only how frequent each token is: what any network has to beat."""
    count = np.bincount(corpus.train, minlength=tokenizer.get_vocab_size()) + 1.0
    bits = -np.log2(count / count.sum())[corpus.held_out].sum()
    return float(bits / token_bytes(tokenizer)[corpus.held_out].sum())


def _take_weights(model: TextDiffusionModel, tokenizer: Tokenizer, folder: Path) -> str:
    """Copy the weights of a folder into the model; return their sha256."""
    lm = load_text_diffusion(folder)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in lm.model.state_dict().items()} != shapes:
        raise InputError(f"{folder} holds a network of other sizes")
    if lm.tokenizer is None or lm.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{folder} holds a network of another tokenizer")
    model.load_state_dict(lm.model.state_dict())
    return lm.fingerprint


class _Run:
    """Network, averaged network and optimizer of a run, and where it stands."""

    def __init__(self, model: TextDiffusionModel, settings: Training, origin: str, file: Path):
        self.model, self.settings, self.state = model.train(), settings, State()
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
        # what may not change between two parts of a run (its length may)
        run = {k: getattr(settings, k) for k in ("objective", "batch", "length", "short_every", "lr", "seed")}
        config = model.config
        run |= {"hidden": config.hidden_size, "layers": config.num_hidden_layers, "vocab": config.vocab_size}
        parts = [self.model, self.averaged, self.optimizer]
        self.checkpoint = Checkpoint(file, run | {"init_sha256": origin}, self.state, parts, model.device)
        self.checkpoint.resume()

    def progress(self) -> float:
        """Share of the run that is done."""
        if self.settings.steps is not None:
            return self.state.step / max(self.settings.steps, 1)
        return self.state.seconds / (60 * (self.settings.minutes or 1.0))

    def step(self, tokens: Tensor, loss_of: _Loss) -> tuple[Tensor, float]:
        """Take one step; return its loss and learning rate."""
        settings = self.settings
        ids, masked = batch_of(tokens, settings, self.state.step)
        lr = settings.lr * schedule(self.state.step, self.progress(), settings.warmup)
        set_rate([self.optimizer], lr)
        with fast_products(tokens.device.type):
            loss = loss_of(self.model, ids, masked)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.state.step += 1
        return loss, lr

    @torch.no_grad()
    def _average(self) -> None:
        step = self.state.step
        weight = 1 - min(self.settings.ema, (1 + step) / (10 + step))
        for mean, parameter in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(parameter, weight)


class _Loss:
    """`training_loss`, compiled if asked for; a compiler that fails on the first batch is given up, with a line."""

    def __init__(self, compile: bool):
        self.compiled = compile
        # one graph a shape: whole rows and quarter rows
        self.function = torch.compile(training_loss, dynamic=False) if compile else training_loss

    def __call__(self, model: TextDiffusionModel, input_ids: Tensor, masked: Tensor) -> Tensor:
        try:
            return self.function(model, input_ids, masked)
        except Exception as error:
            if not self.compiled:
                raise
            print(f"torch.compile failed, going on without: {type(error).__name__}: {str(error)[:300]}", flush=True)
            self.compiled, self.function = False, training_loss
            return self(model, input_ids, masked)
