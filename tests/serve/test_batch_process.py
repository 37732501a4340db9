"""``tokenary batch`` whole: Ctrl-C, and the same texts as the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from running import HERE, running
from test_batch import answers, line, text
from typer.testing import CliRunner

from tokenary.cli.app import app
from tokenary.models import load_tokenizer
from tokenary.serve import recipes
from tokenary.serve.text import Text

MODEL = ["-m", "stories260k", "--dtype", "float32", "--threads", "1", "--json"]
BODIES = [
    {"prompt": "Once upon a time", "max_tokens": 24, "temperature": temperature, "seed": seed, "model": model}
    for seed, temperature, model in (
        (1, 0.0, "stories260k"), (2, 1.0, "stories260k"), (3, 1.0, "stories260k+token-recycling"),
    )
]  # fmt: skip


def texts_of(folder, *more):
    """The texts of a batch over stories260k in this process, called with more arguments."""
    (folder / "in.jsonl").write_text("\n".join(line(str(n), body) for n, body in enumerate(BODIES)))
    out = folder / f"{len(more)}.jsonl"
    result = CliRunner().invoke(app, ["batch", str(folder / "in.jsonl"), "--out", str(out), *MODEL, *more])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["answered"] == 3
    return [text(answers(out)[str(n + 1)]) for n in range(3)]


#: `tokenary batch` over the double.
CODE = """
import sys
from running import byte_tokenizer
from tokenary import models
from tokenary.cli import main
from tokenary.serve import batch, settings
models.load_tokenizer = lambda model: byte_tokenizer()
real = batch.run_batch
def run(given, *files, **options):
    import dataclasses
    given = dataclasses.replace(given, engine="fake_engine:create", engine_options={"delay": 0.05})
    return real(given, *files, **options)
batch.run_batch = run
sys.exit(main(["batch", *sys.argv[1:]]))
"""


def test_ctrl_c_loses_nothing(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "in.out.jsonl"
    source.write_text("\n".join(line(str(n), {"prompt": "!endless", "max_tokens": 4 + 6 * n}) for n in range(12)))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    command = [sys.executable, "-c", CODE, str(source), "--model", "smollm2", "--batch", "2"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(20) == 130
    assert "run it again to go on" in said and "tokenary: cancelled" in said and "Traceback" not in said
    whole = out.read_bytes()
    assert whole.endswith(b"\n") and 3 <= whole.count(b"\n") < 12
    done = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["stood"] == whole.count(b"\n") and summary["answered"] == 12 - summary["stood"]
    assert out.read_bytes().startswith(whole) and len(answers(out)) == 12


def test_the_same_texts_as_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "methods", lambda kind: [])
    engine = {"model": "stories260k", "dtype": "float32", "threads": 1}
    options = {"model": "stories260k", "engine": "tokenary.serve.worker:load_engine"}
    with running(engine, text=Text(lambda: load_tokenizer("stories260k"), 10_000), **options) as server:
        theirs = [server.ask(**body).json()["choices"][0]["text"] for body in BODIES]
    assert texts_of(tmp_path) == theirs and len(set(theirs)) == 3
