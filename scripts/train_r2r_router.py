"""Label tokens of the small model and train the router of R2R on them.

    python scripts/train_r2r_router.py label --data .carry        # after `write` of distil_small.py, same folder
    python scripts/train_r2r_router.py train --data .carry --out src/tokenary/models/weights/r2r

`label` takes the greedy answers that the large model wrote (half of distil_small.py's own text), goes on where it was
broken off, and takes some minutes; `train` takes one. It writes model.safetensors (float16), config.json (threshold,
quantiles for `large_share`), curve.json and report.json. The answers that the small model was not distilled on are
split into validation (stopping, threshold, quantiles) and test (the reported figures); the router is trained on the
others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from tqdm import tqdm

from tokenary import load
from tokenary.core.errors import InputError
from tokenary.core.files import sha256_of, write_json, written_whole
from tokenary.core.seeding import substream
from tokenary.models.smollm2_small import FOLDER as SMALL
from tokenary.models.smollm2_small import small_sibling
from tokenary.route.r2r.labels import Labelled, label
from tokenary.route.r2r.router import Router, aleatoric, features, load_router

WIDTH, BLOCKS = 192, 2
LR, DECAY, BATCH, EPOCHS, PATIENCE, EVERY = 3e-4, 5e-4, 256, 60, 10, 2
RECALL = 0.95
UNSEEN = 32  # answers at the end that distil_small.py held out


def greedy_answers(data: Path) -> list[tuple[Path, int]]:
    """File and row of every conversation of the own text whose answer is greedy."""
    return [(part, row) for part in sorted((data / "own").glob("*.npy")) for row in range(16)]


def label_all(data: Path, small: Path, most: int) -> None:
    """Label every greedy answer of the own text, one file an answer."""
    lm = load("smollm2")  # in the dtype in which it wrote the answers
    assert lm.tokenizer is not None
    net = small_sibling(lm, folder=small)
    header = lm.tokenizer("<|im_start|>assistant\n")["input_ids"]
    (data / "labels").mkdir(exist_ok=True)
    for number, (part, row) in enumerate(tqdm(greedy_answers(data), desc="answers", mininterval=5)):
        file = data / "labels" / f"{number:04d}.npz"
        if file.exists():
            continue
        ids = [token for token in np.load(part)[row].tolist() if token >= 0]
        starts = [at + len(header) for at in range(len(ids)) if ids[at : at + len(header)] == header]
        start = starts[0] if starts else len(ids)
        if start >= len(ids):
            continue
        found = label(lm.model, net, lm.tokenizer, ids[:start], ids[start:], lm.eos_token_ids, most=most, name=number)
        with written_whole(file) as stream:
            np.savez(stream, **found._asdict())


def read(files: list[Path]) -> Labelled:
    """Join the labels of several answers."""
    parts = [Labelled(**np.load(file)) for file in files]
    return Labelled(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def inputs(found: Labelled, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the router's three inputs."""
    hidden, top = torch.from_numpy(found.hidden_states).float(), torch.from_numpy(found.top_logits).float()
    return hidden, embedding[torch.from_numpy(found.tokens)].float(), top


