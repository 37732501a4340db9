"""The laws of probes: a run says the same again, leaves everything as it was, and reports plain figures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.laws import (
    LawFunction,
    Make,
    options_are_checked_and_fixed,
    require,
    the_recipe_survives_json,
)
from tokenary.models import LM, tiny_lm
from tokenary.probe.base import Probe, Report

WORDS = (
    " the",
    " and",
    " of",
    " whale",
    " ship",
    " man",
    " sea",
    " Answer",
    " number",
    " word",
    "the",
    "whale",
    "ing",
    "ed",
)
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}<|turn|>{% endfor %}"


def toy(seed: int = 0, family: str = "llama") -> LM:
    """Make a random net with a byte-level tokenizer: the 256 bytes, every prefix of a few words, special tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {piece: i for i, piece in enumerate(["<|end|>", "<|turn|>", *sorted(split.alphabet())])}
    merges = []
    for word in WORDS:
        piece = split.pre_tokenize_str(word)[0][0]
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|end|>", "<|turn|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )
    lm = tiny_lm(seed, vocab=made.get_vocab_size(), family=family, context=2048)
    model: Any = lm.model
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LM(lm.name, model, tokenizer, lm.fingerprint, lm.source)


def built(make: Make) -> Probe:
    """Construct the probe as it runs on a toy net in a moment; options under test win."""
    probe = make()
    default = type(probe)().options
    given = {name: value for name, value in probe.options.items() if value != default[name]}
    return make(**{**probe.toy_options, **given})


def plain(report: Report) -> dict[str, Any]:
    """Return a report as plain JSON types; a law is broken where it has others."""
    try:
        return report.to_json()
    except (TypeError, ValueError) as error:
        require(False, f"the report is no plain JSON: {error}")
        raise


def a_report_is_plain_and_complete(make: Make) -> None:
    """The report is plain JSON, names probe and model, has figures, and every row has a cell for each column."""
    report = built(make).run(toy())
    found = plain(report)
    require(found["slug"] == make().card.slug, f"the report is of {found['slug']!r}")
    require(found["model"] == toy().name, f"the model is called {found['model']!r}")
    require(found["figures"] and found["tables"], "no figures or no tables")
    for table in found["tables"]:
        for row in table["rows"]:
            require(len(row) == len(table["columns"]), f"{table['title']}: {row} under {table['columns']}")


def the_seed_decides(make: Make) -> None:
    """The same seed gives the same report, whatever the global random generators are at and were drawn from."""
    torch.manual_seed(1)
    np.random.seed(1)
    first = plain(built(make).run(toy(), seed=3))
    torch.manual_seed(2)
    np.random.seed(2)
    require(plain(built(make).run(toy(), seed=3)) == first, "another report the second time")


def no_state_between_runs(make: Make) -> None:
    """A probe that has run before on another model and seed reports what a fresh one does."""
    used = built(make)
    used.run(toy(1), seed=5)
    require(plain(used.run(toy(), seed=3)) == plain(built(make).run(toy(), seed=3)), "the first run left something")


def the_model_stays_as_it_was(make: Make) -> None:
    """Weights, configuration, mode, hooks, the tokenizer and the global random generator are as before the run."""
    lm = toy()
    model: Any = lm.model
    kept = copy.deepcopy(model.state_dict())
    tokenizer: Any = lm.tokenizer

    def facts() -> dict[str, Any]:
        return {
            "configuration": str(model.config.to_dict()) + str(model.generation_config.to_dict()),
            "attention": model.config._attn_implementation,
            "mode": [module.training for module in model.modules()],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            "gradients": [parameter.requires_grad for parameter in model.parameters()],
            "tokenizer": tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template),
            "learned recipes": len(lm.warm),
            "random numbers": torch.random.get_rng_state().tolist(),
        }

    before = facts()
    built(make).run(lm, seed=1)
    for name, value in facts().items():
        require(value == before[name], f"{name}: changed by the run")
    same = all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    require(same, "weights: changed by the run")
    require(all(parameter.grad is None for parameter in model.parameters()), "gradients were left behind")


def progress_goes_up_to_the_total(make: Make) -> None:
    """Progress is told in rising steps of one total, and ends there."""
    told: list[tuple[int, int]] = []
    built(make).run(toy(), progress=lambda done, total: told.append((done, total)))
    require(bool(told), "no progress was told")
    done, totals = [step for step, _ in told], {total for _, total in told}
    require(done == sorted(done) and len(totals) == 1, f"steps {done[:8]} of {sorted(totals)}")
    require(told[-1][0] == told[-1][1], f"it ends at {told[-1][0]} of {told[-1][1]}")


def a_model_without_tokenizer_is_refused(make: Make) -> None:
    """A model without a tokenizer is refused with `UnsupportedModelError`, before any work."""
    told: list[int] = []
    try:
        built(make).run(tiny_lm(), progress=lambda done, total: told.append(done))
    except UnsupportedModelError:
        require(not told, "work was done before")
        return
    require(False, "it is taken")


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "probe": (
        options_are_checked_and_fixed,
        the_recipe_survives_json,
        a_report_is_plain_and_complete,
        the_seed_decides,
        no_state_between_runs,
        the_model_stays_as_it_was,
        progress_goes_up_to_the_total,
        a_model_without_tokenizer_is_refused,
    )
}
