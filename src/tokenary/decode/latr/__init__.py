"""LATR: lookahead tree-based rollouts (arXiv 2510.24302).

Samples of one prompt are often near-copies. LATR forks a sequence into the runner-up token where the model is unsure,
lets the fork run for a few tokens, and deletes it if it merely rejoins what it was forked from. Once a prompt has G
branches that took different turns, each is completed by ordinary sampling.

    fork:    into candidate j > 1  iff  p_j > tau_abs  and  p_1 - p_j < tau_rel       p: raw probabilities
    prune:   at age r, with a, b the last r tokens of a branch and of its parent, iff
             edit(a, b) / r < tau_ed  or  suffix(a, b) > tau_suf  or  rouge_l(a, b) > tau_rouge

A pruned branch takes its descendants with it; its place is free for a later fork. Every branch carries the sum of its
raw log-probabilities; the answer is the branch with the highest mean. Forced forks are not drawn from the model: a
group is no sample of it, and who estimates with it (as policy gradients do) takes a bias that nothing here corrects.

The release lets a whole batch leave the tree together; here each prompt leaves by itself, so that a batch equals its
single prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.decode.latr.likeness import edit_distance, is_word, rouge_l, suffix_match
from tokenary.decode.latr.rollouts import Rollouts
from tokenary.hf.strategy import Strategy, Task
from tokenary.hf.target import check_causal

CARD = Card(
    slug="latr",
    cls="LATR",
    room="decode",
    slot="strategy",
    title="Lookahead Tree-Based Rollouts for Enhanced Trajectory-Level Exploration in Reinforcement Learning with "
    "Verifiable Rewards",
    summary="writes several continuations that took different turns: forks where unsure, prunes forks that rejoin",
    paper="2510.24302",
    year=2025,
    code="starreeze/latr",
    requires=("kv-cache",),
    refuses=(("draft", "it writes with a loop of its own"),),
)

__all__ = [
    "CARD",
    "ETA_COUNTDOWN",
    "ETA_MATH",
    "LATR",
    "edit_distance",
    "eta_at",
    "forks",
    "is_word",
    "rouge_l",
    "suffix_match",
    "within",
]

#: Published schedules of the tree's share of a group: training step to eta.
ETA_COUNTDOWN: Mapping[int, float] = {0: 1.0, 10: 0.75, 20: 0.5, 80: 0.25, 200: 0.0}
ETA_MATH: Mapping[int, float] = {0: 1.0, 100: 0.75, 200: 0.5, 300: 0.25}

_Share = Annotated[float, Field(ge=0, le=1)]


def forks(probabilities: Tensor, tau_abs: float, tau_rel: float) -> Tensor:
    """Return which candidates a sequence may fork into.

    Parameters
    ----------
    probabilities : Tensor
        Of the likeliest tokens, descending, (n, m).
    tau_abs, tau_rel : float
        A candidate is more likely than `tau_abs`, and less than `tau_rel` behind the likeliest token.

    Returns
    -------
    Tensor
        bool, (n, m - 1): candidates 2 to m.
    """
    others = probabilities[:, 1:]
    return (others > tau_abs) & (probabilities[:, :1] - others < tau_rel)


def within(
    room: int, pairs: Sequence[tuple[int, int]], probabilities: Sequence[float], by_row: bool = False
) -> list[tuple[int, int]]:
    """Return the forks of one prompt that there is room for, second candidates before third ones.

    Parameters
    ----------
    room : int
        Most forks.
    pairs : sequence of (int, int)
        Row, and rank of the candidate from 0; the rows of older branches are smaller.
    probabilities : sequence of float
        Of these candidates.
    by_row : bool
        Within a rank, older branches first instead of likelier candidates.
    """
    order = sorted(
        range(len(pairs)), key=lambda at: (pairs[at][1], 0.0 if by_row else -probabilities[at], pairs[at][0])
    )
    return [pairs[at] for at in order[:room]]


def eta_at(step: int, schedule: Mapping[int, float]) -> float:
    """Return the tree's share of a group at a training step: the entry of the schedule that was reached last."""
    return schedule[max(start for start in schedule if start <= step)]


