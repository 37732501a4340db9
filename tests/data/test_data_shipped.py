from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import InputError, OptionError, UnknownNameError
from tokenary.data import Prompt, prompts, prose, read_prompts, stdlib_code
from tokenary.data.shipped import FILES


def test_prompts_that_ship():
    rows = prompts()
    assert len(rows) == 40 and len({row.id for row in rows}) == 40 and len({row.prompt for row in rows}) == 40
    for set_ in ("chat", "code", "summarise", "writing", "french", "german"):
        for workload in ("friendly", "hostile"):
            part = prompts(set_, workload)
            assert len(part) >= 2 and all((row.set, row.workload) == (set_, workload) for row in part)
    assert prompts(set="german") == [row for row in rows if row.set == "german"]


def test_texts_to_summarise_are_real_paragraphs():
    for row in prompts("summarise"):
        assert 120 <= len(row.prompt.partition("\n\n")[2].split()) <= 250


def test_unknown_sets():
    with pytest.raises(UnknownNameError, match="did you mean german"):
        prompts("germn")
    with pytest.raises(UnknownNameError, match="unknown workload"):
        prompts(workload="friend")


def test_prose():
    text = prose()
    assert 80_000 < len(text.encode()) < 110_000
    assert text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.") and "\ufffd" not in text and "\r" not in text
    digest = hashlib.sha256((FILES / "prose.txt").read_bytes()).hexdigest()
    assert digest in (FILES / "SOURCES.md").read_text()


def test_stdlib_code():
    a, b = stdlib_code(0, 30_000), stdlib_code(1, 30_000)
    assert a == stdlib_code(0, 30_000) != b
    assert 25_000 < len(a.encode()) <= 30_000 and a.endswith("\n")
    assert stdlib_code(0, 60_000).startswith(a)
    assert "def " in a and "import " in a
    for n in (0, 10**12):
        with pytest.raises(OptionError, match="n_bytes"):
            stdlib_code(0, n)


def test_read_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffTell me a story.\r\n\n  Erkläre mir 漢字.\u2028Bitte.  \n".encode())
    assert read_prompts(file) == [
        Prompt("line-1", "file", "unknown", "Tell me a story."),
        Prompt("line-3", "file", "unknown", "Erkläre mir 漢字.\u2028Bitte."),
    ]


def test_read_jsonl(tmp_path):
    row = {"id": "a", "set": "chat", "workload": "hostile", "prompt": "two\nlines"}
    for name in ("p.jsonl", "p.txt"):
        file = tmp_path / name
        file.write_text(json.dumps(row) + '\n{"prompt": "x"}\n')
        assert read_prompts(file) == [Prompt(**row), Prompt("line-2", "file", "unknown", "x")]


def test_a_line_that_only_looks_like_json_is_a_prompt(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('{"a": 1} is what?\n')
    assert read_prompts(file)[0].prompt == '{"a": 1} is what?'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"good\nb\xe4d\n", r"p\.txt, line 2: not UTF-8 \(byte 2\)"),
        ("p.txt", b"", r"p\.txt: no prompt in the file"),
        ("p.txt", b" \n\n", r"p\.txt: no prompt in the file"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": }\n', r"p\.jsonl, line 2: expected a JSON object"),
        ("p.jsonl", b'{"prompt": "x"}\n\n{"text": "y"}\n', "line 3: expected a JSON object"),
        ("p.jsonl", b'{"prompt": 7}\n', "line 1: expected a JSON object"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1: expected a JSON object"),
        ("p.jsonl", b"[" * 100_000, "line 1: expected a JSON object"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            read_prompts(path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_give_prompts_or_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_bytes(data)
    try:
        assert all(row.prompt for row in read_prompts(file))
    except InputError as error:
        assert "\n" not in str(error)
