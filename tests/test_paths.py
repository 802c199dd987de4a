"""Paths that lead nowhere are told, wherever they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import krea_local
from krea_local import InvalidImage, InvalidRequest
from krea_local.paths import expanded

CIRCLE = r"leads nowhere: its symbolic links go in a circle"


@pytest.fixture(params=["", "inside"])
def circle(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A link to a link to the first one; or something inside it."""
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    return tmp_path / "a.safetensors" / request.param


@pytest.mark.parametrize("parameter", ["model", "transformer", "text_encoder_2"])
def test_weights_that_are_a_circle_of_links_are_refused(circle: Path, parameter: str) -> None:
    arguments = {"model": "tiny"} | {parameter: str(circle)}
    with pytest.raises(InvalidRequest, match=CIRCLE):
        krea_local.load(device="cpu", progress=False, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_an_image_that_is_a_circle_of_links_is_refused(
    krea: krea_local.Krea, circle: Path, form: str
) -> None:
    with pytest.raises(InvalidImage, match=rf"image_url: .*a\.safetensors.* {CIRCLE}"):
        krea.img2img("a fox", image_url=form.format(circle))


def test_other_links_are_followed(krea: krea_local.Krea, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    link = tmp_path / "link.png"
    link.symlink_to("image.png")
    assert krea.img2img("a fox", image_url=str(link), num_inference_steps=10).images
    (tmp_path / "nowhere").symlink_to("missing")
    assert expanded(tmp_path / "nowhere") == tmp_path / "nowhere"
    assert expanded("\ud800") == Path("\ud800")  # no text that a disk takes: whoever opens it says
