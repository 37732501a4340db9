"""Tokenizers of the catalogue against the reference vectors that llama.cpp carries (MIT): texts and their ids."""

from __future__ import annotations

import tarfile

import pytest

from tokenary.core.errors import FetchError
from tokenary.core.files import cache_folder, sha256_of
from tokenary.core.packages import fetch_member
from tokenary.tokenize.base import load_tokenizer

FILE = "llama_cpp_python-0.3.36.tar.gz"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
MODELS = "llama_cpp_python-0.3.36/vendor/llama.cpp/models"


@pytest.fixture(scope="module")
def archive():
    file = cache_folder() / "data" / FILE
    try:
        if not (file.is_file() and sha256_of(file) == SHA256):
            file.parent.mkdir(parents=True, exist_ok=True)
            fetch_member("pypi-sdist", "llama-cpp-python==0.3.36", "", SHA256, file)
        with tarfile.open(file) as box:
            yield box
    except FetchError as error:
        pytest.skip(f"the reference vectors cannot be fetched: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vectors"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("qwen2.5", "qwen2")])
def test_the_ids_are_those_of_the_reference(archive, name, vectors):
    def read(ending):
        return archive.extractfile(f"{MODELS}/ggml-vocab-{vectors}.gguf.{ending}").read().decode()

    texts = read("inp").split("\n__ggml_vocab_test__\n")
    expected = [[int(word) for word in line.split()] for line in read("out").split("\n")]
    assert len(texts) == len(expected) == 47
    tokenizer = load_tokenizer(name)
    assert [row.tolist() for row in tokenizer.encode_batch(texts)] == expected
