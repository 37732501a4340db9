import json
import os
import subprocess
import sys

import pytest

from tokenary.cli import compress as commands
from tokenary.cli.app import run
from tokenary.codec import blocks, files
from tokenary.core.errors import InputError, UnknownNameError
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm

TEXT = b"In the beginning the hand and the land and the sand ran and ran, and then the end began anew. " * 8
OPTIONS = ["--with", "nacrith:lanes=2,least=8,window=24,drop=8", "--block", "1"]


def toy_lm():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tokenary.core.spelling import CHAR_OF

    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(CHAR_OF.values())}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    net = tiny_lm(vocab=256)
    return LM("toy", net.model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), net.fingerprint, net.source)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    lm = toy_lm()
    monkeypatch.setattr(commands, "_load", lambda name: lm)
    monkeypatch.setattr(files, "sizes", lambda pieces, size: [10 * size] * 4)  # a random net loses against any packer
    monkeypatch.setattr(blocks, "pack", lambda data: (0, data))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(TEXT)
    return tmp_path


def test_a_file_there_and_back(toy, capsys):
    assert run(["compress", "a.txt", *OPTIONS]) == 0
    assert "bits a byte" in capsys.readouterr().err
    (toy / "a.txt").rename(toy / "original")
    assert run(["decompress", "a.txt.tkz"]) == 0
    assert (toy / "a.txt").read_bytes() == TEXT and not list(toy.glob(".*"))


def test_many_files_into_a_folder_and_json(toy, capsys):
    (toy / "b.bin").write_bytes(os.urandom(300))
    (toy / "out").mkdir()
    assert run(["compress", "a.txt", "b.bin", "-o", "out", "--workers", "2", "--json", *OPTIONS]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["bytes"] for row in rows] == [len(TEXT), 300] and not rows[1]["coded"]
    assert rows[0]["packed_bytes"] == (toy / "out" / "a.txt.tkz").stat().st_size
    with pytest.raises(InputError, match="folder"):
        run(["compress", "a.txt", "b.bin", "-o", "one", *OPTIONS])


def test_nothing_is_written_over(toy):
    run(["compress", "a.txt", *OPTIONS])
    with pytest.raises(InputError, match="--force"):
        run(["compress", "a.txt", *OPTIONS])
    with pytest.raises(InputError, match="--force"):
        run(["decompress", "a.txt.tkz"])
    assert run(["compress", "a.txt", "--force", *OPTIONS]) == 0


def test_a_damaged_archive_leaves_no_file_unless_recovered(toy, capsys):
    (toy / "a.txt").write_bytes(TEXT * 3)
    run(["compress", "a.txt", *OPTIONS])
    data = bytearray((toy / "a.txt.tkz").read_bytes())
    at = data.index(b"\xf5TkB", data.index(b"\xf5TkB") + 1)
    data[at + 40] ^= 1
    (toy / "a.txt.tkz").write_bytes(data)
    with pytest.raises(InputError, match="frame 1"):
        run(["decompress", "a.txt.tkz", "-o", "back"])
    assert not (toy / "back").exists()
    assert run(["decompress", "a.txt.tkz", "-o", "back", "--recover"]) == 1
    assert "bytes 1024 to 2048" in capsys.readouterr().err
    whole = TEXT * 3
    assert (toy / "back").read_bytes() == whole[:1024] + whole[2048:]


def test_dry_run_writes_nothing(toy, capsys):
    assert run(["compress", "a.txt", "--dry-run", *OPTIONS]) == 0
    assert "100% text" in capsys.readouterr().out
    assert [file.name for file in toy.iterdir()] == ["a.txt"]


def test_a_dry_run_of_what_is_no_text_loads_no_model(toy, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_load", lambda name: pytest.fail("the model was loaded"))
    (toy / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" + os.urandom(5000))
    assert run(["compress", "photo.jpg", "--dry-run", *OPTIONS]) == 0
    assert "0% text" in capsys.readouterr().out


def test_wrong_files_are_one_line(toy):
    with pytest.raises(InputError, match="cannot read"):
        run(["compress", "nothing.txt"])
    with pytest.raises(InputError, match="does not end in"):
        run(["decompress", "a.txt"])
    with pytest.raises(InputError, match="not an archive"):
        run(["decompress", "a.txt", "-o", "x"])
    assert not (toy / "x").exists()


def test_another_method_is_refused_by_name(toy):
    with pytest.raises(UnknownNameError, match="unknown codec 'zipcache'"):
        run(["compress", "a.txt", "--with", "zipcache"])


def test_a_pipe_there_and_back(tmp_path):
    data = os.urandom(5000)  # no text: no model is loaded
    command = [sys.executable, "-m", "tokenary"]
    packed = subprocess.run([*command, "compress", "-"], input=data, capture_output=True, check=True).stdout
    assert len(packed) <= 5064
    assert subprocess.run([*command, "decompress", "-"], input=packed, capture_output=True, check=True).stdout == data
