"""A small masked-diffusion language model of our own, and its any-subset autoregressive sister.

One bidirectional transformer (`net`) under two objectives (`objective`): masked diffusion, which fills masked positions
independently given the rest (Sahoo et al. 2024, arXiv 2406.07524; Nie et al. 2025, arXiv 2502.09992), and any-subset
autoregression, which gives the exact joint density of any masked set in one pass (Guo and Ermon 2025, arXiv
2504.20456). `corpus` turns Wikipedia markup into prose and tokens, `training` trains either. A trained model is an
ordinary transformers folder; ``load_text_diffusion(folder)`` returns it as an `LM`, which names its objective in
``lm.model.config.objective`` and its mask token in ``lm.model.config.mask_token_id``.
"""

from __future__ import annotations

from tokenary.models.text_diffusion.net import (
    TextDiffusionConfig,
    TextDiffusionModel,
    build,
    load_text_diffusion,
    load_tokenizer,
    save_text_diffusion,
)
from tokenary.models.text_diffusion.objective import (
    any_subset_logits,
    any_subset_nll,
    any_subset_ranks,
    diffusion_nll,
    sample_masks,
    two_stream_mask,
)

__all__ = [
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "any_subset_logits",
    "any_subset_nll",
    "any_subset_ranks",
    "build",
    "diffusion_nll",
    "load_text_diffusion",
    "load_tokenizer",
    "sample_masks",
    "save_text_diffusion",
    "two_stream_mask",
]
