"""The light half of Segment Anything, which transformers has: the prompt encoder and the mask decoder."""

from __future__ import annotations

from transformers import SamConfig, SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder


def sam_heads(side: int, width: int, heads: int, intermediate: int) -> tuple[SamPromptEncoder, SamMaskDecoder]:
    """Return untrained modules, in the published form.

    Parameters
    ----------
    side : int
        Pixels of the picture.
    width : int
        Of tokens.
    heads, intermediate : int
        Of the mask decoder's transformer.

    Returns
    -------
    SamPromptEncoder
        ``encoder(points (B, P, K, 2), labels (B, P, K), None, None)`` gives sparse and dense embeddings; it holds
        ``shared_embedding``, which encodes places in [0, 1].
    SamMaskDecoder
        ``decoder(image (B, D, rows, columns), places, sparse, dense, True)`` gives logits of masks and their scores;
        ``decoder.transformer`` is called with ``image_embeddings`` and ``image_positional_embeddings``, and returns
        what came of the prompts and of the image (B P, 1, N, D).
    """
    prompts = SamConfig(
        vision_config={"num_pos_feats": width // 2, "image_size": side, "output_channels": width},
        prompt_encoder_config={"hidden_size": width, "image_size": side},
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=width,
        mlp_dim=intermediate,
        num_attention_heads=heads,
        iou_head_hidden_dim=width,
        layer_norm_eps=1e-5,  # of the published network; transformers' default is another
    )
    decoder._attn_implementation = "sdpa"
    return SamPromptEncoder(prompts), SamMaskDecoder(decoder)
