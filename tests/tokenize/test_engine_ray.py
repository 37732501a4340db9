"""Ray Data counts what this process counts, to the last digit."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from tokenary.core.errors import InputError, TokenaryError
from tokenary.data import prose
from tokenary.tokenize import corpus
from tokenary.tokenize.audit import audit
from tokenary.tokenize.engine_ray import ray_engine
from tokenary.tokenize.laws import toy_tokenizer
from tokenary.tokenize.token_premium import TokenPremium
from tokenary.tokenize.tokenizer_information import TokenizerInformation
from tokenary.tokenize.training import train_bpe

installed = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not installed, reason="Ray is not installed: pip install 'tokenary[ray]'")


@pytest.mark.slow
@needs_ray
def test_ray_gives_the_same_figures_to_the_last_digit(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(corpus, "PART_BYTES", 9000)
    lines = prose().split("\n")[:400]
    for name in ("eng", "up"):
        (tmp_path / name).write_text("\n".join(line.upper() if name == "up" else line for line in lines))
    parts = corpus.plan_files([tmp_path / "eng", tmp_path / "up"], parallel=True)
    assert len(parts) > 4
    tokenizers, measures = [toy_tokenizer(), train_bpe(lines, 600)], [TokenPremium(), TokenizerInformation()]
    progress = []
    found = [
        audit(tokenizers, parts, measures),
        audit(tokenizers, parts, measures, engine=ray_engine(cpus=2), done=progress.append),
    ]
    assert not ray.is_initialized() and sum(progress) == sum(part.nbytes for part in parts)
    for record in found:
        record.pop("date")
    assert json.dumps(found[0]) == json.dumps(found[1])
    (tmp_path / "up").write_text("short")
    with pytest.raises(InputError, match="changed while it was read"):
        audit(tokenizers, parts, measures, engine=ray_engine(cpus=2))
    assert not ray.is_initialized()


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_a_cluster_that_is_not_there(address):
    engine = ray_engine(address)
    with pytest.raises(TokenaryError, match=f"cannot reach the Ray cluster {address}"):
        list(engine([], lambda nbytes: None))


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TokenaryError, match=r"pip install 'tokenary\[ray\]'"):
        ray_engine()
