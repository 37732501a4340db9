"""Linear layers whose weights lie in the order in which the CPU's matrix kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A bias-optional linear layer with its weight packed once for oneDNN; for inference only.

    ``nn.Linear`` hands oneDNN a plain weight, which it reorders at every call: with few rows that costs more than
    the product itself. The products are those of the plain layer up to the order of summation.

    Parameters
    ----------
    linear : nn.Linear
        The layer to replace, on the CPU, float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # 16 rows: the width of a small draft tree; the layout serves single rows equally well.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        """Say the shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_pack(linear: nn.Module) -> bool:
    """Whether a layer is of a kind, dtype and device that `PackedLinear` serves."""
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if linear.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return linear.weight.dtype == torch.float32


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer of `model` that can be packed, in place; return how many were.

    The packed model is for inference: it cannot be trained or saved. A head that shares its weight with the input
    embedding gets a copy of its own.
    """
    count = 0
    with torch.inference_mode():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if can_pack(child):
                    assert isinstance(child, nn.Linear)
                    setattr(parent, name, PackedLinear(child))
                    count += 1
    return count
