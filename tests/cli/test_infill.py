"""Blanks filled in, from Python and from the command line."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from tokenary import generate, infill
from tokenary.core.errors import InputError, OptionError, TokenaryError, UnsupportedModelError
from tokenary.decode.any_subset_ar import log_density
from tokenary.models.text_diffusion import build, load_text_diffusion, save_text_diffusion
from tokenary.models.text_diffusion.corpus import train_tokenizer
from tokenary.models.tiny import tiny_lm

TEXTS = ["The old cat sat on the mat, and the shy dog slept.", "Nobody knew why the red owl sat in the oak."]
SMALL = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untrained model of each kind, as folders."""
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    made = {}
    for kind in ("any-subset", "diffusion"):
        model = build(seed=3, objective=kind, vocab=tokenizer.get_vocab_size(), context=48, **SMALL)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10 if "self_attn" in name else 3)
            model.model.embed_tokens.weight[:3] = 0  # special tokens are never the likeliest
        made[kind] = tmp_path_factory.mktemp("models") / kind
        save_text_diffusion(model, tokenizer, made[kind])
    return made


@pytest.fixture(scope="module")
def lms(folders):
    return {kind: load_text_diffusion(folder) for kind, folder in folders.items()}


def ids_of(lm, text):
    return lm.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["any-subset", "diffusion"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blanks_are_filled_and_the_rest_stays(lms, kind, temperature):
    lm = lms[kind]
    (filled,) = infill(lm, "The ___ sat on the ____ and slept.", blank=[2, 3], temperature=temperature)
    left, middle, right = (ids_of(lm, text) for text in ("The", " sat on the", " and slept."))
    a, b = len(left), len(left) + 2 + len(middle)
    assert filled.token_ids[:a] == left and filled.token_ids[a + 2 : b] == middle and filled.token_ids[b + 3 :] == right
    assert lm.model.config.mask_token_id not in filled.token_ids
    assert filled.text == lm.decode(filled.token_ids)
    assert filled.blanks == (lm.decode(filled.token_ids[a : a + 2]), lm.decode(filled.token_ids[b : b + 3]))
    assert filled.stats.new_tokens == 5 and filled.stats.prompt_tokens == len(filled.token_ids) - 5
    assert filled.trace.passes <= 5 and len(filled.trace.from_draft) == 5
    assert json.loads(json.dumps(filled.to_json()))["blanks"] == list(filled.blanks)


def test_the_density_is_that_of_what_was_filled_in(lms):
    lm = lms["any-subset"]
    (filled,) = infill(lm, "The ___ sat.", temperature=1.0, seed=5)
    masked = torch.tensor([[i in range(len(ids_of(lm, "The")), len(ids_of(lm, "The")) + 4) for i in range(100)]])
    masked = masked[:, : len(filled.token_ids)]
    density = log_density(lm.model, torch.tensor([filled.token_ids]), masked)
    assert filled.log_density == pytest.approx(density.item(), abs=1e-3)
    assert infill(lms["diffusion"], "The ___ sat.")[0].log_density is None


@pytest.mark.parametrize("kind", ["any-subset", "diffusion"])
def test_several_templates_in_any_batches(lms, kind):
    lm = lms[kind]
    templates = ["The ___ sat.", "___ dog ___", "Nobody knew why the red ___"]
    together = infill(lm, templates, blank=3, temperature=1.0, seed=2)
    for batch_size in (1, 2):
        apart = infill(lm, templates, blank=3, temperature=1.0, seed=2, batch_size=batch_size)
        assert [f.token_ids for f in apart] == [f.token_ids for f in together]


def test_blanks_may_stand_side_by_side_and_at_either_end(lms):
    (filled,) = infill(lms["any-subset"], "___ ___ owl ___", blank=[1, 2, 3])
    ids, owl = filled.token_ids, ids_of(lms["any-subset"], " owl")
    assert ids[3:-3] == owl
    parts = (ids[:1], ids[1:3], ids[-3:])
    assert filled.blanks == tuple(lms["any-subset"].decode(part) for part in parts)


@pytest.mark.parametrize("kind", ["any-subset", "diffusion"])
def test_pieces_stream_what_is_settled(lms, kind):
    lm, pieces = lms[kind], []
    templates = ["The ___ sat on the ___.", "Nobody knew ___ owl.", "___"]
    whole = infill(lm, templates, temperature=1.0, seed=3, batch_size=2, on_piece=pieces.append)
    for row, (template, filled) in enumerate(zip(templates, whole, strict=True)):
        mine = [piece for piece in pieces if piece.row == row]
        before = template.split("___")[0].removesuffix(" ")
        assert before + "".join(piece.text for piece in mine) == filled.text
        first, placed = len(ids_of(lm, before)), {}
        for piece in mine:
            placed.update(zip(piece.at, piece.token_ids, strict=True))
        assert len(placed) == filled.stats.new_tokens
        assert all(filled.token_ids[first + at] == token for at, token in placed.items())
        assert mine[-1].finish == "length" and len(pieces) > len(templates)


def test_templates_through_generate(lms):
    lm = lms["any-subset"]
    mask = lm.model.config.mask_token_id
    template = [*ids_of(lm, "The"), mask, mask, *ids_of(lm, " sat.")]
    (filled,) = generate(lm, [template], "any-subset-ar", max_new_tokens=3)
    assert len(filled.token_ids) == len(template) + 3 - len(ids_of(lm, "The")) and mask not in filled.token_ids
    for tokens, prompt in ((0, ids_of(lm, " sat.")), (-1, template)):
        with pytest.raises(OptionError, match="max_new_tokens"):
            generate(lm, [prompt], "any-subset-ar", max_new_tokens=tokens)


def test_it_can_be_cancelled(lms):
    def stop(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infill(lms["any-subset"], "The ___ sat.", on_piece=stop)
    assert infill(lms["any-subset"], "The ___ sat.")[0].trace.passes <= 4  # and used again


def test_token_ids_are_templates_too(lms):
    lm = lms["any-subset"]
    mask = lm.model.config.mask_token_id
    by_text = infill(lm, "The ___ sat.", blank=2)
    by_ids = infill(lm, [[*ids_of(lm, "The"), mask, mask, *ids_of(lm, " sat.")]])
    assert by_text[0].token_ids == by_ids[0].token_ids and by_text[0].blanks == by_ids[0].blanks


def test_sequential_and_speculative_greedy_agree(lms):
    lm = lms["any-subset"]
    runs = [infill(lm, "The ___ sat on ___.", f"any-subset-ar:{o}")[0] for o in ("k=1", "k=5", "drafter=ngram")]
    assert runs[0].token_ids == runs[1].token_ids == runs[2].token_ids
    assert runs[0].trace.passes == 8 and runs[0].stats.recipe == "any-subset-ar:k=1"


def test_what_is_refused(lms):
    lm = lms["any-subset"]
    with pytest.raises(UnsupportedModelError, match="left to right"):
        infill(tiny_lm(), "The ___ sat.")
    with pytest.raises(InputError, match="no blank"):
        infill(lm, ["The ___ sat.", "The __ sat."])
    with pytest.raises(InputError, match="context of 48"):
        infill(lm, "The ___ sat.", blank=60)
    for blank in (0, [2, 0], [1, 2, 3]):
        with pytest.raises(OptionError, match="blank"):
            infill(lm, "The ___ sat on ___.", blank=blank)
    with pytest.raises(OptionError, match="batch_size"):
        infill(lm, "The ___ sat.", batch_size=0)
    with pytest.raises(TokenaryError):
        infill(lm, "The ___ sat.", "token-recycling")
    assert infill(lm, []) == []


# The command


@pytest.fixture
def cli(cli):
    return functools.partial(cli, "infill")


def test_the_command_prints_the_text(cli, folders, lms):
    code, out, err = cli(
        "The ___ sat on the ___.", "--model", folders["any-subset"], "-b", 1, "-b", 3, "--dtype", "float32"
    )
    expected = infill(lms["any-subset"], "The ___ sat on the ___.", blank=[1, 3])[0]
    assert (code, out) == (0, expected.text + "\n")
    assert "4 tokens in 2 blanks" in err and f"log-density {expected.log_density:.2f}" in err


def test_the_command_for_a_program(cli, folders, lms):
    arguments = ("--temperature", 1, "--seed", 7, "--with", "any-subset-ar:k=3", "--dtype", "float32", "--json")
    found = json.loads(cli("The ___ sat.", "--model", folders["any-subset"], *arguments)[1])
    expected = infill(lms["any-subset"], "The ___ sat.", "any-subset-ar:k=3", temperature=1.0, seed=7)[0]
    assert found["token_ids"] == expected.token_ids and found["blanks"] == list(expected.blanks)
    assert found["seed"] == 7 and found["log_density"] == pytest.approx(expected.log_density, abs=1e-3)


def test_the_help_teaches(cli):
    code, out, _ = cli("--help")
    assert code == 0 and "Example: tokenary infill" in out and "___" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("no blank",),
        ("a ___", "--with", "any-subset-ar:k=0"),
        ("a ___", "--with", "no-such-method"),
        ("a ___", "--top-p", 2),
        ("a ___ b", "-b", 1, "-b", 2),
        ("a ___ b", "-b", 0),
    ],
    ids=str,
)
def test_wrong_input_is_one_line_before_the_model_is_read(cli, monkeypatch, arguments):
    monkeypatch.setattr("tokenary.run.load", lambda *_, **__: pytest.fail("the model was read"))
    code, out, err = cli(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("tokenary: ")


def test_a_model_that_does_not_fit_is_one_line(cli, folders):
    for arguments in (("--model", "stories260k"), ("--model", folders["diffusion"], "--with", "any-subset-ar")):
        code, out, err = cli("a ___ b", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and "kind" in err


def test_ctrl_c(cli, folders, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenary.decode.any_subset_ar.loop.Filling._round", interrupted)
    assert cli("a ___ b", "--model", folders["any-subset"]) == (130, "", "tokenary: cancelled\n")
