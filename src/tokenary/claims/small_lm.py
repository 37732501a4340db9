"""What claims about training share: a small language model, trained from nothing in a minute or two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM


def small_lm(seed: int, vocab: int, layers: int = 3, hidden: int = 128, heads: int = 4, context: int = 512) -> Any:
    """Build a Llama with random weights and a tied head; the global random generator stays as it was."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(model: Any, batches: Iterable[tuple[Tensor, Tensor]], steps: int, lr: float = 3e-3) -> None:
    """Train on (ids, labels), both (B, N), with AdamW, a warm-up of a tenth of the steps and a cosine.

    Labels of -100 have no loss; a label is predicted from the tokens before it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm), lr / 10)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, cosine], [warm])
    model.train()
    for _, (ids, labels) in zip(range(steps), batches, strict=False):
        loss = nll(model, ids, labels).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def nll(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of every label but those of -100, in nats, (tokens,)."""
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != -100
    logits = model.get_output_embeddings()(hidden[kept])
    return cross_entropy(logits.float(), wanted[kept], reduction="none")
