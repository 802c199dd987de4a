"""Flow-matching sampler of FLUX.1: noise levels, noise, packing, positions, the Euler loop.

Pure functions on tensors. Knows nothing of prompts, requests, weights or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]
"""(latents [B, S, 64], step from 0) → velocity at noise level sigmas[step], shaped as `latents`."""


@dataclass(frozen=True)
class Shift:
    """How far the noise levels move towards noise as images grow; FLUX.1's values by default.

    The exponent mu is linear in the number of image tokens through (base_seq_len, base) and
    (max_seq_len, max), and is not clamped beyond them.
    """

    base: float = 0.5
    max: float = 1.15
    base_seq_len: int = 256
    max_seq_len: int = 4096

    def mu(self, image_seq_len: int) -> float:
        """The exponent for `image_seq_len` packed tokens."""
        slope = (self.max - self.base) / (self.max_seq_len - self.base_seq_len)
        return image_seq_len * slope + (self.base - slope * self.base_seq_len)


def flow_sigmas(num_inference_steps: int, image_seq_len: int, shift: Shift = Shift()) -> Tensor:
    """Noise levels the sampler visits, from 1 (pure noise) down to 0 (clean).

    Args:
        num_inference_steps: transformer evaluations T, at least 1.
        image_seq_len: packed latent tokens S, which sets the time shift.
        shift: the checkpoint's shift curve.

    Returns:
        float32 [T + 1] on the CPU, strictly decreasing, ending in exactly 0.

    Source: black-forest-labs/flux, `get_schedule`; oracle: diffusers' scheduler.
    """
    uniform = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).astype(np.float32)
    bend = math.exp(shift.mu(image_seq_len))
    shifted = bend / (bend + (1 / uniform - 1))
    return torch.from_numpy(np.append(shifted, np.float32(0)))


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """How many of the steps an image-to-image run takes: ceil(steps x strength), exactly.

    In floats 50 x 0.56 is 28.000000000000004, and diffusers runs 29 steps.
    """
    return math.ceil(num_inference_steps * Fraction(repr(strength)))


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Noise [B, C, h, w] on the CPU, each image from a generator of its own.

    The CPU draws it so that a seed means the same picture on every GPU. Seeds of any size and sign
    are taken modulo 2^64.
    """
    return torch.cat(
        [
            torch.randn(
                (1, *shape), generator=torch.Generator("cpu").manual_seed(seed % 2**64), dtype=dtype
            )
            for seed in seeds
        ]
    )


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """`clean` moved to noise level `sigma`: exactly `noise` at 1, exactly `clean` at 0."""
    sigma = torch.as_tensor(sigma, dtype=clean.dtype, device=clean.device)
    return sigma * noise + (1.0 - sigma) * clean


def pack(latent_map: Tensor) -> Tensor:
    """Latent map [B, C, h, w] → tokens [B, h/2 · w/2, 4 C]: each token a 2 x 2 patch."""
    batch, channels, height, width = latent_map.shape
    patches = latent_map.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(
        batch, (height // 2) * (width // 2), channels * 4
    )


def unpack(latents: Tensor, *, rows: int, columns: int) -> Tensor:
    """Tokens [B, rows · columns, 4 C] → latent map [B, C, 2 rows, 2 columns]."""
    batch, _, packed = latents.shape
    patches = latents.reshape(batch, rows, columns, packed // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, packed // 4, 2 * rows, 2 * columns)


def latent_ids(*, rows: int, columns: int) -> Tensor:
    """Rotary positions [rows · columns, 3] as (0, row, column), float32 on the CPU.

    Float32, because bfloat16 has no odd integers above 256, the tokens in 4096 pixels.
    """
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.reshape(rows * columns, 3)


def model_timestep(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise levels as the transformer takes them, in [0, 1]."""
    # Round sigma * 1000, then divide, as diffusers does: the other order rounds to other levels.
    return (sigmas * 1000).to(dtype) / 1000


def denoise(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Follow `velocity` from noise level sigmas[0] to sigmas[-1] by Euler's method.

    Never waits for the GPU.

    Args:
        velocity: predicts noise - clean. Takes the step, not its noise level, because what
            depends on the level alone is a table by step, made before the loop.
        latents: tokens [B, S, 64] at noise level sigmas[0].
        sigmas: float32 [T + 1] noise levels.
        on_step: called with (steps done, latents) after each step; what it raises ends the loop.

    Returns:
        Tokens [B, S, 64] at noise level sigmas[-1].
    """
    sigmas = sigmas.to(latents.device)
    for step in range(len(sigmas) - 1):
        predicted = velocity(latents, step)
        # dt is a scalar tensor, so dt * velocity rounds to bfloat16 before the float32 sum, as in
        # diffusers: the other order changes the picture.
        move = (sigmas[step + 1] - sigmas[step]) * predicted
        latents = (latents.float() + move).to(predicted.dtype)
        if on_step is not None:
            on_step(step + 1, latents)
    return latents
