"""The server as a process of its own: real signals, real exits, the command line."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time

import httpx
import pytest
from running import HERE, Process, byte_tokenizer
from transformers import LlamaConfig
from typer.testing import CliRunner

from tokenary.cli import main, serve
from tokenary.cli.app import app
from tokenary.core.errors import InputError, TokenaryError
from tokenary.models import load_tokenizer
from tokenary.serve.server import run
from tokenary.serve.settings import Settings


def events(lines):
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_sigterm_refuses_the_new_and_finishes_the_old():
    with Process(engine_options={"delay": 0.02}, drain=20) as server, server.stream(100) as answer:
        lines = answer.iter_lines()
        got = [next(lines)]
        server.popen.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while server.health() != 503:
            assert time.monotonic() < end
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert "shutting down" in refused.json()["error"]["message"]
        got += list(lines)
        assert got[-2] == "data: [DONE]" and events(got)[-1]["choices"][0]["finish_reason"] == "length"
        assert "".join(event["choices"][0]["text"] for event in events(got)) == ("!endless " * 12)[:100]
        assert server.popen.wait(10) == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_what_does_not_finish_in_time_is_ended(name):
    with Process(engine_options={"delay": 0.02}, drain=0.5) as server, server.stream(4000) as answer:
        lines = answer.iter_lines()
        got = [next(lines)]
        server.popen.send_signal(getattr(signal, name))
        got += list(lines)
        assert got[-2] == "data: [DONE]" and "shutting down" in events(got)[-1]["error"]["message"]
        assert server.popen.wait(10) == 0
        said = server.popen.stderr.read()
        assert "shutting down: 1 requests" in said and "Traceback" not in said


def test_a_second_signal_ends_it_now():
    with Process(engine_options={"delay": 0.02}, drain=600) as server, server.stream(4000) as answer:
        lines = answer.iter_lines()  # kept, since the stream is closed with it
        next(lines)
        server.popen.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(10) == 0


@pytest.fixture
def refusal(monkeypatch, capfd):
    """Run ``tokenary serve`` with these arguments; what it says, all of it being one line and exit code 2."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def run(*arguments):
        assert main(["serve", *arguments]) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tokenary:")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_what_the_command_line_refuses(refusal, tmp_path):
    assert "api-key-file" in refusal("--host", "0.0.0.0")
    assert "cannot read the key file" in refusal("--api-key-file", str(tmp_path / "none"))
    assert "port" in refusal("--port", "70000") and "drain" in refusal("--drain", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in refusal("--port", str(taken.getsockname()[1]))


def test_the_tokenizer_alone(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("hé")["input_ids"] == [104, 195, 169]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
    for wrong, words in (("./none", "no such file or folder"), ("smolm2", "did you mean smollm2")):
        with pytest.raises(TokenaryError, match=words):
            load_tokenizer(wrong)


def test_an_engine_that_cannot_load(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr("tokenary.serve.recipes.methods", lambda kind: [])
    monkeypatch.setattr("tokenary.models.load_tokenizer", lambda model: byte_tokenizer())
    with pytest.raises(InputError, match="out of weights"):
        run(Settings(model="fake", port=0, engine="fake_engine:create", engine_options={"broken": "out of weights"}))


def test_without_the_extra_it_says_which(monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("tokenary.serve.") and "settings" not in name]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'tokenary[serve]'" in refusal("--port", "0")


def test_the_command_line_hands_everything_over(monkeypatch, tmp_path):
    import tokenary.serve.server as module

    got = []
    monkeypatch.setattr(module, "run", got.append)
    (tmp_path / "key").write_text("sixteen-letters-or-more\n")
    arguments = "serve -m smollm2 --host 0.0.0.0 -p 9 --deadline 5 --drain 7 --max-in-flight 3 -n 11 --no-playground"
    result = CliRunner().invoke(app, [*arguments.split(), "--api-key-file", str(tmp_path / "key"), "--threads", "1"])
    assert result.exit_code == 0, result.output
    (made,) = got
    assert (made.model, made.host, made.port, made.deadline, made.drain) == ("smollm2", "0.0.0.0", 9, 5, 7)
    assert (made.max_in_flight, made.max_jobs, made.max_new_tokens, made.playground) == (3, 6, 11, False)
    assert made.api_key == "sixteen-letters-or-more" and made.served_name == "smollm2"
    assert made.engine_options == {"model": "smollm2", "dtype": "auto", "threads": 1, "max_waiting": 6}


def test_the_command_is_there():
    assert serve.serve.__doc__ and CliRunner().invoke(app, ["serve", "--help"]).exit_code == 0
