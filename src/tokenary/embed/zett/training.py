"""Training the hypernetwork: first on the model's own rows, then through the frozen model on sampled tokenizers.

Rows: a token of the old vocabulary is taken out of it, cut into smaller tokens, and its row predicted from theirs.
Text: a tokenizer is sampled at every step and its rows predicted, and the model's loss on text cut with it is followed
back into the hypernetwork; the loss on rows stays beside it, where the paper has the lexical loss.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.seeding import substream
from tokenary.embed.zett.net import LENGTH, Hypernetwork, surface
from tokenary.hf.tokenizer import Vocabulary

BATCH, LR = 512, 1e-3
LONGEST = 16  # bytes of a sampled token inside a word; four times as many where words are not kept apart


class RowExamples:
    """Tokens of a vocabulary, each with ways to cut it into two to seven smaller ones.

    Parameters
    ----------
    source : Vocabulary
        Every token that two others make is an example.
    among : sequence of int
        Ids that may be examples.
    """

    def __init__(self, source: Vocabulary, among: Sequence[int]) -> None:
        self._halves: dict[int, list[tuple[int, int]]] = {}
        ids = source.id_of
        for i in among:
            data = source.spellings[i]
            pairs = ((ids.get(data[:at]), ids.get(data[at:])) for at in range(1, len(data)))
            found = [(left, right) for left, right in pairs if left is not None and right is not None]
            if found:
                self._halves[i] = found
        self.ids = np.array(sorted(self._halves), np.int64)

    def cut(self, id: int, stream: np.random.Generator) -> list[int]:
        """Cut a token once, and then a random part of it again, now and then."""
        parts = list(self._halves[id][stream.integers(len(self._halves[id]))])
        while len(parts) < LENGTH and stream.random() < 0.5:
            at = int(stream.integers(len(parts)))
            if parts[at] in self._halves:
                options = self._halves[parts[at]]
                parts[at : at + 1] = options[stream.integers(len(options))]
        return parts

    def batch(self, size: int, stream: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw tokens: their ids (B,), pieces (B, L) and mask (B, L)."""
        drawn = self.ids[stream.integers(0, len(self.ids), size)]
        pieces, mask = surface([self.cut(int(i), stream) for i in drawn])
        return torch.from_numpy(drawn), pieces, mask


def row_loss(net: Hypernetwork, rows: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error of predicted rows, each column over its own variance: 1 for the mean row of the table."""
    ids, pieces, mask = batch
    return (((net(rows[pieces], mask) - rows[ids]) / net.std) ** 2).mean()


def train_on_rows(source: Vocabulary, rows: Tensor, steps: int, seed: int = 0) -> Hypernetwork:
    """Train a hypernetwork on the model's own rows alone.

    Parameters
    ----------
    source : Vocabulary
        The model's.
    rows : Tensor
        (V, D) float.
    steps : int
        Of 512 tokens, fewer where the vocabulary is small.
    seed : int
        Of weights and examples.

    Raises
    ------
    UnsupportedModelError
        No token of the vocabulary is made of two others.
    """
    examples = RowExamples(source, sorted(source.id_of.values()))
    if not len(examples.ids):
        raise UnsupportedModelError("no token of this vocabulary is made of two others: nothing to learn from")
    net, optimizer = fresh(rows, seed, width=min(256, -(-rows.shape[1] // 64) * 64))
    size = min(BATCH, 4 * len(examples.ids))
    for step in range(steps):
        set_rate(optimizer, LR, step, steps)
        descend(net, optimizer, row_loss(net, rows, examples.batch(size, substream(seed, "zett rows", step))))
    return net.eval()


def fresh(rows: Tensor, seed: int, width: int = 256, layers: int = 3) -> tuple[Hypernetwork, torch.optim.Optimizer]:
    """Make a hypernetwork from a seed, and its optimizer; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Hypernetwork(rows, width, layers)
    return net, torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm up over a twentieth of the steps, then fall to nothing along a cosine."""
    warm = max(1, steps // 20)
    rate = min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))
    for group in optimizer.param_groups:
        group["lr"] = peak * rate


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one step, the gradient clipped."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


class TokenizerSampler:
    """Samples a unigram tokenizer a step, from the substrings of recent text and heavy-tailed noise.

    Parameters
    ----------
    texts : iterator of str
        Endless; one text a step is read.
    size : int
        Tokens besides the 256 bytes.
    seed : int
        Of the noise.
    memory : int
        Texts whose counts are summed.
    """

    def __init__(self, texts: Iterator[str], size: int = 4096, seed: int = 0, memory: int = 8) -> None:
        self.size, self.seed, self.step = size, seed, 0
        self._texts = texts
        self._counts: dict[bool, deque[Counter[str]]] = {kind: deque(maxlen=memory) for kind in (False, True)}
        self._alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def draw(self) -> Tokenizer:
        """Read one text and sample the next tokenizer; every other one has tokens across words."""
        stream = substream(self.seed, "zett tokenizers", self.step)
        across = bool(self.step % 2)
        self.step += 1
        text = next(self._texts)
        for kind, counts in self._counts.items():
            splitter = _splitter(kind)
            found: Counter[str] = Counter()
            longest = LONGEST * (4 if kind else 1)
            for piece, _ in splitter.pre_tokenize_str(text):
                for start in range(0, len(piece), 4 if kind else 1):
                    for end in range(start + 2, min(start + longest, len(piece)) + 1, 2 if kind else 1):
                        found[piece[start:end]] += 1
            counts.append(Counter({piece: count for piece, count in found.items() if count > 1}))
        total: Counter[str] = sum(self._counts[across], Counter())
        pieces = [piece for piece in total if len(piece) > 1]
        score = np.array([len(piece) * total[piece] for piece in pieces], np.float64)
        sigma = math.exp(stream.normal(math.log(1e-5), 4))
        noisy = score / score.sum() + stream.normal(0, min(sigma, 1.0), len(pieces))
        best = np.argsort(-noisy, kind="stable")[: self.size]
        top = max(float(noisy[best[0]]), 1e-12)
        vocabulary = [(pieces[i], math.log(max(float(noisy[i]) / top, 1e-12))) for i in best]
        vocabulary += [(char, -30.0) for char in self._alphabet]
        made = Tokenizer(models.Unigram(vocabulary, unk_id=None, byte_fallback=False))
        made.pre_tokenizer = _splitter(across)
        return made


def _splitter(across: bool) -> pre_tokenizers.PreTokenizer:
    """Bytes as characters, cut at words or only at lines."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across)
    return pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "merged_with_previous"), level]) if across else level


