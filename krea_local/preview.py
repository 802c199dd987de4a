"""A rough picture of latents while they are still being denoised, for a few milliseconds.

A linear map from FLUX.1's sixteen latent channels (or the miniature's) to colours, one pixel a
latent, instead of the VAE. Knows nothing of requests, models or where the picture is shown.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from krea_local.sampling import unpack

MAX_SIDE = 512

# Red, green and blue in [-1, 1] of each latent channel, and of none; least squares over pictures.
# Source: ComfyUI, comfy/latent_formats.py, `Flux`.
FLUX_TO_RGB = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
FLUX_BIAS = (-0.0329, -0.0718, -0.0851)
# Likewise of the miniature's, over 60 encoded scenes.
MINIATURE_TO_RGB = (
    (0.023, 0.102, 0.105),
    (0.174, -0.045, -0.083),
    (-0.065, -0.010, 0.007),
    (0.070, 0.080, -0.253),
    (0.003, -0.002, -0.008),
    (-0.042, -0.025, -0.010),
    (-0.235, -0.236, -0.120),
    (-0.267, -0.034, -0.078),
    (0.014, 0.027, 0.002),
    (-0.081, -0.013, -0.036),
    (-0.013, -0.012, 0.023),
    (-0.014, -0.081, 0.100),
    (-0.017, -0.174, -0.099),
    (-0.024, -0.002, -0.001),
    (-0.006, 0.032, 0.055),
    (-0.032, -0.033, -0.022),
)
MINIATURE_BIAS = (0.216, 0.018, 0.004)
KNOWN = {
    (16, 16): (FLUX_TO_RGB, FLUX_BIAS),
    (16, 64): (MINIATURE_TO_RGB, MINIATURE_BIAS),
}
"""Colours by (latent channels, pixels of a token's side)."""


def preview_image(latents: Tensor, *, width: int, height: int, multiple: int) -> Image.Image:
    """The first picture of `latents` as it is so far, its noise included.

    Waits for the GPU once, for the few kilobytes of the picture: call it every few steps.

    Args:
        latents: packed [B, S, 4 C], as `Progress.latents`; of latents that are not known,
            the first three channels stand for the colours.
        width: of the picture that is being drawn, a multiple of `multiple`.
        height: likewise.
        multiple: `Krea.size_multiple`, the pixels of a token's side.

    Returns:
        RGB, in the picture's aspect, no side longer than 512 or than the picture's own.
    """
    with torch.inference_mode():
        latent_map = unpack(latents[:1], rows=height // multiple, columns=width // multiple)
        values = latent_map[0].float().permute(1, 2, 0)  # [h, w, C]
        known = KNOWN.get((values.shape[2], multiple))
        if known is not None:
            to_rgb, bias = known
            colours = values @ values.new_tensor(to_rgb) + values.new_tensor(bias)
        else:
            colours = values[..., [channel % values.shape[2] for channel in range(3)]]
            deviation, mean = torch.std_mean(colours, dim=(0, 1), correction=0)
            colours = (colours - mean) / (2 * deviation).clamp(min=1e-6)
        bytes_ = (colours.nan_to_num(0.0).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
        small = Image.fromarray(bytes_.cpu().numpy())
    scale = min(1.0, MAX_SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return small.resize(size, Image.Resampling.BILINEAR)
