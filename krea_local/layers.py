"""The matrix products of the transformer, in the model's own precision or in 8 bits.

Both take rows [R, K] and write rows [R, N], where they are told to. Knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea_local.kernels import PLAIN, Kernels, Quantized, Rows
from krea_local.kernels.rows import FLOAT8

# What a product in 8 bits may differ by: 3.7 and 1.2 % of rounding are expected.
ROUNDING = {torch.float8_e4m3fn: 0.08, torch.int8: 0.025}


@dataclass(frozen=True)
class LowRank:
    """What is added to a linear layer: up · (down · x), for some of its outputs.

    Attributes:
        down: [r, K], of all parts, one below the other.
        ups: of each part, [N', r'].
        starts: of each part, the first output that it adds to.
    """

    down: Tensor
    ups: tuple[Tensor, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, down: Tensor, up: Tensor, start: int = 0) -> LowRank:
        """One part."""
        return cls(down, (up,), (start,))

    @classmethod
    def join(cls, parts: Sequence[LowRank]) -> LowRank:
        """All `parts` together; those to the same outputs become one."""
        groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for part in parts:
            downs = part.down.split([up.shape[1] for up in part.ups])
            for down, up, start in zip(downs, part.ups, part.starts, strict=True):
                groups.setdefault((start, up.shape[0]), []).append((down, up))
        return cls(
            torch.cat([down for group in groups.values() for down, _ in group]),
            tuple(torch.cat([up for _, up in group], dim=1) for group in groups.values()),
            tuple(start for start, _ in groups),
        )

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.down.nbytes + sum(up.nbytes for up in self.ups)

    def to(self, device: torch.device) -> LowRank:
        """The same on `device`."""
        return replace(self, down=self.down.to(device), ups=tuple(up.to(device) for up in self.ups))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Add to a layer's result `out` [R, N] for x [R, K], in place; returns `out`."""
        lows = (x @ self.down.t()).split([up.shape[1] for up in self.ups], dim=1)
        for low, up, start in zip(lows, self.ups, self.starts, strict=True):
            out[:, start : start + up.shape[0]].addmm_(low, up.t())
        return out

    def added_to(self, weight: Tensor) -> Tensor:
        """A layer's weight [N, K] with what is added to it, summed in float32."""
        total = weight.to(torch.float32, copy=True)
        downs = self.down.float().split([up.shape[1] for up in self.ups])
        for down, up, start in zip(downs, self.ups, self.starts, strict=True):
            total[start : start + up.shape[0]].addmm_(up.float(), down)
        return total.to(weight.dtype)


class Linear(nn.Linear):
    """`nn.Linear` over rows, into a given place, and what a LoRA adds to it.

    Attributes:
        low_rank: is added to every product. No weight of the module, so it does not move with it.
        float8_scale: float32 [N]; divided by it, its rows are numbers in float8_e4m3. None where
            its file did not keep it so.
    """

    low_rank: LowRank | None = None
    float8_scale: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, of [R, K]."""
        return self.multiply(input, self.wide(), self.bias)

    def wide(self) -> Tensor:
        """Its weight [N, K], where it is."""
        return self.weight

    def weight_on(self, device: torch.device) -> Tensor:
        """Its weight [N, K] on `device`; without waiting, if it is locked in host memory."""
        return self.weight.to(device, non_blocking=True)

    def kept_float8(self, device: torch.device) -> Quantized | None:
        """Its weight where the layer is, as its file has it in float8_e4m3; None if it has not.

        What there is to compute is computed on `device`.
        """
        if self.float8_scale is None:
            return None
        home, scale = self.weight.device, self.float8_scale.to(device)[:, None]
        values = (self.weight.detach().to(device).float() / scale).to(torch.float8_e4m3fn)
        return Quantized(values.to(home), scale.to(home))

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As `forward`, with copies of its own weights."""
        out = F.linear(x, weight, bias)
        return out if self.low_rank is None else self.low_rank.add(x, out)

    def project(self, x: Rows, out: Tensor | None = None) -> Tensor:
        """Plain x [R, K] → [R, N], written to `out` if given.

        On CUDA the bias is added within the product only if `out` is contiguous.
        """
        assert isinstance(x, Tensor)
        result: Tensor = torch.addmm(self.bias, x, self.wide().t(), out=out)
        return result if self.low_rank is None else self.low_rank.add(x, result)

    def project_gelu(self, x: Rows, out: Tensor) -> Tensor:
        """`project`, then GELU (tanh), which on CUDA is in the epilogue of the product."""
        assert isinstance(x, Tensor)
        if self.low_rank is not None:
            gelu: Tensor = torch.ops.aten.gelu_(self.project(x, out=out), approximate="tanh")
            return gelu
        arguments = (self.bias, x, self.wide().t())
        if not x.is_cuda:  # there this operation's GELU is the other one, by erf
            return out.copy_(F.gelu(torch.addmm(*arguments), approximate="tanh"))
        torch.ops.aten._addmm_activation.out(*arguments, use_gelu=True, out=out)
        return out


