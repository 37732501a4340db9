"""What is learnt for one model: whose it is, and texts of the model's own to learn from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached


def mark(model: PreTrainedModel) -> Tensor:
    """By what weights know their model: the mean of the input embedding, (hidden,) float32."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table.detach().float().mean(0).cpu()


def fits(model: PreTrainedModel, layers: int, known: Tensor) -> bool:
    """Whether what was learnt for a model of so many layers and the `mark` `known` (hidden,) is for this one."""
    own, count = mark(model), model.config.get_text_config(decoder=True).num_hidden_layers
    return count == layers and own.shape == known.shape and bool(torch.cosine_similarity(own, known, dim=0) > 0.98)


@torch.inference_mode()
def own_texts(model: PreTrainedModel, count: int, length: int, seed: int) -> list[list[int]]:
    """Let a model write texts: a random token, then samples, `length` tokens each; the ids of every text."""
    stream = substream(seed, "own texts")
    texts = stream.integers(0, model.config.get_text_config(decoder=True).vocab_size, (count, 1)).tolist()
    target = Target(model)
    with attached(model):
        logits = target.prefill(texts)
        for _ in range(length - 1):
            gumbel = torch.from_numpy(stream.gumbel(size=tuple(logits.shape))).to(logits.device)
            for text, token in zip(texts, (logits.float() + gumbel).argmax(-1).tolist(), strict=True):
                text.append(token)
            logits = target.score(TokenTree.roots([text[-1] for text in texts]))[:, 0]
            target.commit([[0]] * count)
    return texts
