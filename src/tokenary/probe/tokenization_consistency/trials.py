"""The trials: prompts, the arms that answer them, and what was made of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tokenary.core.encodings import alternatives
from tokenary.core.errors import InputError
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.models.lm import LM
from tokenary.probe.tokenization_consistency.alignment import WORD, Text
from tokenary.probe.tokenization_consistency.codec import Codec, splice
from tokenary.probe.tokenization_consistency.likelihood import Place
from tokenary.probe.tokenization_consistency.masking import Target, What, ban, ban_at_random
from tokenary.probe.tokenization_consistency.outcomes import Answer, judge
from tokenary.probe.tokenization_consistency.passages import INSTRUCTION, Passage
from tokenary.probe.tokenization_consistency.static import enumerate_encodings
from tokenary.probe.tokenization_consistency.writing import Request, write

GREEDY, SAMPLED, MASKED, RANDOM, ODD = "greedy", "sampled", "masked", "random mask", "odd input"
BATCH = 8  # trials; each is answered in every arm at once
MOST = 64  # encodings of a word that are looked at


@dataclass(frozen=True)
class Trial:
    """A passage ready to be answered.

    Parameters
    ----------
    passage : Passage
        Text and targets.
    plain, marked : Text
        The passage as a copy would have it, without brackets and with them.
    odd : Text
        The marked passage with its targets in other tokens.
    prompt, odd_prompt : list of int
        What the model reads.
    targets : list of Target
        What a mask needs to know.
    """

    passage: Passage
    plain: Text
    marked: Text
    odd: Text
    prompt: list[int]
    odd_prompt: list[int]
    targets: list[Target]

    @property
    def limit(self) -> int:
        """Most tokens of an answer."""
        return 12 + len(self.marked.ids) * 5 // 4


def make(lm: LM, codec: Codec, passage: Passage, unit: str, stream: tuple[int, int]) -> Trial:
    """Encode a passage; `stream` (seed, number) names the odd encodings of its targets.

    Raises
    ------
    InputError
        Passage and answer do not fit into the model's context.
    """
    plain, marked = codec.own(passage.text), codec.own(passage.marked)
    prompt = codec.text(lm.encode([INSTRUCTION.format(unit=unit, passage=passage.marked)])[0])
    odd, asked, at = marked, prompt, prompt.data.rfind(marked.data)
    targets = []
    for i in passage.targets:
        word, (start, stop) = plain.surfaces[i].encode(), marked.words[i]
        before = plain.data[slice(*plain.words[i - 1])]
        targets.append(Target(word, before, plain.span(*plain.words[i]).ids, marked.span(start, stop).ids))
        own = list(marked.span(start, stop).pieces)
        others = [p for p in enumerate_encodings(codec.vocabulary.id_of, word, MOST) if p != own]
        if others and at >= 0:
            chosen = codec.ids(others[int(substream(*stream, "odd", i).integers(len(others)))])
            respelled, read = splice(odd, start, stop, chosen), splice(asked, at + start, at + stop, chosen)
            if respelled and read:
                odd, asked = codec.text(respelled), codec.text(read)
    made = Trial(passage, plain, marked, odd, prompt.ids, asked.ids, targets)
    if max(len(made.prompt), len(made.odd_prompt)) + made.limit > lm.context_length:
        raise InputError(f"a passage and its answer do not fit into the {lm.context_length} tokens of {lm.name}")
    return made


def answer(
    lm: LM, codec: Codec, trials: Sequence[Trial], arms: dict[str, What | None], sampler: Sampler
) -> dict[str, list[Answer]]:
    """Let the model answer in every arm and judge what it wrote.

    Parameters
    ----------
    lm, codec : LM, Codec
        The model.
    trials : sequence of Trial
        One batch.
    arms : dict
        Names (`GREEDY`, ...) with what is masked there.
    sampler : Sampler
        Of all but the greedy arm; the same random numbers in each.
    """
    prompts = [trial.prompt for trial in trials] + [trial.odd_prompt for trial in trials if ODD in arms]
    requests = []
    for arm, what in arms.items():
        for n, trial in enumerate(trials):
            row = sampler.first_row + n
            mask = None if what is None else ban(codec.completions, trial.targets, what)
            if mask is not None and arm == RANDOM:
                mask = ban_at_random(mask, sampler.seed, row)
            chosen = Sampler(sampler.temperature, sampler.top_k, sampler.top_p, sampler.seed, row)
            chosen = Sampler() if arm == GREEDY else chosen
            requests.append(Request(n + len(trials) * (arm == ODD), chosen, trial.limit, mask))
    written = iter(write(lm, prompts, requests))
    judged = {}
    for arm in arms:
        judged[arm] = [
            judge(
                trial.plain, trial.odd if arm == ODD else trial.marked, trial.passage.targets,
                text := codec.text(next(written)), codec.own(text.data.decode(errors="replace")),
            )
            for trial in trials
        ]  # fmt: skip
    return judged


def answer_all(
    lm: LM,
    codec: Codec,
    trials: Sequence[Trial],
    arms: dict[str, What | None],
    sampler: Sampler,
    step: Callable[[int], None],
) -> dict[str, list[Answer]]:
    """Answer trials batch by batch; see `answer`. `step` is told how many were answered."""
    judged: dict[str, list[Answer]] = {arm: [] for arm in arms}
    for at in range(0, len(trials), BATCH):
        batch = trials[at : at + BATCH]
        for arm, found in answer(lm, codec, batch, arms, replace(sampler, first_row=at)).items():
            judged[arm] += found
        step(len(batch))
    return judged


def place_of(codec: Codec, trial: Trial) -> Place | None:
    """Return the first target of a trial in a copy of the passage; None where it does not begin with a token."""
    plain, index = trial.plain, trial.passage.targets[0]
    start, stop = plain.words[index]
    own = plain.span(start, stop)
    text = b"".join(own.pieces)
    begin = plain.cut(stop - len(text))
    if begin is None or plain.cut(stop) is None:
        return None
    vocabulary, before = codec.vocabulary.id_of, plain.ids[:begin]
    respelled = [p for p in enumerate_encodings(vocabulary, text, MOST) if p != list(own.pieces)]
    respaced = [p for p in alternatives(vocabulary, text.decode(), own.pieces) if b"".join(p) != text]
    return Place([*trial.prompt, *before], own.ids, [codec.ids(p) for p in respelled], [codec.ids(p) for p in respaced])


def over_banned(codec: Codec, trials: Sequence[Trial], source: str) -> dict[str, float]:
    """Count the words of a text that a mask keeps from being written though they are not the target.

    Returns
    -------
    dict
        Mean number of such words a target, out of ``words``: ``completing``, under this mask; ``starting``, where every
        token that starts an encoding of the target is banned.
    """
    words = [codec.own(f" {word}").pieces for word in sorted(set(WORD.findall(source)))]
    beginnings = Counter(b"".join(word[:n]).strip() for word in words for n in range(1, len(word)))
    firsts = Counter(word[0] for word in words)
    targets = [target.word for trial in trials for target in trial.targets]
    ours = sum(beginnings[word] for word in targets)
    theirs = 0
    for word in targets:
        starts = {(lead + word)[:n] for lead in (b"", b" ", b"\n") for n in range(1, len(word) + 2)}
        theirs += sum(count for piece, count in firsts.items() if piece in starts) - 1  # without the word itself
    return {"words": len(words), "completing": ours / len(targets), "starting": theirs / len(targets)}
