"""A file of requests to a file of answers: each line once, whatever stands in it, however often it is broken off."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
from filelock import FileLock
from running import byte_tokenizer, log_lines

from tokenary.core.errors import InputError
from tokenary.serve.batch import Batch
from tokenary.serve.batch_files import read_rows, take_up
from tokenary.serve.local_pool import LocalPool
from tokenary.serve.settings import Settings
from tokenary.serve.text import Text

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def line(id, body, url=COMPLETION, **more):
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": body, **more})


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Run a batch of these lines over the double of the engine; its answers by custom_id, and the summary."""
    monkeypatch.setenv("TOKENARY_CACHE", str(tmp_path / "cache"))

    def run(lines, engine=None, out="out.jsonl", write=True, **options):
        source = tmp_path / "in.jsonl"
        if write:
            source.write_bytes(b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines))
        given = {key: options.pop(key) for key in ("max_body", "max_new_tokens", "name") if key in options}
        settings = Settings(
            model="fake", engine="fake_engine:create", engine_options=engine or {}, max_jobs=600, deadline=600, **given
        )
        text = Text(byte_tokenizer, settings.max_prompt_bytes)
        made = Batch(settings, LocalPool(settings), text, source, tmp_path / out, **options)
        summary = asyncio.run(made.run())
        return answers(tmp_path / out), summary

    return run


def answers(path):
    found = [json.loads(one) for one in path.read_text().splitlines()]
    assert all((one["response"] is None) != (one["error"] is None) for one in found)
    ids = Counter(one["id"] for one in found)
    assert not ids or max(ids.values()) == 1, "a line was answered twice"
    return {one["id"].split("-")[0]: one for one in found}


def text(answer):
    (choice,) = answer["response"]["body"]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_every_kind_of_line(batch):
    found, summary = batch(
        [
            line("a", {"prompt": "one"}),
            line("b", {"messages": [{"role": "user", "content": "hé"}]}, CHAT),
            '{"prompt": "plain", "max_tokens": 3}',
            "",
            '{"messages": [{"role": "user", "content": "x"}], "custom_id": "mine"}',
            line("c", {"prompt": "abc", "n": 2, "seed": 5}),
        ]
    )
    assert [found[n]["custom_id"] for n in "12356"] == ["a", "b", "line-3", "mine", "c"]
    assert text(found["1"]) == "one" and text(found["2"]) == "<user>hé\n<assistant>" and text(found["3"]) == "pla"
    body = found["6"]["response"]["body"]
    assert [one["text"] for one in body["choices"]] == ["abc", "abc"] and body["usage"]["tokenary"]["seed"] == 5
    assert found["1"]["response"]["status_code"] == 200
    assert (summary.lines, summary.answered, summary.refused, summary.stood) == (5, 5, 0, 0)
    assert summary.new_tokens == sum(one["response"]["body"]["usage"]["completion_tokens"] for one in found.values())


BAD = {
    b"{not json": (422, "the line is no JSON"),
    b"[1]": (422, "a line is a JSON object"),
    b"\xff\xfe": (422, "the line is no JSON"),
    b"[" * 5000: (422, "the line is no JSON"),
    b'{"custom_id": 5, "prompt": "x"}': (422, "custom_id is a text"),
    b'{"custom_id": "nothing"}': (422, "give body, prompt or messages"),
    line("method", {}, method="GET").encode(): (405, "the method is POST"),
    line("url", {"input": "x"}, "/v1/embeddings").encode(): (404, f"the url is {CHAT} or {COMPLETION}"),
    line("body", "text").encode(): (422, "the body is a JSON object"),
    line("more", {"prompt": "x"}, extra=1).encode(): (422, "a batch line has custom_id, method, url and body"),
    line("field", {"prompt": "x", "tools": []}).encode(): (422, "tools: this server does not know the field"),
    line("value", {"prompt": "x", "top_p": 2}).encode(): (422, "top_p: Input should be less than or equal to 1"),
    line("type", {"prompt": True}).encode(): (422, "prompt: Input should be a valid string"),
    b'{"prompt": "\\ud800"}': (422, "prompt: half a surrogate pair is no text"),
    line("stream", {"prompt": "x", "stream": True}).encode(): (422, "a batch does not stream"),
    line("model", {"prompt": "x", "model": "gpt-5"}).encode(): (404, "this server has the model fake"),
    line("recipe", {"prompt": "x", "tokenary": {"recipe": "nonsense"}}).encode(): (422, "nonsense"),
    line("ours", {"prompt": "x", "tokenary": 5}).encode(): (422, "tokenary"),
    line("long", {"prompt": "x" * 5000}).encode(): (413, "a line may have 5050 bytes"),
    line("context", {"prompt": "x" * 4200}).encode(): (400, "the model's context has 4096"),
    line("refuse", {"prompt": "!refuse"}).encode(): (422, "the engine refuses this job"),
    line("deadline", {"prompt": "!silent", "tokenary": {"deadline": 0.2}}).encode(): (504, "the deadline passed"),
    line("empty", {"prompt": ""}).encode(): (422, "the prompt is empty"),
}


