"""The laws of drafting: a proposer may change how fast a text comes, never which text comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenary.core.decoding import Decoding
from tokenary.core.laws import (
    LawFunction,
    Make,
    NotApplicable,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Loop, Proposer
from tokenary.decode.denoise_laws import UNMASK_LAWS, WINDOW_LAWS
from tokenary.decode.scores import Scores
from tokenary.decode.width import DraftWidth
from tokenary.hf.target import Target, attached
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm
from tokenary.strategy_laws import STRATEGY_LAWS

NEW = 48


def prompts_of(*lengths: int, vocab: int = 97, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids that repeat themselves here and there, so that there is something to draft."""
    made = []
    for number, length in enumerate(lengths):
        stream = substream(seed, "law prompt", number)
        ids = stream.integers(0, vocab, length)
        ids[length // 2 :] = ids[: length - length // 2]
        made.append(ids.tolist())
    return made


RAGGED = prompts_of(23, 5, 40, 12)


def run(
    lm: LM,
    proposer: Proposer | None,
    prompts: Sequence[Sequence[int]],
    new: int = NEW,
    sampler: Sampler = Sampler(),  # noqa: B008 (frozen)
    end_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """New tokens of each prompt."""
    with attached(lm.model):
        loop = Loop(Target(lm.model), prompts, sampler, new, end_tokens, proposer)
        for _ in loop:
            pass
    return [sequence.new_ids for sequence in loop.sequences]


def lossless_only(make: Make) -> None:
    """Skip a law that binds lossless methods only."""
    if not make().card.lossless:
        raise NotApplicable("the card does not say lossless")


class Watched(Proposer):
    """A proposer whose every tree is held to the form that the target relies on."""

    def __init__(self, inner: Any, width: Any = None) -> None:
        self.inner, self.width = inner, width or inner.width
        self.trees: list[TokenTree] = []

    def start(self, contexts: Sequence[Sequence[int]]) -> None:
        """Begin."""
        self.inner.start(contexts)

    def join(self, contexts: Sequence[Sequence[int]]) -> None:
        """Take more sequences."""
        self.inner.join(contexts)

    def propose(self, contexts: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """Draft, and check the draft."""
        before = [list(context) for context in contexts]
        tree = self.inner.propose(contexts, nodes)
        require(before == [list(context) for context in contexts], "propose changed the contexts it was shown")
        well_formed(tree, contexts, nodes)
        self.trees.append(tree)
        return tree

    def observe(self, tree: TokenTree, scores: Scores, paths: Sequence[Sequence[int]]) -> None:
        """Learn."""
        self.inner.observe(tree, scores, paths)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep rows."""
        self.inner.select_rows(rows)


def well_formed(tree: TokenTree, contexts: Sequence[Sequence[int]], nodes: int) -> None:
    """Demand that a batch of trees has roots, parents and sizes as `TokenTree` says."""
    shape = (len(contexts), tree.width)
    require(tree.ids.shape == tree.parents.shape == shape, f"ids {tree.ids.shape}, parents {tree.parents.shape}")
    require(tree.ids.dtype == tree.parents.dtype == np.int64, f"ids are {tree.ids.dtype}, parents {tree.parents.dtype}")
    for row, context in enumerate(contexts):
        ids, parents = tree.ids[row], tree.parents[row]
        require(ids[0] == context[-1], f"row {row}: the root is {ids[0]}, the newest token is {context[-1]}")
        require(parents[0] == -1, f"row {row}: the root has the parent {parents[0]}")
        size = int(tree.sizes[row])
        require(size - 1 <= nodes, f"row {row}: {size - 1} nodes drafted, {nodes} allowed")
        for node in range(1, tree.width):
            above = int(parents[node])
            expected = 0 <= above < node if node < size else above == -1
            require(expected, f"row {row}: node {node} of {size} has the parent {above}")


# ---------------------------------------------------------------------------------------------------- the laws


def greedy_tokens_are_the_same(make: Make) -> None:
    """In float32, greedy decoding gives the very tokens that it gives without the method, alone and in a batch."""
    lossless_only(make)
    for family in ("llama", "gemma3", "gpt2"):
        lm = tiny_lm(family=family)
        for prompts in (RAGGED[:1], RAGGED):
            same_tokens(run(lm, make(), prompts), run(lm, None, prompts), f"{family}, batch of {len(prompts)}")


def sampled_tokens_are_the_same(make: Make) -> None:
    """Sampling with the same seed gives the very tokens that it gives without the method."""
    lossless_only(make)
    lm = tiny_lm(vocab=11)
    prompts = prompts_of(23, 5, 40, 12, vocab=11)
    for sampler in (Sampler(temperature=0.7, seed=1), Sampler(temperature=1.3, top_k=5, top_p=0.9, seed=2)):
        same_tokens(run(lm, make(), prompts, sampler=sampler), run(lm, None, prompts, sampler=sampler), str(sampler))


def samples_follow_the_model(make: Make) -> None:
    """Many samples of the fourth token are spread as the model's own probabilities say."""
    lossless_only(make)
    vocab, samples, temperature = 9, 2000, 1.5
    lm, prompt = tiny_lm(vocab=vocab, layers=1), prompts_of(12, vocab=vocab)[0]
    sampler = Sampler(temperature=temperature, seed=7)
    drawn = [ids[3] for ids in run(lm, make(), [prompt] * samples, 4, sampler)]
    counts = np.bincount(drawn, minlength=vocab)
    # Exactly: over all texts of three tokens, the probability of the text times that of the fourth token.
    texts = np.stack(np.meshgrid(*[np.arange(vocab)] * 3, indexing="ij"), -1).reshape(-1, 3)
    with torch.no_grad():
        ids = torch.tensor([prompt + text.tolist() for text in texts])
        logits = lm.model(ids, attention_mask=torch.ones_like(ids)).logits[:, len(prompt) - 1 :]
    step = (logits.double() / temperature).softmax(-1).numpy()  # (V^3, 4, V)
    weight = np.prod([step[np.arange(len(texts)), at, texts[:, at]] for at in range(3)], axis=0)
    expected = samples * weight @ step[:, 3]
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    require(
        chi2 < 40, f"chi-square {chi2:.1f} of {counts.tolist()} against {expected.round(1).tolist()}"
    )  # p < 1e-5 at 8 degrees


def a_batch_is_its_sequences(make: Make) -> None:
    """Neighbours in a batch, and their end, change nothing."""
    lm = tiny_lm()
    alone = [run(lm, make(), [prompt])[0] for prompt in RAGGED]
    same_tokens(run(lm, make(), RAGGED), alone, "batch against single")
    ends = (alone[0][6], alone[2][20])
    cut = [ids[: min([ids.index(end) + 1 for end in ends if end in ids], default=NEW)] for ids in alone]
    same_tokens(run(lm, make(), RAGGED, end_tokens=ends), cut, "sequences that end at different times")


def sequences_may_join(make: Make) -> None:
    """A sequence that joins a running batch, and one that is cancelled in it, change nobody's tokens."""
    lossless_only(make)
    lm = tiny_lm()
    for sampler in (Sampler(), Sampler(temperature=1.0, seed=3)):
        loop = Loop(Target(lm.model), [], sampler, NEW, (), make())
        sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(RAGGED)]
        passes = 0
        with attached(lm.model):
            while passes < 8 or any(sequence.finish is None for sequence in sequences):
                if passes in (0, 1, 4, 7):
                    newcomer = sequences[(0, 1, 4, 7).index(passes)]
                    target = Target(lm.model)
                    loop.join(target, target.prefill([newcomer.ids]), [newcomer])
                    while loop.calibrate():
                        pass
                if passes == 5 and sequences[0].finish is None:
                    loop.cancel(sequences[0])
                loop.step()
                passes += 1
        for sequence, whole in zip(sequences, run(lm, None, RAGGED, sampler=sampler), strict=True):
            end = len(sequence.new_ids) if sequence.finish == "cancelled" else NEW
            same_tokens([sequence.new_ids], [whole[:end]], f"{sampler}, sequence {sequence.index}")


def left_padding_changes_nothing(make: Make) -> None:
    """``model.generate(custom_generate=...)`` over left-padded prompts gives the tokens that unpadded ones give."""
    lm = tiny_lm()
    longest = max(map(len, RAGGED))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in RAGGED])
    found = lm.model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, custom_generate=make()
    )
    same_tokens(found[:, longest:].tolist(), run(lm, make(), RAGGED), "generate with left padding")


