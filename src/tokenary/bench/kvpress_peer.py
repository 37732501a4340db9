"""Presses of kvpress on haystacks. Runs alone in an environment of its own, and knows nothing of Tokenary.

    python kvpress_peer.py < request.json      one line of JSON a press, compression and haystack

A press scores the keys of a layer after the layer has read the whole prompt, so that the prompt is the same for all:
it is read once, and every press compresses what it made. A question is asked behind each compressed cache, which is put
back after it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from kvpress import (
    BasePress,
    KnormPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
)
from kvpress.presses.base_press import SUPPORTED_MODELS
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {"SnapKVPress": SnapKVPress, "KnormPress": KnormPress, "StreamingLLMPress": StreamingLLMPress}
#: Wants the attention of all tokens to all: a matrix a head, which is too much for long texts.
ATTENTION = {"ObservedAttentionPress": ObservedAttentionPress}
MOST = 4096

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Several(BasePress):
    """Lets several presses compress what a layer holds, and leaves the layer itself as it is."""

    def __init__(self, presses: dict[str, Any]) -> None:
        self.presses = presses
        self.caches: dict[str, Cache] = {name: [] for name in presses}
        self.seconds = dict.fromkeys(presses, 0.0)

    def post_init_from_model(self, model: Any) -> None:
        """Prepare all of them."""
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Keep each one's keys and values aside."""
        for name, press in self.presses.items():
            began = time.perf_counter()
            self.caches[name].append(press.compress(module, hidden_states, keys, values, attentions, kwargs))
            self.seconds[name] += time.perf_counter() - began
        return keys, values


def ask(model: Any, layers: Cache, length: int, question: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Return the loss of each token of the answer, and the most likely one."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    answer = torch.tensor(question["answer"])
    ids = torch.tensor([question["ids"] + question["answer"][:-1]])
    positions = torch.arange(length, length + ids.shape[1])[None]
    found = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer))
    logits = found.logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits, answer, reduction="none")
    return losses.tolist(), logits.argmax(-1).tolist()


def run(model: Any, number: int, haystack: dict[str, Any], presses: dict[str, Any]) -> None:
    """Read a haystack, compress it in every way, and ask; print what comes out."""
    several, ids = Several(presses), torch.tensor([haystack["ids"]])
    with several(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    for name, layers in several.caches.items():
        began = time.perf_counter()
        answers = [ask(model, layers, ids.shape[1], question) for question in haystack["questions"]]
        kept = sum(keys.shape[2] for keys, _ in layers) / len(layers)
        line = {
            "name": name,
            "haystack": number,
            "losses": [losses for losses, _ in answers],
            "likely": [likely for _, likely in answers],
            "kv_bytes": sum(keys.nbytes + values.nbytes for keys, values in layers),
            "read_tokens": kept + 1,
            "seconds": several.seconds[name] + time.perf_counter() - began,
        }
        print(json.dumps(line), flush=True)


@torch.inference_mode()
def main() -> None:
    """Do what is asked for on stdin."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=getattr(torch, request["dtype"])).eval()
    if not isinstance(model, SUPPORTED_MODELS):
        print(json.dumps({"failed": f"does not support {type(model).__name__}"}), flush=True)
        request["haystacks"] = []
    for number, haystack in enumerate(request["haystacks"]):
        for kinds, attention in ((PRESSES, "sdpa"), (ATTENTION, "eager")):
            if attention == "eager" and len(haystack["ids"]) > MOST:
                continue
            model.set_attn_implementation(attention)
            made = {
                f"{name}:keep={keep:g}%": press(compression_ratio=1 - keep / 100)
                for name, press in kinds.items()
                for keep in request["keep"]
            }
            try:
                run(model, number, haystack, made)
            except Exception as error:
                print(json.dumps({"failed": f"{', '.join(kinds)}: {type(error).__name__}: {error}"}), flush=True)
        print(json.dumps({"done": number}), flush=True)


if __name__ == "__main__":
    main()
