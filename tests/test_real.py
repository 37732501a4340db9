"""On the real SmolLM2-135M: outputs do not change, and a fast subset of every claim."""

import importlib
import json
import math
from pathlib import Path

import pytest

from tokenary.cli.claims import slugs
from tokenary.data import prompts
from tokenary.run import generate, load

pytestmark = pytest.mark.real
RESULTS = Path(__file__).parent.parent / "results" / "claims"


@pytest.fixture(scope="module")
def lm():
    return load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def chosen():
    return [prompts(set=name, workload="hostile")[0].prompt for name in ("chat", "code", "french", "writing")]


@pytest.fixture(scope="module")
def plain(lm, chosen):
    return [output.token_ids for output in generate(lm, chosen, max_new_tokens=32, batch_size=1)]


@pytest.mark.parametrize("recipe", ["plain", "token-recycling:nodes=15", "aded:nodes=15", "prompt-lookup:nodes=8"])
def test_a_ragged_batch_of_four_equals_greedy_alone(lm, chosen, plain, recipe):
    outputs = generate(lm, chosen, recipe, max_new_tokens=32, batch_size=4)
    assert [output.token_ids for output in outputs] == plain


def test_sampling_is_the_same_with_and_without_drafts(lm, chosen):
    options = {"max_new_tokens": 24, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    drawn = generate(lm, chosen[:2], batch_size=1, **options)
    drafted = generate(lm, chosen[:2], "token-recycling:nodes=15", batch_size=2, **options)
    assert [o.token_ids for o in drafted] == [o.token_ids for o in drawn]


def test_drafting_over_half_a_cache_equals_half_a_cache(lm, chosen):
    text = [prompts(set="summarise")[0].prompt, *chosen[:1]]
    alone = generate(lm, text, "keyformer:keep=50%", max_new_tokens=32, batch_size=1)
    both = generate(lm, text, "token-recycling:nodes=15 + keyformer:keep=50%", max_new_tokens=32, batch_size=2)
    full = generate(lm, text, max_new_tokens=32, batch_size=1)
    assert [o.token_ids for o in both] == [o.token_ids for o in alone]
    assert alone[0].stats.kv_bytes < 0.75 * full[0].stats.kv_bytes


def chance_does_as_well(slug, sign):
    """Whether the record holds a null: the control *random* as good as the method, in the full run.

    Where nothing was shown, a lead within the error is none.
    """
    path = RESULTS / f"{slug}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rivals = [control for control in record.get("controls", ()) if control["name"] == "random"]
    error = 2.0 if record.get("verdict") == "not shown" else 0.0
    return any(
        sign * (record["value"] - rival["value"]) <= error * math.hypot(record["spread"], rival["spread"])
        for rival in rivals
    )


@pytest.mark.parametrize("slug", slugs())
def test_a_fast_subset_of_the_claim(slug):
    """Too few samples for a verdict; but the method must beat chance, unless the record of the full run says that it
    does not, and a lossless one must change nothing."""
    claim = importlib.import_module(f"tokenary.claims.{slug.replace('-', '_')}").CLAIM
    outcome = claim.run(seed=0, **claim.fast)
    sign = 1 if claim.direction == "higher" else -1
    for control in outcome.controls:
        if control.name == "random" and not chance_does_as_well(slug, sign):
            assert sign * (outcome.method.value - control.value) > 0
    if "identical" in outcome.details:
        assert outcome.details["identical"] == outcome.details["outputs"] or outcome.details["largest_gap"] < 1e-3
    assert claim.judge(outcome) in ("shown", "direction only", "not shown")
