"""OpenAI's own client against a real server, with a double of the engine behind it."""

from __future__ import annotations

import openai
import pytest
from running import running

from tokenary.serve import recipes

MESSAGES = [{"role": "user", "content": "héllo wörld"}]
ECHO = "<user>héllo wörld\n<assistant>"


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "methods", lambda kind: [{"slug": "token-recycling"}])  # importing all takes long
        with running() as it:
            yield it


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as it:
        yield it


def test_a_chat(client):
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=64)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ECHO, "stop")
    assert answer.object == "chat.completion" and answer.model == "fake" and answer.system_fingerprint == "f" * 12
    assert answer.usage.prompt_tokens == len(ECHO.encode())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    costs = answer.usage.model_extra["tokenary"]
    assert costs["recipe"] == "plain" and costs["lossless"] and costs["kv_bytes"] == 1000
    assert costs["passes"] == answer.usage.completion_tokens - 1 and costs["tokens_per_pass"] == 1


def test_a_chat_that_streams(client):
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=MESSAGES, max_tokens=64, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ECHO
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == len(ECHO.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    assert all("tokenary" not in chunk.model_extra for chunk in chunks)


def test_a_completion_and_its_stream_say_the_same(client):
    asked = {"model": "fake", "prompt": ["one two", "three"], "max_tokens": 5, "n": 2, "seed": 7}
    whole = client.completions.create(**asked)
    assert [choice.text for choice in whole.choices] == ["one t", "one t", "three", "three"]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    assert whole.usage.prompt_tokens == len("one two") + len("three")
    assert whole.usage.completion_tokens == 20 and whole.usage.model_extra["tokenary"]["seed"] == 7
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_token_ids_are_a_prompt(client):
    for prompt in ([104, 105], [[104, 105]]):
        assert client.completions.create(model="fake", prompt=prompt).choices[0].text == "hi"


@pytest.mark.parametrize("stop", ["wo", ["zzz", "wo"]])
def test_stop(client, stop):
    choice = client.completions.create(model="fake", prompt="hello world", stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == ("hello ", "stop")


def test_logprobs_of_a_chat(client):
    asked = {"model": "fake", "messages": MESSAGES, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(content) == 9 and bytes(byte for one in content for byte in one.bytes) == ECHO.encode()[:9]
    assert [top.token for top in content[0].top_logprobs] == ["A", "B"] and content[0].logprob == -0.5
    chunks = list(client.chat.completions.create(**asked, stream=True))
    told = [one for chunk in chunks for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    assert told == content


def test_logprobs_of_a_completion(client):
    asked = {"model": "fake", "prompt": "hi you", "max_tokens": 4, "logprobs": 3}
    told = client.completions.create(**asked).choices[0].logprobs
    assert told.tokens == ["h", "i", " ", "y"] and told.text_offset == [0, 1, 2, 3]
    assert told.token_logprobs == [-0.5] * 4 and told.top_logprobs[0] == {"A": -0.5, "B": -1.5, "C": -2.5}
    offsets = [
        chunk.choices[0].logprobs.text_offset
        for chunk in client.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
    ]
    assert [one for some in offsets for one in some] == [0, 1, 2, 3]
    assert client.completions.create(**{**asked, "logprobs": 0}).choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_response_format(client, kind):
    schema = {"json_schema": {"name": "kept", "schema": {"type": "object"}, "strict": True}}
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, response_format={"type": kind, **(schema if kind == "json_schema" else {})}
    )
    assert answer.choices[0].message.content == '{"kept": true}'


RECIPE = "keyformer:keep=50% + token-recycling:nodes=24"


@pytest.mark.parametrize("model", ["fake+token-recycling:nodes=24+keyformer:keep=50%", f"fake+{RECIPE}", "fake"])
def test_a_recipe_in_the_name_or_in_a_field(client, model):
    more = {"extra_body": {"tokenary": {"recipe": RECIPE}}} if model == "fake" else {}
    usage = client.completions.create(model=model, prompt="hello world", **more).usage
    costs = usage.model_extra["tokenary"]
    assert costs["recipe"] == RECIPE and not costs["lossless"]
    assert costs["tokens_per_pass"] == (usage.completion_tokens - 1) / costs["passes"] > 2
    assert costs["drafted"] == 3 * costs["passes"] and costs["accepted"] > 0


def test_a_watched_stream(client):
    more = {"tokenary": {"recipe": "token-recycling", "watch": True}}
    chunks = list(client.completions.create(model="fake", prompt="hello world", stream=True, extra_body=more))
    shown = [chunk.model_extra["tokenary"] for chunk in chunks if "tokenary" in chunk.model_extra]
    assert "".join(token["text"] for one in shown for token in one["tokens"]) == "hello world<end>"
    assert [token["origin"] for token in shown[1]["tokens"]] == ["draft", "draft", "target"]
    assert [len(one["held"]) for one in shown] == [12, 15, 18, 21, 23]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake", "fake+token-recycling"]
    assert client.models.retrieve("fake+token-recycling:nodes=3").id == "fake+token-recycling:nodes=3"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("wish", "error", "code", "words"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found", "this server has the model fake"),
        ({"model": "fake+nope"}, openai.UnprocessableEntityError, "invalid_recipe", "unknown method 'nope'"),
        ({"model": "fake+token-recycling:nodes=500"}, openai.UnprocessableEntityError, "invalid_recipe", "nodes='500'"),
        (
            {"model": "fake+keyformer+recent"}, openai.UnprocessableEntityError, "invalid_recipe",
            "keyformer and recent do not compose: both are the 'keep' of a recipe",
        ),
        ({"model": "fake+confidence"}, openai.UnprocessableEntityError, "invalid_recipe", "works on diffusion models"),
        (
            {"model": "fake+token-recycling", "extra_body": {"tokenary": {"recipe": "recent"}}},
            openai.UnprocessableEntityError, "invalid_value", "name two recipes",
        ),
        ({"extra_body": {"top": 3}}, openai.UnprocessableEntityError, "unknown_field", "does not know the field"),
        ({"frequency_penalty": 1.0}, openai.UnprocessableEntityError, "invalid_value", "frequency_penalty"),
        ({"prompt": "x" * 4096}, openai.BadRequestError, "context_length_exceeded", "4096 tokens"),
        ({"prompt": "x" * 4000, "max_tokens": 97}, openai.BadRequestError, "context_length_exceeded", "97 to write"),
        ({"prompt": "!refuse"}, openai.UnprocessableEntityError, "invalid_value", "the engine refuses"),
        ({"prompt": "!refuse", "stream": True}, openai.UnprocessableEntityError, "invalid_value", "the engine refuses"),
        ({"prompt": "!fail"}, openai.RateLimitError, "rate_limit_exceeded", "the lane is full"),
    ],
)  # fmt: skip
def test_refusals(client, wish, error, code, words):
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "fake", "prompt": "hello", **wish})
    assert caught.value.code == code and words in caught.value.body["message"]
    assert caught.value.body["type"] in ("invalid_request_error", "rate_limit_error")