def the_same_seed_gives_the_same_text(make: Make) -> None:
    """Two fresh instances draft and write alike."""
    lm = tiny_lm()
    for sampler in (Sampler(), Sampler(temperature=1.0, seed=3)):
        texts, trees = [], []
        for _ in range(2):
            watched = Watched(make(), DraftWidth(8, fixed=8))  # a width chosen by the clock may differ
            texts.append(run(lm, watched, RAGGED, sampler=sampler))
            trees.append(watched.trees)
        same_tokens(texts[0], texts[1], "two runs")
        require(len(trees[0]) == len(trees[1]), f"{len(trees[0])} and {len(trees[1])} passes")
        for at, (left, right) in enumerate(zip(*trees, strict=True)):
            alike = np.array_equal(left.ids, right.ids) and np.array_equal(left.parents, right.parents)
            require(alike, f"the drafts of pass {at} differ")


def drafts_are_trees(make: Make) -> None:
    """Every draft has the newest token as root, parents before children, and no more nodes than were asked for."""
    lm = tiny_lm()
    for nodes in (1, 3, 8, 40):
        run(lm, Watched(make(), DraftWidth(nodes, fixed=nodes)), RAGGED)
    run(lm, Watched(make()), RAGGED)
    run(tiny_lm(vocab=11), Watched(make(), DraftWidth(8, fixed=8)), [[3], [0, 0]])  # hardly a past