class TextExamples:
    """Batches of text cut with sampled tokenizers, and what the frozen model makes of them.

    Parameters
    ----------
    model : PreTrainedModel
        Frozen, tied.
    source : Vocabulary
        Its own.
    rows : Tensor
        (V, D) float32, its table.
    sampler : TokenizerSampler
        Of tokenizers.
    texts : iterator of str
        Endless; what is predicted.
    """

    def __init__(
        self, model: Any, source: Vocabulary, rows: Tensor, sampler: TokenizerSampler, texts: Iterator[str]
    ) -> None:
        self.model, self.source, self.rows, self.sampler, self._texts = model, source, rows, sampler, texts
        self._begin = [i for i, content in source.special.items() if content == source.roles.get("bos_token")][:1]

    def loss(self, net: Hypernetwork, batch: int, length: int, negatives: int, stream: np.random.Generator) -> Tensor:
        """Cross-entropy of text under the predicted rows, over its own tokens, all shared ones, and some new ones.

        Parameters
        ----------
        net : Hypernetwork
            Predicts the rows of new tokens.
        batch, length : int
            Texts, and tokens of each.
        negatives : int
            New tokens that stand in the softmax without being in the text.
        stream : Generator
            Draws them.
        """
        tokenizer = self.sampler.draw()
        target = Vocabulary(tokenizer)
        texts: list[list[int]] = []
        for _ in range(batch):
            ids: list[int] = []
            while len(ids) < length:
                ids += tokenizer.encode(next(self._texts), add_special_tokens=False).ids
            texts.append(ids[:length])
        shared = [i for i in range(target.size) if target.spellings[i] in self.source.id_of]
        kept, used = set(shared), {i for row in texts for i in row}
        rest = [i for i in range(target.size) if i not in kept and i not in used]
        drawn = [rest[i] for i in stream.permutation(len(rest))[:negatives]]
        parts = {i: self.source.pieces(target.spellings[i]) for i in [*sorted(used - kept), *drawn]}
        new = [i for i in parts if parts[i]]  # a byte that no text has may be in no vocabulary
        place = {i: n for n, i in enumerate([*shared, *new])}
        copies = self.rows[torch.tensor([self.source.id_of[target.spellings[i]] for i in shared])]
        table = copies
        if new:
            pieces, mask = surface([parts[i] for i in new])
            table = torch.cat([copies, net(self.rows[pieces], mask).float()])
        wanted = torch.tensor([[place[i] for i in row] for row in texts])
        inputs = embedding(wanted[:, :-1], table)
        if self._begin:
            inputs = torch.cat([self.rows[torch.tensor([self._begin] * batch)], inputs], dim=1)
        else:
            wanted = wanted[:, 1:]
        hidden = self.model.base_model(inputs_embeds=inputs.to(self.model.dtype)).last_hidden_state
        logits = hidden.float() @ table.T
        return cross_entropy(logits.flatten(0, 1), wanted.flatten())


@torch.no_grad()
def cosines(net: Hypernetwork, rows: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Mean cosine of true rows, less the mean row, with the predicted ones, and with the mean of the pieces."""
    ids, pieces, mask = batch
    mean = (rows[pieces] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    true = rows[ids] - net.mean
    predicted, averaged = (
        torch.cosine_similarity(made - net.mean, true, dim=-1).mean() for made in (net(rows[pieces], mask), mean)
    )
    return float(predicted), float(averaged)