def test_an_error_in_the_middle_of_a_stream(client, server):
    for prompt, words in (("!later-crash", "the worker died"), ("!later-defect", "a defect of the server: ValueError")):
        got = []
        with pytest.raises(openai.APIError, match=words):
            for chunk in client.completions.create(model="fake", prompt=prompt, stream=True):
                got.append(chunk.choices[0].text)
        assert "".join(got).startswith("!later")
        server.wait(server.healthy)


def test_tokenize_and_back(server):
    with server.client() as http:
        tokens = http.post("/v1/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
        assert tokens == {"count": 3, "max_model_len": 4096, "tokens": [104, 195, 169], "token_strs": ["h", "�", "�"]}
        assert http.post("/v1/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}
        chat = http.post("/v1/tokenize", json={"messages": MESSAGES}).json()
        assert bytes(chat["tokens"]).decode() == ECHO and chat["token_strs"] is None
        assert http.post("/v1/detokenize", json={"tokens": [257]}).status_code == 422
        assert http.post("/v1/tokenize", json={}).status_code == 422


def test_a_deadline(server):
    with server.client() as http:
        endless = {"prompt": "!endless ", "max_tokens": 4000}
        late = http.post("/v1/completions", json={**endless, "tokenary": {"deadline": 0.2}}).json()
        assert late["choices"][0]["finish_reason"] == "length" and late["choices"][0]["text"].startswith("!endless")
        assert late["usage"]["tokenary"]["finish"] == ["deadline"]
        by_head = http.post("/v1/completions", json={"prompt": "!silent"}, headers={"X-Tokenary-Deadline": "0.2"})
        assert by_head.status_code == 504 and by_head.json()["error"]["code"] == "deadline_exceeded"
        for wrong in ("soon", "-1", "nan"):
            answer = http.post("/v1/completions", json=endless, headers={"X-Tokenary-Deadline": wrong})
            assert answer.status_code == 422
