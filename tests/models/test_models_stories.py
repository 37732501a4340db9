"""stories260k: the weights land where they belong, and the tokenizer is the one they were trained with."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.models.catalogue import WEIGHTS

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big dog. The dog was very happy and wanted to play with her."
)


@pytest.fixture(scope="module")
def table():
    data, at, rows = (WEIGHTS / "stories260k" / "tok512.bin").read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fI", data, at)
        rows.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return rows


def greedy_merging(table, text):
    """The reference: start from characters (bytes where unknown), merge the best-scoring pair, leftmost first."""
    ids = {piece: i for i, (piece, _) in enumerate(table) if i > 258}
    tokens = []
    for letter in " " + text:
        tokens += [ids[letter]] if letter in ids else [byte + 3 for byte in letter.encode()]
    while True:
        best = None
        for i in range(len(tokens) - 1):
            if min(tokens[i], tokens[i + 1]) < 259:  # a byte token is no text
                continue
            merged = ids.get(table[tokens[i]][0] + table[tokens[i + 1]][0])
            if merged is not None and (best is None or table[merged][1] > table[best[1]][1]):
                best = i, merged
        if best is None:
            return [1, *tokens]
        tokens[best[0] : best[0] + 2] = [best[1]]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("abcdehilnorstwy THOLS.,!?\n\"'“é5ñ"), min_size=1, max_size=80) | st.text(min_size=1)
)
def test_tokenizer_merges_as_the_reference_and_decodes_back(stories, table, text):
    (ids,) = stories.encode([text], raw=True)
    assert ids == greedy_merging(table, text)
    assert stories.decode(ids) == text
    assert "".join(stories.pieces(ids)) == text


def test_a_real_story_is_tokenized_and_predicted(stories, table):
    (ids,) = stories.encode([STORY], raw=True)
    assert ids == greedy_merging(table, STORY)
    with torch.no_grad():
        loss = stories.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss < 2.0 < math.log(512) / 3  # uniform over 512 pieces is 6.2


def test_shuffled_text_is_predicted_badly(stories):
    (ids,) = stories.encode([STORY], raw=True)
    order = torch.randperm(len(ids) - 1, generator=torch.Generator().manual_seed(0))
    shuffled = torch.tensor([[1, *torch.tensor(ids)[1:][order].tolist()]])
    with torch.no_grad():
        assert stories.model(shuffled, labels=shuffled).loss.item() > 4.0


def test_rotary_halves_are_right(stories):
    """With the query and key rows left in llama2.c order the story would be predicted clearly worse."""
    import copy

    wrong = copy.deepcopy(stories.model)
    for layer in wrong.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            w = projection.weight.data
            projection.weight.data = w.view(-1, 2, 4, 64).transpose(1, 2).reshape(w.shape)  # head size 8
    ids = torch.tensor(stories.encode([STORY], raw=True))
    with torch.no_grad():
        assert wrong(ids, labels=ids).loss > stories.model(ids, labels=ids).loss + 0.1


def test_end_of_story(stories):
    assert stories.eos_token_ids == (1, 2)
