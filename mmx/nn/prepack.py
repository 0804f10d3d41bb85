"""Linear maps laid out for speaking on a CPU: read once a token, their weights are what a word costs.

A decoder that says one token at a time multiplies few rows by large matrices, and waits for the memory that holds
them. `PackedLinear` keeps the same float32 numbers in the blocks in which oneDNN reads them (1.5 to 2 times as fast
here as the plain layout, for 1 to 40 rows); `Int8Linear` reads a fourth of the bytes, and rounds.

Both are for inference alone: their weights are not trained. Gradients pass through them to what they were given, so
that a loaded model can be asked what it looked at. They stand where an nn.Linear stood, and give its weights back to a
state_dict.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmx.errors import MmxError

PrepackKind = Literal["blocks", "int8"]
MIN_NUMEL = 2**16  # weights of a map below which the call costs more than the packing saves
MAX_ROWS = 64  # rows for which oneDNN chooses its blocks: of these, one row as well as a batch of beams are read fast


class PrepackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's blocks; the same numbers as nn.Linear up to the order of a sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), MAX_ROWS)
        self.bias = None if bias is None else bias.detach()
        self._apply_blocks = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of x; differentiable in x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _PrepackedFunction.apply(x, self)
        return self.read(x)

    def read(self, x: Tensor) -> Tensor:
        """The product by the fast kernel, of which autograd knows nothing."""
        return self._apply_blocks(x, self.blocks, self.bias, "none", [], "")

    def weights(self) -> Tensor:
        """W as it was, [out, in]."""
        return self.blocks.to_dense()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weights()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights(), self.bias)


class _PrepackedFunction(torch.autograd.Function):
    """The fast kernel forward; backward the dense weights, laid out anew, which is rare enough to be paid each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PrepackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.read(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weights().to(gradient.dtype), None


class Int8Linear(PrepackedLinear):
    """W as whole numbers of -127..127, each row with its own scale (symmetric, round to nearest); x in bfloat16.

    Weight-only quantisation, as in Dettmers et al. 2022, "LLM.int8()", section 2.1, by rows and without outliers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        largest = weight.detach().float().abs().amax(1).clamp(min=1e-30)
        self.blocks = (weight.detach().float() * (127 / largest)[:, None]).round().to(torch.int8)
        self.scales = (largest / 127).to(torch.bfloat16)
        self.bias = None if bias is None else bias.detach()

    def read(self, x: Tensor) -> Tensor:
        """x in bfloat16 times the whole numbers, scaled, in the type of x."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        read = torch._weight_int8pack_mm(rows, self.blocks, self.scales).to(x.dtype).view(*x.shape[:-1], -1)
        return read if self.bias is None else read + self.bias

    def weights(self) -> Tensor:
        """W as far as it was kept, [out, in]."""
        return self.blocks.float() * self.scales.float()[:, None]


def prepack(module: nn.Module, kind: PrepackKind) -> None:
    """Replace the large linear maps within a module on the CPU. Raises MmxError for a module that is elsewhere."""
    for name, part in list(module.named_modules()):
        if type(part) is nn.Linear and part.weight.numel() >= MIN_NUMEL:
            module.set_submodule(name, prepack_linear(part.weight, part.bias, kind))


def prepack_linear(weight: Tensor, bias: Tensor | None, kind: PrepackKind) -> PrepackedLinear:
    """One linear map, packed."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise MmxError(f"weights of {weight.dtype} on {weight.device} cannot be packed; expected floats on the CPU.")
    return Int8Linear(weight, bias) if kind == "int8" else PrepackedLinear(weight, bias)


def can_prepack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch has oneDNN, and this processor its blocks of the type."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
