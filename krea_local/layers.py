"""The matrix products of the transformer, in the model's own precision or in 8-bit floats.

Both take rows [R, K] and write rows [R, N], where they are told to. Knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea_local.kernels import PLAIN, Quantized, Rows


class Linear(nn.Linear):
    """`nn.Linear` over rows, into a given place."""

    def project(self, x: Rows, out: Tensor | None = None) -> Tensor:
        """Plain x [R, K] → [R, N], written to `out` if given.

        On CUDA the bias is added within the product only if `out` is contiguous.
        """
        assert isinstance(x, Tensor)
        result: Tensor = torch.addmm(self.bias, x, self.weight.t(), out=out)
        return result

    def project_gelu(self, x: Rows, out: Tensor) -> Tensor:
        """`project`, then GELU (tanh), which on CUDA is in the epilogue of the product."""
        assert isinstance(x, Tensor)
        arguments = (self.bias, x, self.weight.t())
        if not x.is_cuda:  # there this operation's GELU is the other one, by erf
            return out.copy_(F.gelu(torch.addmm(*arguments), approximate="tanh"))
        torch.ops.aten._addmm_activation.out(*arguments, use_gelu=True, out=out)
        return out


class Float8Linear(nn.Module):
    """A linear layer in float8_e4m3: one scale an output of the weight and one a row of the input.

    Products are summed with fast accumulation (22 bits instead of 32), as all fp8 inference of
    FLUX.1 that is as fast does. Where the device has no such product it is emulated, slowly, with
    the same numbers but for the order of the sum.
    """

    def __init__(self, weight: Quantized, bias: Tensor) -> None:
        super().__init__()
        scale = weight.scale.reshape(1, -1).contiguous()
        self.weight = nn.Parameter(weight.values, requires_grad=False)  # [N, K]
        self.scale = nn.Parameter(scale, requires_grad=False)  # [1, N]
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(
        cls, linear: nn.Linear, quantize: Callable[[Tensor], Quantized], device: torch.device
    ) -> Float8Linear:
        """`linear` in 8-bit floats, quantised on `device` and kept where `linear` is."""
        home = linear.weight.device
        values, scale = quantize(linear.weight.detach().to(device))
        return cls(Quantized(values.to(home), scale.to(home)), linear.bias.detach())

    def project(self, x: Rows, out: Tensor | None = None) -> Tensor:
        """Quantised x [R, K] → [R, N] in the model's precision."""
        assert isinstance(x, Quantized)
        if not x.values.is_cuda:
            weight = self.weight.float() * self.scale.t()
            product = F.linear(x.values.float() * x.scale, weight, self.bias.float())
            product = product.to(self.bias.dtype)
            return product if out is None else out.copy_(product)
        result: Tensor = torch._scaled_mm(
            x.values,
            self.weight.t(),
            x.scale,
            self.scale,
            bias=self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,
            out=out,
        )
        return result


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Compute one product in 8-bit floats as the transformer does, and compare.

    Raises:
        ValueError: the result is wrong.
    """
    random = torch.Generator("cpu").manual_seed(0)
    linear = nn.Linear(64, 96).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random).to(device, dtype)
    x = torch.randn(40, 64, generator=random).to(device, dtype)
    layer = Float8Linear.of(linear, PLAIN.quantize, device)
    quantized = PLAIN.quantize(x)
    out = torch.full((48, 96), torch.nan, dtype=dtype, device=device)
    rows = Quantized(quantized.values[7:], quantized.scale[7:])
    layer.project(rows, out=out[15:])  # rows of a larger matrix, as text and image are
    error = (out[15:].float() - F.linear(x[7:], linear.weight, linear.bias).float()).norm()
    share = float(error / out[15:].float().norm())
    if not share <= 0.08:  # 3.7 % of rounding
        raise ValueError(f"the product differs by {share:.1e}")
