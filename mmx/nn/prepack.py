"""Weights prepacked for single-token decoding on a CPU.

A decoder that generates one token at a time multiplies few rows by large matrices and is bound by memory bandwidth.
`PrepackedLinear` stores the same weights in the blocked layout of oneDNN, which is 1.5 to 2 times as fast as the plain
layout for 1 to 40 rows. `Int8Linear` quantizes the weights and reads a quarter of the bytes.

Both are for inference: their weights are not trained. Gradients pass through to the input, so that the relevance of a
loaded model can be computed. They replace an nn.Linear and write its weight and bias to a state_dict.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmx.errors import MmxError

PrepackKind = Literal["float", "int8"]
MIN_NUMEL = 2**16  # smallest weight that is prepacked: below it the call costs more than the layout saves
MAX_ROWS = 64  # batch size for which oneDNN chooses the layout: fast for one row and for a batch of beams


class PrepackedLinear(nn.Module):
    """A linear layer whose weight is stored in the blocked layout of oneDNN.

    The output equals that of nn.Linear up to the order of summation.

    Args:
        weight: [out, in], float32 or bfloat16 on a CPU.
        bias: [out] or None.
        persistent: whether weight and bias are part of the state_dict, as for `nn.Module.register_buffer`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, persistent: bool = True) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.persistent = persistent
        self.bias = None if bias is None else bias.detach()
        self._pack(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x; differentiable with respect to x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _PrepackedFunction.apply(x, self)
        return self.matmul(x)

    def matmul(self, x: Tensor) -> Tensor:
        """Return x W^T + b by the fast kernel, without autograd."""
        return self._linear(x, self.packed_weight, self.bias, "none", [], "")

    def dense_weight(self) -> Tensor:
        """Return the weight in the plain layout, [out, in]."""
        return self.packed_weight.to_dense()

    def _pack(self, weight: Tensor) -> None:
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_ROWS)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.persistent:
            return
        destination[f"{prefix}weight"] = self.dense_weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.dense_weight(), self.bias, self.persistent)


class _Context(Protocol):
    layer: PrepackedLinear


class _PrepackedFunction(torch.autograd.Function):
    """The fast kernel forward, the dense weight backward. Unpacking it at each backward pass is rare enough."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, layer: PrepackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dense_weight().to(gradient.dtype), None


class Int8Linear(PrepackedLinear):
    """A linear layer with int8 weights and one scale per row (symmetric, round to nearest); x is cast to bfloat16.

    Weight-only quantization as in Dettmers et al. 2022, "LLM.int8()", section 2.1, per row and without outliers.
    """

    def matmul(self, x: Tensor) -> Tensor:
        """Return x W^T + b with x in bfloat16 and the quantized W, in the dtype of x."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        product = torch._weight_int8pack_mm(rows, self.quantized_weight, self.scales)
        output = product.to(x.dtype).view(*x.shape[:-1], -1)
        return output if self.bias is None else output + self.bias

    def dense_weight(self) -> Tensor:
        """Return the dequantized weight, [out, in]."""
        return self.quantized_weight.float() * self.scales.float()[:, None]

    def _pack(self, weight: Tensor) -> None:
        largest = weight.float().abs().amax(1).clamp(min=1e-30)
        self.quantized_weight = (weight.float() * (127 / largest)[:, None]).round().to(torch.int8)
        self.scales = (largest / 127).to(torch.bfloat16)


def prepack(module: nn.Module, kind: PrepackKind) -> None:
    """Replace the linear layers of a module whose weight has at least MIN_NUMEL elements by prepacked ones.

    Raises:
        MmxError: code `prepack.weight`, for weights that are not float32 or bfloat16 on a CPU.
    """
    for name, submodule in list(module.named_modules()):
        if type(submodule) is nn.Linear and submodule.weight.numel() >= MIN_NUMEL:
            module.set_submodule(name, prepack_linear(submodule.weight, submodule.bias, kind))


def prepack_linear(weight: Tensor, bias: Tensor | None, kind: PrepackKind, persistent: bool = True) -> PrepackedLinear:
    """Return a prepacked linear layer; the arguments are those of PrepackedLinear. Raises MmxError as `prepack`."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise MmxError(
            f"weights of {weight.dtype} on {weight.device} cannot be prepacked; expected torch.float32 or "
            "torch.bfloat16 on the CPU.",
            code="prepack.weight",
            dtype=str(weight.dtype),
            device=str(weight.device),
        )
    layer = Int8Linear if kind == "int8" else PrepackedLinear
    return layer(weight, bias, persistent)


def can_prepack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has oneDNN, and this processor supports its blocked layout of `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
