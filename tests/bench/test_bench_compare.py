"""The whole comparison on a really trained small model: the record, the table, the files, the page."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import Page

import tokenary.bench.comparison as comparison_module
from tokenary.bench import Comparison, balanced, compare, headline, render
from tokenary.bench.measure import LESSONS
from tokenary.bench.report import cells, findings, plots, running_mean, texts
from tokenary.core.errors import InputError, OptionError, RecipeError
from tokenary.data import Prompt, prompts
from tokenary.decode.group_think import encode, header
from tokenary.models import tiny_lm

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too'"
RECIPES = ["token-recycling:nodes=6", "prompt-lookup:nodes=4", "keyformer:keep=50%", "random:keep=50%"]


@pytest.fixture(scope="module")
def small(stories):
    """A comparison of few short prompts and texts, one prompt hostile to the page."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("N_TEXTS", 2), ("TEXT_TOKENS", 150), ("SCORED_TOKENS", 30)):
            patch.setattr(comparison_module, name, value)
        given = [
            Prompt("evil", "file", "friendly", f"Once upon a time {EVIL}"),
            Prompt("dog<b>", "file", "hostile", "One day, a dog"),
        ]
        return compare(stories, RECIPES, prompts=given, max_new_tokens=12, rounds=3, budgets=(50, 100), seed=4)


# ------------------------------------------------------------------------------------------------------ the record


def test_the_record_is_whole_and_adds_up(small):
    record = small.to_json()
    assert [row["name"] for row in small.rows] == ["plain", *RECIPES]
    assert record["complete"] and record["settings"]["rounds"] == 3 and record["settings"]["seed"] == 4
    assert len(record["model"]["fingerprint"]) == 64 and record["model"]["dtype"] == "float32"
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    assert record["machine"]["threads"] >= 1 and record["date"].startswith("20")
    assert [prompt["id"] for prompt in record["prompts"]] == ["evil", "dog<b>"]
    assert len(record["warmup"]) == LESSONS and not set(record["warmup"]) & {"evil", "dog<b>"}
    plain, recycling, lookup, keyformer, random = small.rows
    for row in (plain, recycling, lookup):
        assert row["lossless"] and row["quality"] is None and row["identical"] == row["prompts"] == 2
    for row in small.rows:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert set(row["ratio_by_workload"]) == {"friendly", "hostile"}
    for row in (keyformer, random):
        assert not row["lossless"] and 0 < row["quality"]["kv_share"] < 0.9 and row["kv_bytes"] < plain["kv_bytes"]
    curves = record["quality"]["curves"]
    assert set(curves) == {"plain", "keyformer", "random", "recent"}
    for name in ("keyformer", "random", "recent"):
        assert curves[name][-1]["recipe"] == f"{name}:keep=100%" and curves[name][-1]["increase_nats"] == 0
        assert curves[name][-1]["kv_share"] == 1


def test_outputs_and_passes_tell_the_same_as_the_rows(small):
    record = small.to_json()
    for output in record["outputs"]:
        assert len(output["pieces"]) == len(output["from_draft"]) == len(output["token_ids"])
    for row in small.rows[1:3]:
        runs = record["passes"][row["name"]]
        tokens = sum(1 + accepted for _, accepted in runs["cold"])
        assert row["cold_tokens_per_pass"] == pytest.approx(tokens / len(runs["cold"]), rel=0.1)
        drafted = [sum(o["from_draft"]) for o in record["outputs"] if o["recipe"] == row["name"]]
        assert sum(drafted) <= sum(accepted for _, accepted in runs["warm"])
    assert not set(record["passes"]) & {"plain", "keyformer:keep=50%"}


def test_json_goes_there_and_back(small, tmp_path):
    results, report = small.write(tmp_path / "new" / "folder")
    again = Comparison.read(results)
    assert again.to_json() == json.loads(json.dumps(small.to_json())) == small.to_json()
    assert render(again.to_json()) == report.read_text(encoding="utf-8")
    assert sorted(path.name for path in results.parent.iterdir()) == ["report.html", "results.json"]


