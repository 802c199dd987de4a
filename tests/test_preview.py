"""Previews: what a picture looks like before it is finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from krea_local.preview import FLUX_BIAS, FLUX_TO_RGB, preview_image
from krea_local.sampling import pack

if TYPE_CHECKING:
    from krea_local.pipeline import Krea
    from krea_local.progress import Progress


def packed(latent_map: torch.Tensor) -> torch.Tensor:
    return pack(latent_map[None])


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [
        (1024, 768, (512, 384)),
        (512, 512, (512, 512)),
        (128, 64, (128, 64)),
        (4096, 64, (512, 8)),
        (576, 1024, (288, 512)),
    ],
)
def test_a_preview_has_the_pictures_aspect_and_no_side_over_512(
    width: int, height: int, shown: tuple[int, int]
) -> None:
    latents = packed(torch.randn(16, height // 8, width // 8))
    image = preview_image(latents, width=width, height=height, multiple=16)
    assert (image.mode, image.size) == ("RGB", shown)


def test_a_preview_shows_each_latent_at_its_place_in_its_colour() -> None:
    towards_red = torch.linalg.pinv(torch.tensor(FLUX_TO_RGB).T) @ (
        torch.tensor([1.0, -1.0, -1.0]) - torch.tensor(FLUX_BIAS)
    )
    towards_green = torch.linalg.pinv(torch.tensor(FLUX_TO_RGB).T) @ (
        torch.tensor([-1.0, 1.0, -1.0]) - torch.tensor(FLUX_BIAS)
    )
    latent_map = torch.empty(16, 8, 16)
    latent_map[:, :, :8] = towards_red[:, None, None]
    latent_map[:, :, 8:] = towards_green[:, None, None]
    image = preview_image(packed(latent_map), width=128, height=64, multiple=16)
    assert image.getpixel((16, 32)) == pytest.approx((255, 0, 0), abs=2)
    assert image.getpixel((112, 32)) == pytest.approx((0, 255, 0), abs=2)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_other_latent_spaces_show_their_first_channels(channels: int) -> None:
    latents = packed(torch.randn(channels, 8, 8) * 100 + 7)
    pixels = np.asarray(preview_image(latents, width=64, height=64, multiple=16))
    assert pixels.std() > 20


def test_latents_of_a_broken_model_still_give_a_picture() -> None:
    latents = torch.full((1, 16, 64), torch.nan)
    assert preview_image(latents, width=64, height=64, multiple=16).size == (64, 64)


def test_watching_previews_does_not_change_the_picture(krea: Krea) -> None:
    previews: list[Image.Image] = []

    def on_step(progress: Progress) -> None:
        if progress.latents is not None:
            before = progress.latents.clone()
            previews.append(
                preview_image(progress.latents, width=128, height=96, multiple=krea.size_multiple)
            )
            assert torch.equal(progress.latents, before)

    size = {"width": 128, "height": 96}
    arguments = {"image_size": size, "num_inference_steps": 3, "seed": 3}
    watched = krea.txt2img("a fox", enable_safety_checker=False, on_step=on_step, **arguments)
    alone = krea.txt2img("a fox", enable_safety_checker=False, **arguments)
    assert [image.size for image in previews] == [(128, 96)] * 3
    assert watched.images[0].tobytes() == alone.images[0].tobytes()
    assert len({image.tobytes() for image in previews}) == 3
