"""A language model as the rest of Tokenary sees it: weights, tokenizer and the identity of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenary.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(eq=False)
class LM:
    """A language model with its tokenizer.

    Attributes
    ----------
    name : str
        What the user called it, or the catalogue name.
    model : PreTrainedModel
        In eval mode.
    tokenizer : PreTrainedTokenizerBase or None
        None for random nets; the text methods then raise :class:`InputError`.
    fingerprint : str
        sha256 (hex) of the weight files; of the original file where it was converted.
    source : str
        Where the weights came from: a package, a folder, a hub id.
    warm : dict
        The methods of each recipe that ran on this model, with what they learned; clear it to start cold.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: str
    source: str
    warm: dict[Any, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    @property
    def kind(self) -> str:
        """``causal``, ``diffusion`` (masked) or ``any-subset``: which decoding loops fit the model."""
        return getattr(self.model.config, "objective", "causal")

    @property
    def vocab_size(self) -> int:
        """Width of the logits (may exceed the tokenizer's length when the embedding is padded)."""
        return self.model.config.get_text_config().vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and answer together, that the model has positions for."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: of the generation config, the config and the tokenizer, without repeats."""
        ids: list[int] = []
        for owner in (self.model.generation_config, self.model.config.get_text_config(), self.tokenizer):
            eos = getattr(owner, "eos_token_id", None)
            ids += [] if eos is None else [eos] if isinstance(eos, int) else eos
        return tuple(dict.fromkeys(ids))

    def encode(self, prompts: Sequence[str], raw: bool = False) -> list[list[int]]:
        """Turn prompts into token ids.

        Parameters
        ----------
        prompts : sequence of str
            Each is one user message, put through the chat template where the tokenizer has one.
        raw : bool
            Continue plain text instead: no template, only the tokenizer's own leading token where it adds one.

        Returns
        -------
        list of list of int
            One row a prompt, not padded.

        Raises
        ------
        InputError
            An empty prompt, one that fills the context or has words that the model does not know, or a model without a
            tokenizer.
        """
        tokenizer = self._tokenizer()
        rows = []
        for number, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts, start=1):
            if not (prompt if raw else prompt.strip()):
                raise InputError(f"prompt {number} is empty")
            if raw or tokenizer.chat_template is None:
                try:
                    ids = tokenizer(prompt, verbose=False)["input_ids"]
                except Exception as error:  # of the Rust tokenizer, where a vocabulary of words has no unknown word
                    raise InputError(f"prompt {number} has words that {self.name} has no token for") from error
            else:
                message = [{"role": "user", "content": prompt}]
                ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            if len(ids) >= self.context_length:
                raise InputError(
                    f"prompt {number} has {len(ids)} tokens; {self.name} has a context of {self.context_length}"
                    f" (at most {self.context_length - 1} for the prompt)"
                )
            rows.append(list(ids))
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text; special tokens are left out."""
        tokenizer = self._tokenizer()
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Split ``decode(ids)`` into the text that each token adds.

        A character spread over several tokens goes to the last of them, so a piece may be empty. Decoding every prefix
        costs quadratic time (half a second for two thousand tokens) and is exact for any tokenizer, also for ids that
        are no valid text.

        Returns
        -------
        list of str
            As many as ``ids``; joined they are ``decode(ids)``.
        """
        if not len(ids):
            return []
        text = self.decode(ids)
        ends = [0]
        for i in range(1, len(ids)):
            prefix, end = self.decode(ids[:i]), ends[-1]
            # where a character is unfinished, the prefix decodes to U+FFFD and agrees with the text only before it
            while end < min(len(prefix), len(text)) and prefix[end] == text[end]:
                end += 1
            ends.append(end)
        return [text[a:b] for a, b in pairwise([*ends, len(text)])]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: pass token ids instead of text")
        return self.tokenizer
