"""Make the small sibling of SmolLM2-135M: drop layers, then heal the others by distillation with low-rank updates.

    python scripts/distil_small.py write --data .carry      # SmolLM2 writes questions and answers of its own
    python scripts/distil_small.py choose --data .carry     # which layers to keep, by measuring
    python scripts/distil_small.py train --data .carry --out src/tokenary/models/weights/smollm2-small --minutes 20

Every part goes on where it was broken off. `train` writes model.safetensors (float16 updates and norms), config.json,
curve.json and report.json; half of what it reads is Wikipedia (enwik8), half is what `write` wrote. On one thread of a
CPU with bfloat16 instructions the three take 8, 8 and `--minutes` minutes of processor time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tokenary import generate, load
from tokenary.core.errors import InputError
from tokenary.core.files import write_json, written_whole
from tokenary.core.seeding import substream
from tokenary.models import LM
from tokenary.models.low_rank import LowRank
from tokenary.models.smollm2_small import keep_layers, probe, small_sibling
from tokenary.models.text_diffusion.corpus import clean_wikipedia
from tokenary.models.text_diffusion.training import schedule

LENGTH = 256  # tokens of a row
BATCH = 4  # rows of a step
SCORED = 0.5  # of its tokens have a loss: the vocabulary costs as much as all layers
IGNORE = -1  # padding
HELD_OUT = 64  # rows of either kind; half of the own ones are greedy answers, on which the router of R2R is judged
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def write(data: Path, count: int, seed: int) -> None:
    """Let SmolLM2 write `count` user messages (sampled) and its answers (every other one greedy), 32 at a time."""
    lm = load("smollm2")
    assert lm.tokenizer is not None
    template: Any = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "@@"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (lm.tokenizer(part)["input_ids"] for part in template.split("@@"))
    (data / "own").mkdir(parents=True, exist_ok=True)
    for part in tqdm(range(count // 32), desc="own text", mininterval=5):
        file = data / "own" / f"{part:04d}.npy"
        if file.exists():
            continue
        asked = generate(
            lm, [before] * 32, max_new_tokens=48, temperature=1.0, top_p=0.95, seed=seed + part, batch_size=32
        )
        prompts = [before + [t for t in a.token_ids if t not in lm.eos_token_ids] + after for a in asked]
        told = [
            output
            for rows, temperature in ((prompts[:16], 0.0), (prompts[16:], 0.8))
            for output in generate(
                lm, rows, max_new_tokens=160, temperature=temperature, seed=seed + part, batch_size=16
            )
        ]
        rows = np.full((32, LENGTH), IGNORE, np.int32)
        for row, (prompt, output) in enumerate(zip(prompts, told, strict=True)):
            ids = (prompt + output.token_ids)[:LENGTH]
            rows[row, : len(ids)] = ids
        with written_whole(file) as stream:
            np.save(stream, rows)


def wikipedia(lm: LM, megabytes: int = 12) -> np.ndarray:
    """Cut Wikipedia's prose into rows, (R, LENGTH)."""
    from tokenary.data import enwik8

    assert lm.tokenizer is not None
    rows = []
    for article in clean_wikipedia(enwik8(megabytes * 10**6)):
        ids = lm.tokenizer(article, verbose=False)["input_ids"]
        rows += [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return np.array(rows, np.int32)


def corpora(lm: LM, data: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the training rows and the held-out rows, each of Wikipedia and of own text."""
    file = data / "wikipedia.npy"
    if not file.exists():
        np.save(file, wikipedia(lm))
    own = [np.load(part) for part in sorted((data / "own").glob("*.npy"))]
    if not own:
        raise InputError(f"{data / 'own'} holds no text: run `write` first")
    both = [np.load(file), np.concatenate(own)]
    return [rows[:-HELD_OUT] for rows in both], [rows[-HELD_OUT:] for rows in both]


@torch.inference_mode()
def choose(data: Path, keep: int) -> None:
    """Drop, again and again, the layer whose loss costs least: KL to the whole model on 6 Wikipedia rows of 64 tokens.

    The first layer is not tried: it turns embeddings into something that the others can read.
    """
    from tokenary.data import enwik8

    lm = load("smollm2", dtype="bfloat16", optimize=False)
    assert lm.tokenizer is not None
    articles = itertools.islice(clean_wikipedia(enwik8(3_000_000)), 40)
    starts = [lm.tokenizer(article, verbose=False)["input_ids"][:64] for article in articles]
    ids = torch.tensor([start for start in starts if len(start) == 64][:6])
    reference = lm.model(ids, use_cache=False).logits.float().log_softmax(-1)
    file = data / "layers.json"
    path = json.loads(file.read_text()) if file.exists() else []
    dropped = {step["dropped"] for step in path}
    kept = [layer for layer in range(lm.model.config.num_hidden_layers) if layer not in dropped]
    for _ in tqdm(range(len(kept) - keep), desc="layers"):
        losses = {}
        for layer in kept[1:]:
            model = keep_layers(lm.model, [other for other in kept if other != layer])
            logs = model(ids, use_cache=False).logits.float().log_softmax(-1)
            losses[layer] = float((reference.exp() * (reference - logs)).sum(-1).mean())
        worst = min(losses, key=losses.__getitem__)
        kept.remove(worst)
        path.append({"dropped": worst, "kl": round(losses[worst], 4)})
        write_json(file, path)


def nets(lm: LM, layers: list[int], rank: int, seed: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """Build the student over the teacher's frozen weights; return it and its parameters by their stored name."""
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    student = keep_layers(lm.model, layers)
    generator = torch.Generator().manual_seed(seed)
    learnt: dict[str, nn.Parameter] = {}
    for name, module in list(student.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in LINEARS:
            update = LowRank(module, rank, generator)
            setattr(student.get_submodule(parent), leaf, update)
            learnt |= {f"{name}.A": update.A, f"{name}.B": update.B}
        elif leaf.endswith("norm"):
            norm = type(module)(module.weight.shape[0], module.variance_epsilon)
            norm.weight = nn.Parameter(module.weight.float().clone())
            setattr(student.get_submodule(parent), leaf, norm)
            learnt[f"{name}.weight"] = norm.weight
    return student, learnt


def divergence(teacher: Any, student: Any, rows: np.ndarray, scored: np.ndarray) -> Tensor:
    """KL(teacher || student) in nats a token, mean over the `scored` tokens of rows (B, LENGTH), padding left out."""
    ids = torch.from_numpy(rows.astype(np.int64))
    wanted = torch.from_numpy(scored) & (ids >= 0)  # padding is behind the text, so it disturbs nothing before it
    ids = ids.clamp(min=0)

    def logs(model: Any) -> Tensor:
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[wanted]
        return model.get_output_embeddings()(hidden).float().log_softmax(-1)

    with torch.no_grad():
        reference = logs(teacher)
    return torch.nn.functional.kl_div(logs(student), reference, reduction="batchmean", log_target=True)


@torch.no_grad()
def evaluate(teacher: Any, students: dict[str, Any], rows: np.ndarray) -> dict[str, dict[str, float]]:
    """Perplexity of held-out rows, and how often a model's first choice is the large one's."""
    sums: dict[str, np.ndarray] = {name: np.zeros(3) for name in students}
    count = 0
    for part in np.array_split(rows, max(1, len(rows) // BATCH)):
        ids = torch.from_numpy(part.astype(np.int64))
        real = ids[:, 1:] >= 0
        follow, ids = ids[:, 1:][real], ids.clamp(min=0)
        reference = teacher(ids, use_cache=False).logits[:, :-1][real].float().log_softmax(-1)
        count += len(follow)
        for name, student in students.items():
            logs = student(ids, use_cache=False).logits[:, :-1][real].float().log_softmax(-1)
            sums[name] += (
                float(-logs.gather(1, follow[:, None]).sum()),
                float((logs.argmax(-1) == reference.argmax(-1)).sum()),
                float((reference.exp() * (reference - logs)).sum()),
            )
    return {
        name: {"perplexity": math.exp(nll / count), "agreement": same / count, "kl": kl / count}
        for name, (nll, same, kl) in ((name, values.tolist()) for name, values in sums.items())
    }


def train(data: Path, out: Path, minutes: float, keep: int, rank: int, lr: float, seed: int, every: float) -> None:
    """Distil, or go on from ``out/checkpoint.pt``, and write the sibling."""
    out.mkdir(parents=True, exist_ok=True)
    lm = load("smollm2", dtype="bfloat16", optimize=False)
    training, held_out = corpora(lm, data)
    chosen = json.loads((data / "layers.json").read_text())
    whole = lm.model.config.num_hidden_layers
    if len(chosen) < whole - keep:
        raise InputError(f"{data / 'layers.json'} drops {len(chosen)} layers: run `choose` with --keep {keep} first")
    dropped = {entry["dropped"] for entry in chosen[: whole - keep]}
    layers = [layer for layer in range(whole) if layer not in dropped]
    student, learnt = nets(lm, layers, rank, seed)
    matrices = [p for name, p in learnt.items() if p.dim() > 1]
    norms = [p for name, p in learnt.items() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "lr": lr}, {"params": norms, "lr": lr / 2}], betas=(0.9, 0.98), weight_decay=0.0
    )
    step, seconds, curve = 0, 0.0, []
    file = out / "checkpoint.pt"
    run = {"layers": layers, "rank": rank, "lr": lr, "seed": seed}
    if file.exists():
        saved = torch.load(file, weights_only=True)
        if saved["run"] != run:
            raise InputError(f"{file} belongs to a run with other settings: {saved['run']}")
        for name, parameter in learnt.items():
            parameter.data.copy_(saved["learnt"][name])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, curve = saved["step"], saved["seconds"], saved["curve"]
    part = [rows[::4] for rows in held_out]
    done = min(seconds / (60 * minutes), 1.0)
    bar = tqdm(total=1.0, initial=done, miniters=0, mininterval=5, bar_format="{percentage:3.0f}% {postfix}")
    stored = evaluated = seconds
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16)
    while seconds < 60 * minutes:
        began = time.process_time()
        progress = seconds / (60 * minutes)
        rate = schedule(step, progress, warmup=30)
        for group, base in zip(optimizer.param_groups, (lr, lr / 2), strict=True):
            group["lr"] = base * rate
        draws = substream(seed, "distil-small", step)
        rows = np.concatenate([rows[draws.integers(len(rows), size=BATCH // 2)] for rows in training])
        scored = draws.random(rows.shape) < SCORED
        with bf16:
            loss = divergence(lm.model, student, rows, scored)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*learnt.values()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.process_time() - began  # of the processor: others may use it too
        bar.set_postfix_str(f"step {step} kl {loss.item():.3f}", refresh=False)
        bar.update(min(seconds / (60 * minutes), 1) - bar.n)
        last = seconds >= 60 * minutes
        if last or seconds - evaluated >= 60 * every:
            with bf16:
                now = [evaluate(lm.model, {"": student}, rows)[""] for rows in part]
            point = {"step": step, "processor_seconds": round(seconds), "train_kl": loss.item()}
            for kind, values in zip(("wikipedia", "own"), now, strict=True):
                point |= {f"{kind}_{key}": round(value, 4) for key, value in values.items()}
            curve.append(point)
            write_json(out / "curve.json", curve)
            _store(lm, out, layers, rank, learnt)
            evaluated = seconds
        if last or seconds - stored >= 60:
            state = {"learnt": {name: p.data for name, p in learnt.items()}, "optimizer": optimizer.state_dict()}
            with written_whole(file) as stream:
                torch.save(state | {"step": step, "seconds": seconds, "curve": curve, "run": run}, stream)
            stored = seconds
    bar.close()
    models = {
        "layers dropped only": keep_layers(lm.model, layers),
        "distilled": small_sibling(lm, folder=out),  # what is reported is what was written, float16 and all
        "large": lm.model,
    }
    report = {
        "settings": run | {"minutes": minutes, "batch": BATCH, "length": LENGTH, "scored": SCORED},
        "steps": step,
        "processor_seconds": round(seconds),
        "tokens_seen_at_most": step * BATCH * LENGTH,
        "training_rows": dict(zip(("wikipedia", "own"), map(len, training), strict=True)),
        "stored_parameters": sum(p.numel() for p in learnt.values()),
        "choice_of_layers": chosen[: whole - keep],
        "held_out": {
            kind: evaluate(lm.model, models, rows) for kind, rows in zip(("wikipedia", "own"), part, strict=True)
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out / "report.json", report)
    print(json.dumps(report["held_out"], indent=1))


def _store(lm: LM, out: Path, layers: list[int], rank: int, learnt: dict[str, nn.Parameter]) -> None:
    """Write weights and config.json."""
    shape = {key: getattr(lm.model.config, key) for key in SHAPE}
    source = {"name": "SmolLM2-135M-Instruct", "fingerprint": lm.fingerprint, "shape": shape, "probe": probe(lm.model)}
    save_file({name: p.detach().half().contiguous() for name, p in learnt.items()}, out / "model.safetensors")
    write_json(out / "config.json", {"layers": layers, "rank": rank, "source": source})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "choose", "train"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=256, help="texts that `write` writes")
    parser.add_argument("--keep", type=int, default=16, help="layers that stay")
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=20, help="of processor time")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--evaluate-every", type=float, default=5, help="minutes of processor time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.command == "write":
        write(given.data, given.count, given.seed)
    elif given.command == "choose":
        choose(given.data, given.keep)
    else:
        if given.out is None:
            parser.error("train needs --out")
        out = (given.data, given.out, given.minutes, given.keep, given.rank, given.lr, given.seed, given.evaluate_every)
        train(*out)


if __name__ == "__main__":
    main()