def test_files_that_are_no_record_are_refused(tmp_path):
    for text, words in (("{", "not JSON"), ("[]", "no record"), ('{"tool": "other"}', "no record")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match=words):
            Comparison.read(tmp_path / "results.json")
    with pytest.raises(InputError, match="cannot read"):
        Comparison.read(tmp_path / "none.json")


def test_a_full_disk_is_one_line_and_leaves_the_old_files(small, tmp_path, monkeypatch):
    small.write(tmp_path)
    before = (tmp_path / "results.json").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(comparison_module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left") as caught:
        small.write(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "results.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_folder_that_cannot_be_one_is_refused(small, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        small.write(tmp_path / "file")


# ------------------------------------------------------------------------------------------------- what is compared


def test_prompts_are_balanced_and_the_seed_chooses_others():
    shipped = prompts()
    six, twelve, other = balanced(shipped, 6), balanced(shipped, 12), balanced(shipped, 6, seed=1)
    assert len({p.set for p in six}) == 6 and [p.workload for p in six].count("friendly") == 3
    assert len({(p.set, p.workload) for p in twelve}) == 12
    assert [(p.set, p.workload) for p in other] == [(p.set, p.workload) for p in six]
    assert not {p.id for p in six} & {p.id for p in other}
    assert balanced(shipped, 1000) == shipped


def test_everything_is_checked_before_any_work():
    for recipes, options, error in (
        (["keyformer + recent"], {}, RecipeError),
        (["token-recycling:nodes=999"], {}, OptionError),
        ([], {"rounds": 0}, OptionError),
        ([], {"max_new_tokens": 0}, OptionError),
        ([], {"budgets": (50, 120)}, OptionError),
    ):
        with pytest.raises(error):
            compare("no-such-model", recipes, **options)  # the model would be the next error


def test_several_texts_of_a_prompt_are_not_called_identical_or_lossy(stories):
    found = compare(stories, ["group-think:thinkers=2"], prompts=["Once"], max_new_tokens=16, rounds=1)
    headers = sum(len(encode(stories.tokenizer, header(thinker))) for thinker in range(2))
    assert found.rows[1]["branches"] == 2 and found.rows[1]["tokens"] == 32 - headers
    assert cells(found.rows[1], found.to_json())[-1] == "2 texts a prompt"
    assert "2 texts a prompt" in render(found.to_json())


def test_without_a_tokenizer_quality_is_left_out_with_the_reason():
    found = compare(tiny_lm(), ["recent:keep=50%"], prompts=[[1, 2, 3, 4] * 10], max_new_tokens=4, rounds=1)
    assert found.to_json()["quality"] is None and found.rows[1]["quality"] is None
    assert any("no tokenizer" in warning for warning in found.warnings)
    assert any("below three" in warning for warning in found.warnings)
    render(found.to_json())


def test_ctrl_c_during_quality_keeps_the_speed(stories, monkeypatch):
    def interrupted(*args):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison_module, "sweep", interrupted)
    found = compare(stories, ["recent:keep=50%"], prompts=["Once"], max_new_tokens=3, rounds=1)
    assert not found.complete and len(found.rows) == 2 and "interrupted" in " ".join(found.warnings)
    assert headline(found.to_json()).startswith("Interrupted.")
    assert "interrupted" in render(found.to_json())


def test_ctrl_c_before_anything_was_measured_goes_on_up(stories):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(stories, [], prompts=["Once"], max_new_tokens=3, rounds=1, progress=stop)


# ------------------------------------------------------------------------------------------------- sentence and table


def row(name, ratio, **more):
    spread = {"median": ratio, "low": ratio, "high": ratio}
    return {"name": name, "kind": "recipe", "lossless": True, "ratio": spread, "identical": 5, "prompts": 6,
            "quality": None, "tokens_per_second": spread, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (
            1.618,
            "x writes 1.62 times as many tokens a second as plain greedy, with identical output on 5 of 6 prompts.",
        ),
        (1.0, "No draft is faster than plain greedy; x is as fast"),
        (0.8, "No draft is faster than plain greedy: the best, x, reaches 0.80 times."),
    ],
)
def test_the_headline_follows_the_figures(speed, words):
    rows = [row("plain", 1.0), row("x", speed), row("y", 0.5), row("theirs", 9.0, kind="peer")]
    assert headline({"rows": rows, "complete": True}).startswith(words)


