"""The server over SmolLM2: OpenAI's client, recipes, a schema, log-probabilities."""

from __future__ import annotations

import json

import openai
import pytest
from running import running

from tokenary.models import load_tokenizer
from tokenary.serve import recipes
from tokenary.serve.text import Text

pytestmark = pytest.mark.real
MESSAGES = [{"role": "user", "content": "List the planets of the solar system."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "methods", lambda kind: [])
        engine = {"model": "smollm2", "threads": 1}
        text = Text(lambda: load_tokenizer("smollm2"), 262_144)
        options = {"model": "smollm2", "engine": "tokenary.serve.worker:load_engine", "text": text}
        with running(engine, **options) as server:
            yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client, **more):
    return client.chat.completions.create(
        **{"model": "smollm2", "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **more}
    )


def test_a_recipe_changes_the_passes_and_not_the_text(client):
    plain, drafted = ask(client), ask(client, model="smollm2+token-recycling:nodes=24")
    assert plain.choices[0].message.content == drafted.choices[0].message.content
    assert plain.usage.prompt_tokens == drafted.usage.prompt_tokens > 10
    one, other = (answer.usage.model_extra["tokenary"] for answer in (plain, drafted))
    assert one["tokens_per_pass"] == 1 < other["tokens_per_pass"] and other["accepted"] > 0
    assert one["kv_bytes"] > 0 and other["lossless"]


def test_a_watched_stream_of_two_methods(client):
    recipe, text, shown = "token-recycling:nodes=24 + keyformer:keep=50%", "", []
    prompt = " ".join(["one two three four five"] * 12)
    more = {"tokenary": {"recipe": recipe, "watch": True}}
    for chunk in client.completions.create(
        model="smollm2",
        prompt=prompt,
        max_tokens=40,
        temperature=0,
        stream=True,
        extra_body=more,
    ):
        text += chunk.choices[0].text
        shown += [chunk.model_extra["tokenary"]] if "tokenary" in chunk.model_extra else []
    assert "three four" in text and sum(len(one["tokens"]) for one in shown) == 40
    assert {token["origin"] for one in shown for token in one["tokens"]} == {"draft", "target"}
    assert min(shown[-1]["held"]) < 1


def test_a_schema(client):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    asked = [{"role": "user", "content": "Invent a person."}]
    answer = ask(client, messages=asked, response_format=schema, max_tokens=60).choices[0]
    assert answer.finish_reason == "stop" and set(json.loads(answer.message.content)) == {"name", "age"}


def test_logprobs(client):
    choice = ask(client, logprobs=True, top_logprobs=3, max_tokens=5).choices[0]
    assert b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode() == choice.message.content
    for one in choice.logprobs.content:
        assert one.top_logprobs[0].token == one.token and one.logprob == one.top_logprobs[0].logprob < 0
