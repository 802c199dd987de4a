"""Skip denoising steps that would add little: the first-block cache, with Taylor extrapolation.

Neighbouring steps add nearly the same to the image. At every step the first block is computed; if
what it adds has changed little since the last full step, what all further blocks would add is
extrapolated from the last full steps instead. State belongs to one batch of one call, so a call
that is aborted leaves nothing behind.

Source: ParaAttention's first-block cache; TaylorSeer (arXiv 2503.06923).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from krea_local.transformer import Group


@dataclass(frozen=True)
class Skipping:
    """When steps may be skipped.

    Attributes:
        threshold: relative L1 change of what the first block adds, below which a step is skipped.
            Reading it is the one moment when the loop waits for the GPU, once a step.
        first_full: steps at the start that are always computed.
        last_full: likewise at the end.
        in_a_row: how many steps may be skipped one after another.
        computed: share of the steps to compute, spread evenly, instead of `threshold`; for
            benchmarks, since with random weights changes mean nothing.
    """

    threshold: float = 0.08
    first_full: int = 4
    last_full: int = 2
    in_a_row: int = 3
    computed: float | None = None

    def may_skip(self, step: int, steps: int) -> bool:
        """Whether a step, from 0, lies between those that are always computed."""
        return self.first_full <= step < steps - self.last_full

    def pattern(self, steps: int) -> tuple[bool, ...]:
        """With `computed`: which steps are skipped."""
        assert self.computed is not None
        free = [step for step in range(steps) if self.may_skip(step, steps)]
        full = max(0, math.ceil(self.computed * steps) - (steps - len(free)))
        # After step k of the free ones, k * full / free of them should have been computed.
        kept = {free[(2 * i + 1) * len(free) // (2 * full)] for i in range(full)}
        return tuple(step in set(free) - kept for step in range(steps))


class StepCache:
    """The state of one batch: a `transformer.Cache`.

    Args:
        skipping: when steps may be skipped.
        sigmas: float32 [T + 1] noise levels, on the CPU.
        group: other processes with a part of the tokens each, which must decide alike.
    """

    def __init__(self, skipping: Skipping, sigmas: Tensor, group: Group | None = None) -> None:
        self.skipping = skipping
        self.levels: list[float] = sigmas.tolist()
        self.group = group
        self.skipped: list[int] = []
        self._pattern = None if skipping.computed is None else skipping.pattern(self.steps)
        self._first: Tensor | None = None  # of the last full step
        self._pending: Tensor | None = None  # of this one
        self._rests: list[tuple[float, Tensor]] = []  # (sigma, what was added), the last two
        self._row = 0

    @property
    def steps(self) -> int:
        """T, the steps of the call."""
        return len(self.levels) - 1

    def skip(self, step: int, first: Tensor) -> Tensor | None:
        """As `transformer.Cache` says."""
        self._pending = first
        if not self._skips(step, first):
            return None
        self._row += 1
        self.skipped.append(step)
        return self._extrapolate(self.levels[step])

    def keep(self, step: int, rest: Tensor) -> None:
        """As `transformer.Cache` says."""
        # Only now: a step that failed on the way, and is repeated, was none.
        self._first, self._row = self._pending, 0
        self._rests = [*self._rests[-1:], (self.levels[step], rest)]

    def _skips(self, step: int, first: Tensor) -> bool:
        if self._first is None or not self._rests:
            return False
        if self._pattern is not None:
            return self._pattern[step]
        if not self.skipping.may_skip(step, self.steps) or self._row >= self.skipping.in_a_row:
            return False
        sizes = [t.abs().sum(dtype=torch.float32) for t in (first - self._first, self._first)]
        change = torch.stack(sizes)
        if self.group is not None:
            change = self.group.sum(change)
        return bool((change[0] < self.skipping.threshold * change[1]).item())

    def _extrapolate(self, level: float) -> Tensor:
        """To first order in the noise level, from the last two full steps."""
        now, rest = self._rests[-1]
        if len(self._rests) == 1:
            return rest
        before, earlier = self._rests[0]
        return torch.lerp(earlier, rest, (level - before) / (now - before))