class EightBitLinear(nn.Module):
    """A linear layer in 8 bits: one scale an output of the weight and one a row of the input.

    In float8_e4m3, products are summed with fast accumulation (22 bits instead of 32), as all fp8
    inference of FLUX.1 that is as fast does; in int8 the sum is exact. Where the device has no such
    product it is emulated, slowly, with the same numbers but for the order of the sum.
    """

    def __init__(self, weight: Quantized, bias: Tensor, kernels: Kernels) -> None:
        super().__init__()
        scale = weight.scale.reshape(1, -1).contiguous()
        self.weight = nn.Parameter(weight.values, requires_grad=False)  # [N, K]
        self.scale = nn.Parameter(scale, requires_grad=False)  # [1, N]
        self.bias = nn.Parameter(bias, requires_grad=False)
        integers = weight.values.dtype == torch.int8
        self.product = kernels.int8_product if integers else float8_product

    @classmethod
    def of(
        cls, linear: Linear, eight_bit: torch.dtype, kernels: Kernels, device: torch.device
    ) -> EightBitLinear:
        """`linear`, and what is added to it, in float8_e4m3fn or int8.

        They are quantised on `device` and kept where `linear` is. Where its file has 8-bit floats,
        they are wanted, and nothing is added, they are those: a second rounding would be as large
        as the first.
        """
        bias = linear.bias.detach()
        kept = None
        if eight_bit == FLOAT8 and linear.low_rank is None:
            kept = linear.kept_float8(device)
        if kept is not None:
            return cls(kept, bias, kernels)
        weight = linear.weight_on(device).detach()
        if linear.low_rank is not None:
            weight = linear.low_rank.added_to(weight)
        values, scale = kernels.quantize(weight, eight_bit=eight_bit)
        return cls(Quantized(values.to(bias.device), scale.to(bias.device)), bias, kernels)

    def project(self, x: Rows, out: Tensor | None = None) -> Tensor:
        """Quantised x [R, K] → [R, N] in the model's precision."""
        assert isinstance(x, Quantized)
        return self.product(x, Quantized(self.weight, self.scale.t()), self.bias, out=out)


def float8_product(
    x: Quantized, weight: Quantized, bias: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """As `kernels.fallback.int8_product`, of 8-bit floats."""
    if not x.values.is_cuda:
        factors = (x.values.float() * x.scale, weight.values.float() * weight.scale)
        product = F.linear(*factors, bias.float()).to(bias.dtype)
        return product if out is None else out.copy_(product)
    result: Tensor = torch._scaled_mm(
        x.values,
        weight.values.t(),
        x.scale,
        weight.scale.t(),
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=True,
        out=out,
    )
    return result


def check_product(
    eight_bit: torch.dtype, kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> None:
    """Compute two products in 8 bits as the transformer does, and compare.

    Raises:
        ValueError: a result is wrong.
    """
    random = torch.Generator("cpu").manual_seed(0)
    plain = replace(PLAIN, int8_product=kernels.int8_product)
    # A small product of integers is divided among programs in another way than a large one.
    for rows, inner, outputs in ((33, 64, 96), (500, 320, 7168)):
        linear = Linear(inner, outputs).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random).to(device, dtype)
        x = torch.randn(7 + rows, inner, generator=random).to(device, dtype)
        layer = EightBitLinear.of(linear, eight_bit, plain, device)
        quantized = PLAIN.quantize(x, eight_bit=eight_bit)
        out = torch.full((15 + rows, outputs), torch.nan, dtype=dtype, device=device)
        # Rows of a larger matrix, as text and image are.
        layer.project(Quantized(quantized.values[7:], quantized.scale[7:]), out=out[15:])
        wanted = F.linear(x[7:], linear.weight, linear.bias).float()
        error = float((out[15:].float() - wanted).norm() / out[15:].float().norm())
        if not error <= ROUNDING[eight_bit]:  # also where it is NaN
            raise ValueError(f"the product differs by {error:.1e}")
