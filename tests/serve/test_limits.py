"""Every limit of the server, over real sockets."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import socket
import time

import httpx
import pytest
from running import log_lines, running

from tokenary.core.errors import InputError, OptionError
from tokenary.serve import recipes
from tokenary.serve.settings import Settings, is_loopback, read_key

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
KEY = "a-key-of-many-letters"


@pytest.fixture(scope="module", autouse=True)
def few_methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "methods", lambda kind: [])
        yield


@pytest.fixture(scope="module")
def server():
    with running(max_in_flight=3, max_jobs=6, receive_seconds=1.0, max_body=100_000, max_prompt_bytes=50_000) as it:
        yield it


def raw(server, data: bytes, seconds: float = 5.0) -> bytes:
    """Send bytes on a connection of their own; return all that comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), seconds) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def endless(server, **more):
    """A stream that does not end by itself."""
    return httpx.stream(
        "POST", f"{server.url}/v1/completions", timeout=30,
        json={"prompt": "!endless ", "max_tokens": 4000, "stream": True, **more},
    )  # fmt: skip


def test_a_body_that_says_it_is_too_large(server):
    answer = server.ask("x" * 100_000)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_a_body_that_is_too_large_and_does_not_say_so(server):
    def parts():
        for _ in range(40):
            yield b" " * 8192

    answer = httpx.post(
        f"{server.url}/v1/completions", content=parts(), headers={"Content-Type": "application/json"}, timeout=10
    )
    assert answer.status_code == 413
    assert server.healthy() and server.service.gate.in_flight == 0


def test_a_body_that_does_not_come(server):
    assert raw(server, HEAD % 9 + b"{").startswith(b"HTTP/1.1 408 ")
    assert server.service.gate.in_flight == 0


def test_a_head_that_does_not_come(server):
    assert raw(server, b"GET /health HTT") == b"" and raw(server, b"") == b""


def test_heads_that_are_too_large(server):
    many = {f"x-{number}": "1" for number in range(300)}
    assert httpx.get(f"{server.url}/health", headers=many).status_code == 431
    assert raw(server, b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000).startswith(b"HTTP/1.1 400 ")


def test_more_text_than_is_tokenized(server):
    answer = server.ask("x" * 60_000)
    assert answer.status_code == 413 and "60000 bytes of text" in answer.json()["error"]["message"]
    assert server.ask(["x" * 30_000] * 2).status_code == 413


@pytest.mark.parametrize(
    "wish",
    [
        {"prompt": ["a"] * 5},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": {"a": 1}},
        {"n": 9},
        {"n": 0},
        {"n": True},
        {"stop": list("abcde")},
        {"stop": ""},
        {"stop": ["a" * 300]},
        {"logprobs": 6},
        {"temperature": -1},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_k": -1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"seed": 2**64},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"echo": True},
        {"best_of": 2},
        {"tools": []},
        {"tokenary": {"recipe": "x" * 600}},
        {"tokenary": {"load": "model"}},
        {"tokenary": {"deadline": 0}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "http://example.org/schema"}}},
    ],
    ids=lambda wish: json.dumps(wish)[:40],
)
def test_what_is_out_of_range_is_refused(server, wish):
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", **wish})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and "param" in error and error["code"]


@pytest.mark.parametrize(
    "wish",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}] * 257},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
        {"messages": [{"role": "user", "content": "a", "url": "http://127.0.0.1/"}]},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 6},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ],
    ids=lambda wish: json.dumps(wish)[:40],
)
def test_what_is_out_of_range_in_a_chat(server, wish):
    body = {"messages": [{"role": "user", "content": "a"}], **wish}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 422


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"[" * 90_000, b'{"prompt": "\\ud800"}', b'{"prompt": "x", "\\ud800": 1}',
     b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b"\xff\xfe",
     b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"a": '
     + b"[" * 400 + b"]" * 400 + b"}}}}"],
    ids=range(12),
)  # fmt: skip
def test_broken_bodies_are_422(server, body):
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error"]["message"]