def test_bad_lines_give_errors_and_harm_no_other(batch):
    lines = [one for bad in BAD for one in (bad, line(f"good {bad[:20]!r}", {"prompt": "good"}).encode())]
    found, summary = batch(lines, max_body=5050, recipe="token-recycling")
    for number, (status, words) in enumerate(BAD.values()):
        error = found[str(2 * number + 1)]["error"]
        assert error is not None, words
        assert error["status_code"] == status and words in error["message"], error
        assert text(found[str(2 * number + 2)]) == "good"
    assert summary.refused == len(BAD) and len(found) == 2 * len(BAD)


def test_a_custom_id_stands_for_one_line(batch):
    found, _ = batch([line("same", {"prompt": "1"}), line("same", {"prompt": "2"}), line("line-1", {"prompt": "3"})])
    assert text(found["1"]) == "1" and "line 1 has this custom_id" in found["2"]["error"]["message"]
    assert text(found["3"]) == "3"


def test_a_recipe_for_lines_that_name_none(batch, monkeypatch):
    found, _ = batch(
        [
            line("silent", {"prompt": "abcabc"}),
            line("named", {"prompt": "abcabc", "model": "fake+prompt-lookup"}),
            line("asked", {"prompt": "abcabc", "model": "fake", "tokenary": {"recipe": "keyformer"}}),
            line("other wish", {"prompt": "abcabc", "tokenary": {"deadline": 30}}),
        ],
        recipe="token-recycling",
    )
    used = [found[n]["response"]["body"]["usage"]["tokenary"]["recipe"] for n in "1234"]
    assert [one.partition(":")[0] for one in used] == [
        "token-recycling",
        "prompt-lookup",
        "keyformer",
        "token-recycling",
    ]
    with pytest.raises(InputError, match="a request may not set"):
        batch([line("a", {"prompt": "x"})], out="b.jsonl", recipe="aded:store=/etc/passwd")


def test_lines_are_written_together(batch, tmp_path):
    log = tmp_path / "log"
    batch([line(str(n), {"prompt": f"{n} words"}) for n in range(9)], {"log": str(log)}, at_once=3)
    widths = [len(one["running"]) for one in log_lines(log) if "running" in one]
    assert max(widths) == 3 and sum(widths) < 9 * 8 + 1


def test_a_defect_of_the_engine_costs_its_line_alone(batch):
    lines = [line(str(n), {"prompt": "!later-defect and more" if n == 3 else f"number {n}"}) for n in range(12)]
    found, summary = batch(lines, {"delay": 0.002}, at_once=4)
    assert found["4"]["error"]["status_code"] == 500 and "secret" not in found["4"]["error"]["message"]
    assert [text(found[str(n + 1)]) for n in range(12) if n != 3] == [f"number {n}" for n in range(12) if n != 3]
    assert summary.refused == 1


def test_what_stands_is_not_written_again(batch, tmp_path):
    log, lines = tmp_path / "log", [line(f"id {n}", {"prompt": f"text {n}"}) for n in range(6)] + ["{broken"]
    batch(lines, {"log": str(log)})
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes().splitlines(keepends=True)
    assert batch(lines, {"log": str(log)})[1].stood == 7 and out.read_bytes() == b"".join(whole)
    for cut, left in ((b"".join(whole[:3]) + whole[3][:-1], 3), (b"".join(whole[:5]) + b'{"id', 5), (b"{", 0)):
        out.write_bytes(cut)
        before = len(log_lines(log))
        found, summary = batch(lines, {"log": str(log)})
        assert len(found) == 7 and summary.stood == left
        assert out.read_bytes().startswith(b"".join(whole[:left]))
        asked = [one["text"] for one in log_lines(log)[before:] if "submit" in one]
        assert len(asked) == 7 - left - ("no JSON" not in str(whole[:left])), asked
        assert {text(found[str(n + 1)]) for n in range(6)} == {f"text {n}" for n in range(6)}


def test_files_that_do_not_belong_together(batch, tmp_path):
    batch([line("a", {"prompt": "x"})])
    for change in (
        {"lines": [line("a", {"prompt": "y"})]},
        {"lines": [line("a", {"prompt": "x"})], "max_new_tokens": 9},
    ):
        with pytest.raises(InputError, match="other lines or other options"):
            batch(**change)
    (tmp_path / "notes").write_text("my notes\n")
    with pytest.raises(InputError, match="line 1 is no answer"):
        batch([line("a", {"prompt": "x"})], out="notes")
    assert (tmp_path / "notes").read_text() == "my notes\n"
    with pytest.raises(InputError, match="cannot be one file"):
        batch([], out="in.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        list(read_rows(tmp_path / "none", "", 10))
    with pytest.raises(InputError, match="cannot write"):
        take_up(tmp_path)


def test_one_run_a_file(batch, tmp_path):
    batch([line("a", {"prompt": "x"})])
    (lock,) = (tmp_path / "cache" / "locks").glob("batch-*")
    with FileLock(lock), pytest.raises(InputError, match="another run"):
        batch([line("a", {"prompt": "x"})])


def test_a_model_that_cannot_be_loaded(batch, tmp_path):
    with pytest.raises(InputError, match="out of weights"):
        batch([line("a", {"prompt": "x"})], {"broken": "out of weights"})
    assert (tmp_path / "out.jsonl").read_bytes() == b""