class LATR(Strategy):
    """Writes G branches that took different turns, in one batch with those of all prompts.

    Parameters
    ----------
    group : int
        Branches a prompt, G.
    tau_abs, tau_rel : float
        A runner-up becomes a fork if it is more likely than `tau_abs` and less than `tau_rel` behind the likeliest
        token. The paper's values for mathematics are 0.15 and 0.25.
    top : int
        Candidates a token, the likeliest included.
    ages : str
        Tokens after its fork at which a branch is compared with its parent, for example ``20/30/50``.
    tau_ed, tau_suf, tau_rouge : float
        Prune where the edit distance over the age is below `tau_ed` (0 never), the longest matching suffix over it
        above `tau_suf` (1 never), or ROUGE-L above `tau_rouge` (1 never). For mathematics 0, 0.2 and 0.5.
    order : {"probability", "row"}
        Which forks go first where there is room for some only: the likeliest (the paper), or those of the oldest
        branches (the release). Second candidates always go before third ones.
    sample : {"none", "full", "always"}
        When a branch of a growing tree that does not fork is sampled, rather than taking the likeliest token: never,
        once the tree is full, or always.
    words : bool
        Do not fork into punctuation, white space and English function words; needs a tokenizer.
    full, decay : float
        The tree is left once it has ``(full - decay * step / max_new_tokens) * eta * G`` leaves, rounded, all of them
        at the highest age.
    tree_steps : int
        It is left after so many tokens in any case (1024 for mathematics). Missing leaves are copies of its root.
    eta : float
        Share of the branches that come from the tree; the others are independent samples. See `eta_at`.
    random_forks : float
        For comparison: fork into the runner-up with this probability at every token, however likely it is; 0 does not.
    """

    def __init__(
        self,
        group: Annotated[int, Field(ge=1, le=256, json_schema_extra={"remote": 8})] = 8,
        tau_abs: _Share = 0.25,
        tau_rel: _Share = 0.15,
        top: Annotated[int, Field(ge=2, le=16)] = 2,
        ages: Annotated[str, Field(pattern=r"^[1-9]\d*(/[1-9]\d*)*$")] = "20/30/50",
        tau_ed: _Share = 0.4,
        tau_suf: _Share = 1.0,
        tau_rouge: _Share = 1.0,
        order: Literal["probability", "row"] = "probability",
        sample: Literal["none", "full", "always"] = "none",
        words: bool = False,
        full: _Share = 0.98,
        decay: _Share = 0.0,
        tree_steps: Annotated[int, Field(ge=1)] = 512,
        eta: _Share = 1.0,
        random_forks: _Share = 0.0,
    ) -> None:
        if decay > full:
            raise OptionError("decay", decay, f"at most full={full}")
        self.group, self.tau_abs, self.tau_rel, self.top = group, tau_abs, tau_rel, top
        self.steps = frozenset(map(int, ages.split("/")))
        self.tau_ed, self.tau_suf, self.tau_rouge = tau_ed, tau_suf, tau_rouge
        self.order, self.sample, self.words = order, sample, words
        self.full, self.decay, self.tree_steps, self.random_forks = full, decay, tree_steps, random_forks
        self.capacity = round(eta * group)

    def prepare(self, model: PreTrainedModel, tokenizer: Any | None) -> None:
        """Refuse a model that is not causal, and `words` without a tokenizer."""
        check_causal(model)
        if self.words and tokenizer is None:
            raise UnsupportedModelError("latr with words=True needs a tokenizer, which this model lacks")

    def loop(self, task: Task) -> Rollouts:
        """Return the loop that grows and completes the trees."""
        self.prepare(task.model, task.tokenizer)
        return Rollouts(task, self)

    def forks(self, probabilities: Tensor) -> Tensor:
        """Return which candidates (n, m) may become forks, (n, m - 1)."""
        return forks(probabilities, self.tau_abs, self.tau_rel)

    def within(
        self, room: int, pairs: Sequence[tuple[int, int]], probabilities: Sequence[float]
    ) -> list[tuple[int, int]]:
        """Return the forks of one prompt that there is room for."""
        return within(room, pairs, probabilities, self.order == "row")

    def leaves_tree(self, done: float, leaves: int, age: int) -> bool:
        """Whether a tree with so many leaves, of at least this age, is grown; `done` is the share of max_new_tokens."""
        return leaves >= round((self.full - self.decay * done) * self.capacity) and age >= max(self.steps)

    def rejoins(self, branch: Sequence[int], parent: Sequence[int]) -> bool:
        """Whether the newest tokens of a branch are too like those of its parent."""
        return (
            edit_distance(branch, parent) / len(branch) < self.tau_ed
            or (self.tau_suf < 1 and suffix_match(branch, parent) > self.tau_suf)
            or (self.tau_rouge < 1 and rouge_l(branch, parent) > self.tau_rouge)
        )
