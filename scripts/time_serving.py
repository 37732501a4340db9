"""Time what running jobs together gives: tokens a second of eight jobs at once, over the same jobs one after the other.

Measures the engine alone, without processes and HTTP, on real prompts, greedily, every text as long as asked for. Also
how long a text under way stands still, at most, while a long prompt is read beside it, over a step without one. Writes
ratios with the range over the rounds:

    python scripts/time_serving.py --out results/timing/engine.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from tokenary.core.claim import device_name, versions
from tokenary.data import prompts, prose
from tokenary.models import LM
from tokenary.run import load
from tokenary.serve.engine import Engine
from tokenary.serve.protocol import Job, Progress

RECIPES = ("", "token-recycling")


def run(engine: Engine, jobs: list[Job]) -> tuple[float, int]:
    """Run jobs that come at once; return seconds and tokens."""
    began, tokens = time.perf_counter(), 0
    for job in jobs:
        engine.submit(job)
    while not engine.idle:
        tokens += sum(len(event.token_ids) for event in engine.step() if isinstance(event, Progress))
    return time.perf_counter() - began, tokens


def speeds(engine: Engine, jobs: list[Job]) -> tuple[float, float]:
    """Tokens a second one after the other, and together."""
    alone = [run(engine, [job]) for job in jobs]
    seconds, tokens = run(engine, jobs)
    return sum(found[1] for found in alone) / sum(found[0] for found in alone), tokens / seconds


def standstill(engine: Engine, job: Job, long: Job) -> tuple[float, float]:
    """Median and longest seconds between the tokens of a job: without, and while, a long prompt is read."""
    engine.submit(job)
    gaps: dict[str, list[float]] = {"before": [], "beside": []}
    last, reading = 0.0, False
    while not engine.idle:
        told = {event.id for event in engine.step()}
        now = time.perf_counter()
        if job.id in told and last:
            gaps["beside" if reading else "before"].append(now - last)
        last = now if job.id in told else last
        if long.id in told:
            engine.cancel(job.id)
            engine.cancel(long.id)
        elif len(gaps["before"]) == 12 and not reading:
            engine.submit(long)
            reading = True
    return statistics.median(gaps["before"]), max(gaps["beside"])


def jobs_of(lm: LM, count: int, new: int) -> list[Job]:
    """The first prompts that ship with the package, as jobs."""
    texts = lm.encode([prompt.prompt for prompt in prompts()[:count]])
    return [Job(str(number), ids, max_new_tokens=new, seconds=1e9) for number, ids in enumerate(texts)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/timing/engine.json"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=2048)
    given = parser.parse_args()
    lm = load(given.model)
    assert lm.tokenizer is not None
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None  # every text is as long as asked
    lm.tokenizer.eos_token = None
    engine, jobs = Engine(lm), jobs_of(lm, given.jobs, given.new)
    long = Job("long", lm.encode([prose()[: 6 * given.long]], raw=True)[0][: given.long], seconds=1e9)
    found: dict[str, list[tuple[float, float]]] = {recipe: [] for recipe in RECIPES}
    stands = []
    for number in range(given.rounds + 1):
        for recipe in RECIPES:
            one = speeds(engine, [replace(job, recipe=recipe) for job in jobs])
            if number:  # the first round warms up
                found[recipe].append(one)
                print(f"{recipe or 'plain':16} {one[0]:8.1f} {one[1]:8.1f} tokens/s  {one[1] / one[0]:.2f}", flush=True)
        stands.append(
            standstill(engine, replace(jobs[0], max_new_tokens=lm.context_length - len(jobs[0].prompt)), long)
        )
    ratios = {recipe or "plain": sorted(many / one for one, many in pairs) for recipe, pairs in found.items()}
    record = {
        "what": f"tokens a second of {given.jobs} jobs at once over those of the same jobs one after the other",
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "new_tokens": given.new,
        "ratio": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "range": {name: [round(values[0], 2), round(values[-1], 2)] for name, values in ratios.items()},
        "tokens_per_second": {
            name or "plain": [round(statistics.median(side), 1) for side in zip(*pairs, strict=True)]
            for name, pairs in found.items()
        },
        "standstill": {
            "prompt_tokens": len(long.prompt),
            "piece": engine.options.piece,
            "step_seconds": round(statistics.median(one for one, _ in stands), 3),
            "longest_gap_seconds": round(statistics.median(gap for _, gap in stands), 3),
        },
        "rounds": given.rounds,
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: record[name] for name in ("ratio", "range", "standstill")}))


if __name__ == "__main__":
    main()