def texts_end_where_they_should(make: Make) -> None:
    """An end token ends a text, also inside an accepted draft; no text is longer than asked for."""
    lm = tiny_lm()
    full = run(lm, make(), RAGGED)
    for new in (0, 1, 2, NEW - 1):
        same_tokens(run(lm, make(), RAGGED, new), [ids[:new] for ids in full], f"max_new_tokens={new}")
    for at in (0, 1, NEW // 2, NEW - 1):
        end = full[0][at]
        expected = full[0][: full[0].index(end) + 1]
        same_tokens(run(lm, make(), RAGGED[:1], end_tokens=[end]), [expected], f"end token {end}")


def nothing_of_earlier_texts_shows(make: Make) -> None:
    """What an instance learned from other texts may change its drafts, never the text."""
    lm = tiny_lm()
    fresh = run(lm, make(), RAGGED)
    used = make()
    run(lm, used, prompts_of(31, 8, seed=1))
    same_tokens(run(lm, used, RAGGED), fresh, "after other texts")
    same_tokens(run(lm, used, RAGGED[2:]), fresh[2:], "after a larger batch")
    with attached(lm.model):  # a run that was cancelled half-way
        for passes, _ in enumerate(Loop(Target(lm.model), RAGGED, Sampler(), NEW, (), used)):
            if passes == 5:
                break
    same_tokens(run(lm, used, RAGGED), fresh, "after a cancelled run")


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "draft": (
        greedy_tokens_are_the_same,
        sampled_tokens_are_the_same,
        samples_follow_the_model,
        a_batch_is_its_sequences,
        sequences_may_join,
        left_padding_changes_nothing,
        the_same_seed_gives_the_same_text,
        drafts_are_trees,
        texts_end_where_they_should,
        nothing_of_earlier_texts_shows,
        options_are_checked_and_fixed,
        the_recipe_survives_json,
    ),
    "choose": STRATEGY_LAWS,
    "strategy": STRATEGY_LAWS,
    "unmask": UNMASK_LAWS,
    "window": WINDOW_LAWS,
}