def test_other_media_types_are_refused(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        answer = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert answer.status_code == 415, kind


def test_one_request_too_many(server):
    with endless(server) as one, endless(server) as two, endless(server) as three:
        for stream in (one, two, three):
            assert stream.status_code == 200
        more = server.ask("x")
        assert more.status_code == 429 and more.headers["Retry-After"] and more.headers["Connection"] == "close"
        assert more.json()["error"]["code"] == "rate_limit_exceeded"
        assert server.healthy() and httpx.get(f"{server.url}/metrics").status_code == 200
    server.wait(lambda: server.service.gate.in_flight == 0 and server.service.pool.jobs == 0)
    assert server.ask("x").status_code == 200


def test_one_text_too_many(server):
    with endless(server, n=5):
        assert server.ask("x").status_code == 200
        more = server.ask("x", n=2)
        assert more.status_code == 429 and "6 texts" in more.json()["error"]["message"]


def test_who_waits_too_long_to_be_begun_is_told_when_to_come_again():
    with running({"places": 1, "delay": 0.01}, max_wait=0.3) as server:
        with endless(server) as first:
            assert first.status_code == 200
            for stream in (False, True):
                answer = server.ask(["x", "y"], stream=stream)
                assert answer.status_code == 429 and answer.headers["Retry-After"], answer.text
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert server.service.pool.jobs == 1  # nobody is left in the queue
        server.wait(lambda: server.service.pool.jobs == 0)
        answer = server.ask(["!endless x", "y"], max_tokens=60)  # only the first text of a request has to hurry
        assert answer.status_code == 200 and answer.json()["choices"][1]["text"] == "y"


def test_pages_of_other_sites_are_refused(server):
    port = server.url.rsplit(":", 1)[1]
    for origin in ("https://example.org", "null", "http://localhost:1"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Origin": origin}).status_code == 403, origin
    assert httpx.get(f"{server.url}/v1/models", headers={"Origin": server.url}).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200, host
    asked = httpx.options(f"{server.url}/v1/completions", headers={"Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405 and not any(name.startswith("access-control") for name in asked.headers)


def test_no_route_changes_the_server(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {path: sorted(found) for path, found in paths.items()} == {
        "/health": ["get"],
        "/metrics": ["get"],
        "/v1/models": ["get"],
        "/v1/models/{model}": ["get"],
        "/v1/tokenary/methods": ["get"],
        "/v1/chat/completions": ["post"],
        "/v1/completions": ["post"],
        "/v1/tokenize": ["post"],
        "/v1/detokenize": ["post"],
    }
    for path in ("/docs", "/redoc", "/v1/load_model", "/reset", "/../pyproject.toml", "/playground/../app.py"):
        assert httpx.get(server.url + path).status_code == 404


def test_every_route_but_health_asks_for_the_key():
    with running(api_key=KEY) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/v1/tokenary/methods", "/v1/models/fake"):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-Api-Key": KEY}):
                answer = httpx.get(server.url + path, headers=given)
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer", path
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.ask("x").status_code == 401
        known = {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{server.url}/v1/models", headers={**known, "Host": "any.example"}).status_code == 200
        assert httpx.get(f"{server.url}/nowhere", headers=known).status_code == 404
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        page = httpx.get(f"{server.url}/")
        assert page.status_code == 200 and KEY not in page.text
        assert page.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert httpx.post(f"{server.url}/", headers={"Content-Type": "application/json"}).status_code == 401


def test_a_public_address_needs_a_key(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(OptionError, match="loopback"):
            Settings(host=host)
        assert KEY not in repr(Settings(host=host, api_key=KEY))
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    file = tmp_path / "key"
    for text in ("", "short", "two words that are long enough", "ä" * 20, "line-one-is-long-enough\nline-two"):
        file.write_text(text)
        with pytest.raises(InputError, match="holds no key"):
            read_key(file)
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
    with pytest.raises(InputError, match="cannot read"):
        read_key(tmp_path / "none")


def test_who_leaves_frees_the_place_within_a_step(tmp_path):
    log = tmp_path / "log"
    with running({"delay": 0.02, "log": str(log)}) as server:
        for stream in (True, False):
            before = sum("cancel" in line for line in log_lines(log))
            if stream:
                with endless(server) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(
                        f"{server.url}/v1/completions", timeout=0.5, json={"prompt": "!endless ", "max_tokens": 4000}
                    )
            server.wait(lambda before=before: sum("cancel" in line for line in log_lines(log)) > before)
            assert server.service.gate.in_flight == 0 and server.service.pool.jobs == 0
        lines = log_lines(log)
        for at, line in enumerate(lines):  # the worker hears of it before its next step
            if "cancel" in line:
                assert not any(line["cancel"] in later.get("running", []) for later in lines[at:])


def test_a_client_that_does_not_read_is_cut_off():
    with running(send_seconds=0.5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        asked = {"prompt": "!endless ", "max_tokens": 4000, "stream": True, "n": 8, "tokenary": {"watch": True}}
        body = json.dumps(asked).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(HEAD % len(body) + body)
            server.wait(lambda: server.service.pool.jobs == 8)
            server.wait(lambda: server.service.gate.in_flight == 0 and server.service.pool.jobs == 0)
            server.wait(lambda: not server.server.server_state.connections)


def test_a_silent_stream_says_that_it_lives():
    with (
        running(silence=0.1, max_wait=0.1) as server,
        endless(server, prompt="!silent", tokenary={"deadline": 2.0}) as answer,
    ):
        lines = list(answer.iter_lines())
        assert lines.count(": still here") >= 3 and lines[-2] == "data: [DONE]"
        assert json.loads(lines[-4].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_a_server_that_loads_says_so():
    with running({"load": 1.5}, ready=False) as server:
        assert httpx.get(f"{server.url}/health").status_code == 503
        answer = server.ask("x")
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        server.wait(server.healthy)
        assert server.ask("x").status_code == 200


def test_connections_are_closed_when_idle_and_bounded():
    with running(keep_alive=1.0, max_connections=5) as server:
        started = time.monotonic()
        answer = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and 0.5 < time.monotonic() - started < 4
        host, port = server.url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(5)]
        server.wait(lambda: len(server.server.server_state.connections) >= 5)
        assert httpx.get(f"{server.url}/health").status_code == 503
        for connection in held:
            connection.close()
        server.wait(server.healthy)


def test_metrics_hold_no_prompt(server):
    secret = "my-secret-prompt"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: server.ask(secret), range(4)))
    text = httpx.get(f"{server.url}/metrics").text
    assert 'tokenary_requests_total{route="/v1/completions",status="200"}' in text and secret not in text
    assert "tokenary_worker_up 1.0" in text and "tokenary_new_tokens_total" in text
    assert httpx.get(f"{server.url}/{secret}").status_code == 404
    assert secret not in httpx.get(f"{server.url}/metrics").text


def test_logs_hold_neither_prompts_nor_keys(caplog, capfd):
    secret = "a-secret-in-the-prompt"
    with caplog.at_level(logging.INFO), running(api_key=KEY) as server:
        known = {"Authorization": f"Bearer {KEY}"}
        for body in ({"prompt": secret}, {"prompt": secret, "wrong": secret}, {"prompt": f"!defect {secret}"}):
            httpx.post(f"{server.url}/v1/completions", json=body, headers=known)
        httpx.get(f"{server.url}/v1/models/{secret}", headers=known)
        httpx.get(f"{server.url}/{secret}?key={KEY}", headers=known)
    of_the_worker = "".join(capfd.readouterr())
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert any("/v1/completions 200" in line for line in ours)
    assert not any(secret in line or KEY in line for line in ours)
    assert "ValueError at fake_engine.py" in of_the_worker and secret not in of_the_worker