def test_the_headline_names_the_controls_even_when_they_win():
    def kept(name, percent):
        point = {"recipe": name, "increase_percent": percent, "kv_share": 0.43}
        return row(name, 0.9, lossless=False, quality=point)

    rows = [row("plain", 1.0), kept("keyformer:keep=50%", 3.14), kept("recent:keep=50%", 1.0)]
    assert findings({"rows": rows, "complete": True}) == [
        "keyformer:keep=50% holds 43% of the cache at +3.1% perplexity (recent:keep=50% +1.0%)."
    ]


def test_the_table_holds_every_row(small):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(small.table())
    shown = console.export_text()
    for found in small.rows:
        assert found["name"] in shown
    assert "identical 2/2" in shown and "perplexity" in shown and "baseline" in shown


# ---------------------------------------------------------------------------------------------------------- the page


def test_a_malicious_prompt_stays_text(small):
    text = render(small.to_json())
    page = Page(text)
    assert EVIL in "".join(page.text)  # shown as it was written
    assert not page.all("img") and "<b>" not in text.split("<script")[0]
    scripts = page.all("script")
    assert len(scripts) == 3 and [s.get("type") for s in scripts] == [None, "application/json", None]
    assert text.count("alert(1)") == text.count("&lt;script&gt;alert(1)&lt;/script&gt;")


def test_a_malicious_recipe_name_or_piece_stays_text(small):
    record = json.loads(json.dumps(small.to_json()).replace("token-recycling:nodes=6", "</script><img src=x>"))
    for output in record["outputs"]:
        output["pieces"][0] = "<img src=y>"
    text = render(record)
    page = Page(text)
    assert not page.all("img") and len(page.all("script")) == 3
    inside = text.partition('<script id="figures" type="application/json">')[2].partition("</script>")[0]
    assert not set(inside) & set("<>&") and "</script><img src=x>" in json.dumps(json.loads(inside))


def test_the_page_asks_for_nothing_from_outside(small):
    text = render(small.to_json())
    page = Page(text)
    assert not page.all("link") and not page.all("iframe") and not page.all("base")
    assert all("src" not in attributes for _, attributes in page.elements)
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page.elements)
    assert "@import" not in text.split("<script")[0] and "url(" not in text.split("<script")[0]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert (
        policy.startswith("default-src 'none'") and policy.count("sha256-") == 2 and "script-src 'unsafe" not in policy
    )


def test_the_page_can_be_read_without_eyes_or_mouse(small):
    page = Page(render(small.to_json()))
    drawn = [a for a in page.all("div") if a.get("class") == "plot"]
    assert len(drawn) == 4 and all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in drawn)
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert all(a.get("tabindex") == "0" for a in page.all("div") if a.get("class") == "scroll")
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1 and page.all("mark")
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))


def test_every_figure_is_one_that_plotly_knows(small):
    import plotly.graph_objects as go

    for plot in plots(small.to_json()):
        figure = json.loads(re.sub(r'"var\(--\w+\)"', '"#000000"', json.dumps(plot["figure"])))
        go.Figure(figure)  # raises for a property or a value that does not exist
        assert all(len(line) == len(plot["head"]) for line in plot["body"])


def test_marked_text_is_the_text(small):
    record = small.to_json()
    for prompt in texts(record):
        for said in prompt["said"]:
            output = next(o for o in record["outputs"] if (o["prompt"], o["recipe"]) == (prompt["id"], said["recipe"]))
            assert "".join(text for _, text in said["runs"]) == "".join(output["pieces"])
            assert said["drafted"] == sum(output["from_draft"]) and said["tokens"] == len(output["token_ids"])


def test_a_running_mean():
    assert running_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6] and running_mean([], 2) == []


def test_importing_the_room_imports_neither_torch_nor_plotly():
    code = (
        "import sys, tokenary.bench as b; b.Step; "
        "print([n for n in ('torch', 'plotly', 'transformers', 'jinja2') if n in sys.modules])"
    )
    source = str(Path(comparison_module.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert done.stdout.strip() == "[]", done.stderr
