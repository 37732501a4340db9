"""What others make of the same weights: transformers' own loops, and llama.cpp where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tokenary.bench.contender import Clock, PeakMemory, Sample
from tokenary.core.errors import InputError, TokenaryError
from tokenary.hf.packing import PackedLinear
from tokenary.models import LM, load
from tokenary.models.catalogue import find, local_source


class Peer:
    """A contender that is not ours: one prompt at a time, nothing learned from one to the next."""

    kind: Literal["recipe", "peer"] = "peer"
    lossless = True
    learns = False
    name = ""

    def run(self, prompts: Sequence[Sequence[int]]) -> Sample:
        """Generate for a batch of one prompt, given as token ids."""
        raise NotImplementedError

    def forget(self) -> None:
        """Nothing to forget."""

    def freeze(self) -> None:
        """Nothing to remember."""

    def thaw(self) -> None:
        """Nothing to go back to."""


class TransformersPeer(Peer):
    """``model.generate`` of transformers, greedily.

    Parameters
    ----------
    model : PreTrainedModel
        Plain, as transformers loads it.
    end_tokens : sequence of int
        Tokens that end a text.
    max_new_tokens : int
        Most tokens a prompt.
    lookup : int, optional
        ``prompt_lookup_num_tokens``.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_tokens: Sequence[int],
        max_new_tokens: int,
        lookup: int | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.model, self.clock, self.lookup = model, clock, lookup
        self.name = f"transformers prompt lookup ({lookup})" if lookup else "transformers generate"
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=0,
            prompt_lookup_num_tokens=lookup,
        )

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]]) -> Sample:
        """Generate for a batch of one prompt, given as token ids."""
        if len(prompts) != 1:
            raise InputError(f"{self.name} is measured one prompt at a time")
        memory, steps = PeakMemory(self.model.device), _Steps(self.clock)
        began = self.clock()
        ids = torch.tensor([list(prompts[0])], device=self.model.device)
        made: Any = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self.config,
            stopping_criteria=StoppingCriteriaList([steps]),
        )
        new = made[0, ids.shape[1] :].tolist()
        seconds = self.clock() - began
        # The criterion is called once a step, the prompt's included; what was drafted is not told.
        lengths = [length - ids.shape[1] for length in steps.lengths]
        per_pass = [(0, after - before - 1) for before, after in itertools.pairwise(lengths)]
        return Sample([new], [per_pass], [[False] * len(new)], seconds, steps.first - began, memory.read())


class _Steps(StoppingCriteria):
    """Never stops; notes the time of the first step and the length after each."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.first = clock, 0.0
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        if not self.lengths:
            self.first = self.clock()
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class LlamaCppPeer(Peer):
    """llama.cpp on a GGUF file, greedily, by ``llama_cpp``.

    Parameters
    ----------
    engine : llama_cpp.Llama
        The loaded model.
    end_tokens : sequence of int
        Tokens that end a text.
    max_new_tokens : int
        Most tokens a prompt.
    clock : callable
        Returns seconds.
    """

    name = "llama.cpp"

    def __init__(
        self, engine: Any, end_tokens: Sequence[int], max_new_tokens: int, clock: Clock = time.perf_counter
    ) -> None:
        self.engine, self.end_tokens, self.clock = engine, frozenset(end_tokens), clock
        self.max_new_tokens = max_new_tokens

    def run(self, prompts: Sequence[Sequence[int]]) -> Sample:
        """Generate for a batch of one prompt, given as token ids."""
        if len(prompts) != 1:
            raise InputError(f"{self.name} is measured one prompt at a time")
        memory = PeakMemory(torch.device("cpu"))
        new: list[int] = []
        first = began = self.clock()
        self.engine.reset()  # otherwise a prompt that begins like the last one would not be read again
        for token in self.engine.generate(list(prompts[0]), temp=0.0, top_k=1, repeat_penalty=1.0, reset=False):
            if not new:
                first = self.clock()
            new.append(int(token))
            if new[-1] in self.end_tokens or len(new) >= self.max_new_tokens:
                break
        seconds = self.clock() - began
        per_pass = [(0, 0)] * (len(new) - 1)
        return Sample([new], [per_pass], [[False] * len(new)], seconds, first - began, memory.read())


def peers_of(lm: LM, max_new_tokens: int) -> tuple[list[Peer], list[str]]:
    """Return the peers that can be measured, and one line for each that cannot.

    Parameters
    ----------
    lm : LM
        The model; transformers gets the same weights as it loads them itself, loaded once more if `lm`'s are packed.
    max_new_tokens : int
        Most tokens a prompt.
    """
    peers: list[Peer] = []
    absent: list[str] = []
    try:
        model = _plain(lm)
    except TokenaryError as error:
        absent.append(f"transformers was not measured: {error}")
    else:
        peers += [TransformersPeer(model, lm.eos_token_ids, max_new_tokens, n) for n in (None, 10)]
    try:
        peers.append(LlamaCppPeer(_llama_cpp(lm), lm.eos_token_ids, max_new_tokens))
    except TokenaryError as error:
        absent.append(f"llama.cpp was not measured: {error}")
    return peers, absent


def _plain(lm: LM) -> PreTrainedModel:
    """Return the model with linear layers as transformers has them."""
    if not any(isinstance(module, PackedLinear) for module in lm.model.modules()):
        return lm.model
    errors = []
    for name in (lm.name, lm.source.removeprefix("hub ")):
        try:
            again = load(name, dtype=lm.dtype, device=lm.device)
        except TokenaryError as error:
            errors.append(str(error))
            continue
        if again.fingerprint == lm.fingerprint:
            return again.model
        errors.append(f"{name} has other weights now")
    raise InputError(errors[0])


def _llama_cpp(lm: LM) -> Any:
    """Load the GGUF file that `lm` was converted from."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError("llama-cpp-python is not installed")
    file = lm.source if lm.source.endswith(".gguf") else None
    if file is None:
        entry = find(lm.name)
        local = local_source(entry)
        if entry.converter != "gguf" or local is None:
            raise InputError(f"{lm.name} did not come from a GGUF file")
        file = str(local)
    engine: Callable[..., Any] = importlib.import_module("llama_cpp").Llama
    threads = torch.get_num_threads()
    try:
        return engine(
            model_path=file,
            n_ctx=min(4096, lm.context_length),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"it does not load {file}: {error}") from error