def fit(
    train: Labelled, wanted: np.ndarray, valid: Labelled, wanted_valid: np.ndarray, embedding: Tensor, seed: int
) -> tuple[Router, list[dict[str, float]]]:
    """Train a router on labels; keep the weights of the lowest validation loss."""
    torch.manual_seed(seed)
    parts, goals = inputs(train, embedding), torch.from_numpy(wanted).float()
    parts_valid, goals_valid = inputs(valid, embedding), torch.from_numpy(wanted_valid).float()
    router = Router(parts[0].shape[1], WIDTH, BLOCKS)
    joined = features(*parts)
    router.mean.copy_(joined.mean(0))
    router.scale.copy_(joined.std(0).clamp(min=1e-3))
    weight = (1 - goals).sum() / goals.sum()  # neutral tokens are many
    optimizer = torch.optim.AdamW(router.parameters(), lr=LR, weight_decay=DECAY)
    best, kept, curve = float("inf"), {}, []
    for epoch in range(1, EPOCHS + 1):
        router.train()
        order = torch.from_numpy(substream(seed, "r2r router", epoch).permutation(len(goals)))
        for rows in order.split(BATCH):
            loss = cross_entropy(router(*(part[rows] for part in parts)), goals[rows], pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % EVERY:
            continue
        router.eval()
        with torch.no_grad():
            odds = router(*parts_valid)
            value = float(cross_entropy(odds, goals_valid, pos_weight=weight))
        point = {"epoch": epoch, "train_loss": loss.item(), "validation_loss": value}
        curve.append(point | {"validation_auroc": auroc(odds.numpy(), wanted_valid)})
        if value < best:
            best, last = value, epoch
            kept = {name: tensor.clone() for name, tensor in router.state_dict().items()}
        if epoch - last >= PATIENCE:
            break
    router.load_state_dict(kept)
    return router.eval(), curve


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a divergent token scores above a neutral one, ties counting half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive, negative = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the divergent tokens of the precision at their score."""
    hits = labels[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def pick_threshold(scores: np.ndarray, labels: np.ndarray, recall: float = RECALL) -> float:
    """Among 99 thresholds .01 to .99, the one of least false positives whose recall is high enough."""
    grid = np.linspace(0.01, 0.99, 99)
    good = [t for t in grid if (scores[labels] >= t).mean() >= recall]
    return round(float(max(good, default=grid[0])), 2)  # false positives fall as the threshold rises


def figures(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What one score says of the test labels: ranking, and the share it routes for a recall of 0.95."""
    at = np.quantile(scores[labels], 1 - RECALL)
    return {
        "auroc": auroc(scores, labels),
        "average_precision": average_precision(scores, labels),
        "share_at_recall_0.95": float((scores >= at).mean()),
    }


@torch.no_grad()
def probabilities(router: Router, found: Labelled, embedding: Tensor) -> np.ndarray:
    """Score positions."""
    return router(*inputs(found, embedding)).sigmoid().numpy()


def train(data: Path, small: Path, out: Path, seed: int) -> None:
    """Train the router and one on all mismatches, and write the first with its report."""
    files = {int(file.stem): file for file in sorted((data / "labels").glob("*.npz"))}
    first = len(greedy_answers(data)) - UNSEEN
    seen, unseen = [n for n in files if n < first], [n for n in files if n >= first]
    if len(seen) < UNSEEN or len(unseen) < UNSEEN // 2:
        raise InputError(f"{data / 'labels'} holds {len(files)} answers: run `label` first")
    order = substream(seed, "r2r split").permutation(unseen).tolist()
    half = len(order) // 2
    fitted, valid, test = (read([files[n] for n in part]) for part in (seen, order[:half], order[half:]))
    lm = load("smollm2", dtype="float32", optimize=False)
    embedding: Any = lm.model.get_input_embeddings()
    table = embedding.weight.detach()
    began = time.process_time()
    router, curve = fit(fitted, fitted.label, valid, valid.label, table, seed)
    every, _ = fit(fitted, fitted.mismatch, valid, valid.mismatch, table, seed)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in router.state_dict().items()}, out / "model.safetensors")
    config: dict[str, Any] = {"hidden": table.shape[1], "width": WIDTH, "blocks": BLOCKS}
    router = load_router(config, out)  # what is reported is what was written, float16 and all
    scores = probabilities(router, valid, table)
    quantiles = {
        name: [round(float(q), 5) for q in np.quantile(values, np.linspace(0, 1, 101))]
        for name, values in (
            ("trained", scores),
            ("entropy", valid.entropy),
            ("aleatoric", aleatoric(torch.from_numpy(valid.top_logits)).numpy()),
        )
    }
    config |= {"threshold": pick_threshold(scores, valid.label), "small_sha256": sha256_of(small / "model.safetensors")}
    write_json(out / "config.json", config | {"quantiles": quantiles})
    write_json(out / "curve.json", curve)
    top = torch.from_numpy(test.top_logits).float()
    confidence = top.softmax(-1)[:, 0].numpy()  # over the 100 largest
    routed = probabilities(router, test, table)
    report = {
        "settings": {"lr": LR, "weight_decay": DECAY, "batch": BATCH, "epochs": EPOCHS, "seed": seed},
        "answers": len(files),
        "positions": {"training": len(fitted.label), "validation": len(valid.label), "test": len(test.label)},
        "share_of_mismatches": float(np.concatenate([p.mismatch for p in (fitted, valid, test)]).mean()),
        "share_of_divergent_tokens": float(np.concatenate([p.label for p in (fitted, valid, test)]).mean()),
        "parameters": sum(p.numel() for p in router.parameters()),
        "test": {
            "router": figures(routed, test.label),
            "router trained on all mismatches": figures(probabilities(every, test, table), test.label),
            "entropy": figures(test.entropy, test.label),
            "one minus largest probability": figures(1 - confidence, test.label),
            "aleatoric uncertainty": figures(aleatoric(top).numpy(), test.label),
            "random": figures(substream(seed, "r2r random").random(len(test.label)), test.label),
        },
        "threshold": {
            "value": config["threshold"],
            "test_recall": float((routed[test.label] >= config["threshold"]).mean()),
            "test_share": float((routed >= config["threshold"]).mean()),
        },
        "processor_seconds": round(time.process_time() - began),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out / "report.json", report)
    print(report)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("label", "train"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--small", type=Path, default=SMALL, help="folder of the small sibling")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--most", type=int, default=30, help="mismatches an answer that are continued")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.command == "label":
        label_all(given.data, given.small, given.most)
    elif given.out is None:
        parser.error("train needs --out")
    else:
        train(given.data, given.small, given.out, given.seed)


if __name__ == "__main__":
    main()
