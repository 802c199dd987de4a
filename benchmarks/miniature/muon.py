"""Muon: momentum whose matrices are made orthogonal, so that no direction is learned late.

torch.optim.Muon takes matrices alone; most of the autoencoder's weights are convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Coefficients of the quintic iteration; source: Keller Jordan, "Muon", 2024.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """For weights of two and more dimensions; everything past the first counts as one.

    Args:
        weights: to train.
        lr: the rate; an update has about the size, element by element, of one of AdamW's.
        momentum: of the gradients.
        dtype: in which updates are made orthogonal; bfloat16 is as good, and faster for matrices
            wide enough.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            same: dict[tuple[int, ...], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    same.setdefault(weight.shape, []).append(weight)
            for weights in same.values():
                self._step(weights, group)

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            updates.append(torch.lerp(weight.grad, state["momentum"], group["momentum"]))
        stacked = torch.stack([update.flatten(1) for update in updates])
        matrices = orthogonal(stacked.to(group["dtype"])).to(stacked.dtype)
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.add_(matrix.view(weight.shape), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """`matrices` [K, M, N] with singular values near 1, by five Newton-Schulz steps."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        squares = x @ x.mT
        x = a * x + (b * squares + c * squares @ squares) @ x
    made: Tensor = x.mT.contiguous() if tall else x
    return made


def split(
    weights: Iterable[tuple[str, Tensor]], apart: tuple[str, ...] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights for Muon, and the rest: vectors, and all whose name holds one of `apart`."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, weight in weights:
        fits = weight.ndim > 1 and not any(part in name for part in apart)
        (matrices if fits else rest).append(weight)
    return matrices, rest
