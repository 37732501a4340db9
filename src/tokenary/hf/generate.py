"""Between ``model.generate`` and our loops: reads its arguments, packs its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class GenerateCall:
    """What ``model.generate`` hands to a ``custom_generate`` callable, without padding.

    Parameters
    ----------
    input_ids : Tensor
        Left-padded prompts, (B, N).
    attention_mask : Tensor or None
        1 at tokens, (B, N).
    generation_config : GenerationConfig
        With lengths and special tokens prepared by ``generate``.
    logits_processor : LogitsProcessorList
        Processors and warpers in order.
    stopping_criteria : StoppingCriteriaList
        Checked after every token.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    generation_config: GenerationConfig
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList

    def __post_init__(self) -> None:
        # Length and end tokens are checked by the loop itself, row by row; the rest may be the user's own.
        kinds = (MaxLengthCriteria, EosTokenCriteria)
        self._lengths = [len(prompt) for prompt in self.prompts]
        self._criteria = [item for item in self.stopping_criteria if not isinstance(item, kinds)]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        if self.attention_mask is None:
            return self.input_ids.tolist()
        return [ids[keep].tolist() for ids, keep in zip(self.input_ids, self.attention_mask.bool(), strict=True)]

    @property
    def max_new_tokens(self) -> int:
        """Most tokens to generate for each prompt."""
        return self.generation_config.max_length - self.input_ids.shape[1]

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        end = self.generation_config.eos_token_id
        return () if end is None else (end,) if isinstance(end, int) else tuple(end)

    @property
    def greedy(self) -> bool:
        """Whether each choice is the argmax of untouched logits."""
        return not self.generation_config.do_sample and not self.logits_processor

    def __call__(self, logits: Tensor, rows: Sequence[int], histories: Sequence[Sequence[int]]) -> list[int]:
        """Choose from logits (n, V), each row processed with its own history.

        A processor may hold a value for every row of the padded batch, so a row is shown to it in its own place of
        a batch of that size.
        """
        chosen = []
        for scores, row, history in zip(logits, rows, histories, strict=True):
            ids = self._padded(row, history).expand(len(self.input_ids), -1)
            processed = self.logits_processor(cast(LongTensor, ids), scores.float().repeat(len(ids), 1))[row]
            if self.generation_config.do_sample:
                chosen.append(int(torch.multinomial(processed.softmax(-1), 1)))
            else:
                chosen.append(int(processed.argmax(-1)))
        return chosen

    def _padded(self, row: int, history: Sequence[int]) -> Tensor:
        """A sequence with the padding it came with, (1, N)."""
        new = torch.tensor(list(history)[self._lengths[row] :], device=self.input_ids.device, dtype=torch.long)
        return torch.cat([self.input_ids[row], new])[None]

    def stops(self, row: int, history: Sequence[int]) -> bool:
        """Whether a stopping criterion ends this sequence."""
        ids = self._padded(row, history)
        return any(bool(criterion(ids, None).all()) for criterion in self._criteria)

    def result(self, tokens: Sequence[Sequence[int]]) -> Tensor | GenerateDecoderOnlyOutput:
        """Pack the new tokens of each prompt behind the prompts, as ``generate`` returns them."""
        pad = self.generation_config.pad_token_id
        pad = pad if pad is not None else (self.end_tokens or (0,))[0]
        longest = max(map(len, tokens), default=0)
        new = torch.full((len(tokens), longest), pad, dtype=torch.long)
        for row, ids in enumerate(tokens):
            new[row, : len(ids)] = torch.as_tensor(list(ids), dtype=torch.long)
        sequences = torch.cat([self.input_ids, new.to(self.input_ids.device)], dim=1)
        if self.generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(LongTensor, sequences))
        return sequences
