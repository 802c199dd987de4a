from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

import krea_local
from krea_local import ImageSize, Img2ImgRequest, InvalidRequest, Txt2ImgRequest
from krea_local.pipeline import Krea
from krea_local.schema import MAX_PIXELS, MODEL_DEFAULTS, PRESETS, fit_input_size, fit_size

# The hosted API's page, word for word.
TXT2IMG_BODY = {
    "prompt": "A candid street photo of a woman with a pink bob and bold eyeliner on a "
    "graffiti-covered subway platform.",
    "image_size": "landscape_4_3",
    "num_inference_steps": 28,
    "guidance_scale": 4.5,
    "sync_mode": False,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
    "acceleration": "none",
}
IMG2IMG_BODY = {
    "image_url": "https://fal.media/files/koala/Chls9L2ZnvuipUTEwlnJC.png",
    "strength": 0.95,
    "num_inference_steps": 40,
    "prompt": "A cat dressed as a wizard with a background of a mystic forest.",
    "guidance_scale": 4.5,
    "sync_mode": False,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
    "acceleration": "none",
}


def test_the_bodies_of_the_hosted_page_are_our_defaults() -> None:
    for request, body in ((Txt2ImgRequest, TXT2IMG_BODY), (Img2ImgRequest, IMG2IMG_BODY)):
        required = {name: body[name] for name in ("prompt", "image_url") if name in body}
        if request is Txt2ImgRequest:
            required.pop("image_url", None)
        assert request.parse(body) == request.parse(required)
        assert set(request.model_fields) == {*body, "seed", "loras"}


def test_the_functions_take_the_fields_with_their_defaults() -> None:
    for name, request in (("txt2img", Txt2ImgRequest), ("img2img", Img2ImgRequest)):
        for function in (getattr(krea_local, name), getattr(Krea, name)):
            parameters = dict(inspect.signature(function).parameters)
            own = {"self", "model", "on_step"}
            assert set(parameters) - own == set(request.model_fields)
            for field_name, field in request.model_fields.items():
                default = parameters[field_name].default
                if field.is_required():
                    assert default is inspect.Parameter.empty
                elif field_name in MODEL_DEFAULTS:
                    assert default is None
                else:
                    assert default == field.default
                assert f"{field_name}: {field.description}" in function.__doc__


def test_defaults_are_the_hosted_apis() -> None:
    drawn = Txt2ImgRequest.parse({"prompt": ""})
    assert (drawn.image_size, drawn.num_inference_steps, drawn.guidance_scale) == (
        "landscape_4_3",
        28,
        4.5,
    )
    redrawn = Img2ImgRequest.parse({"prompt": "", "image_url": "x.png"})
    assert (redrawn.strength, redrawn.num_inference_steps, redrawn.guidance_scale) == (
        0.95,
        40,
        4.5,
    )
    for request in (drawn, redrawn):
        assert request.seed is None
        assert request.num_images == 1
        assert request.enable_safety_checker
        assert not request.sync_mode
        assert (request.output_format, request.acceleration) == ("jpeg", "none")


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("square_hd", (1024, 1024)),
        ("square", (512, 512)),
        ("portrait_4_3", (768, 1024)),
        ("portrait_16_9", (576, 1024)),
        ("landscape_4_3", (1024, 768)),
        ("landscape_16_9", (1024, 576)),
    ],
)
def test_presets_are_width_by_height(preset: str, size: tuple[int, int]) -> None:
    request = Txt2ImgRequest.parse({"prompt": "", "image_size": preset})
    assert request.size() == request.asked_size == size
    assert len(PRESETS) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt: is required"),
        ({"prompt": None}, "prompt=None: should be a valid string"),
        ({"prompt": 3}, "prompt=3: should be a valid string"),
        ({"prompt": "\ud800"}, "prompt=.*not valid Unicode at character 0"),
        ({"steps": 3}, "steps: no such parameter; did you mean 'num_inference_steps'"),
        ({"cfg": 3}, "cfg: no such parameter; known: prompt, "),
        ({"guidence_scale": 3}, "did you mean 'guidance_scale'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: should be greater than or equal to 1"),
        ({"num_inference_steps": 51}, "num_inference_steps=51: should be less than or equal to 50"),
        ({"num_inference_steps": "28"}, "num_inference_steps='28': should be a valid integer"),
        ({"num_inference_steps": 28.0}, "num_inference_steps=28.0: should be a valid integer"),
        ({"num_inference_steps": True}, "num_inference_steps=True: should be a valid integer"),
        ({"num_images": 5}, "num_images=5: should be less than or equal to 4"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5: should be greater than or equal to 1"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan: should be a finite number"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf: should be"),
        ({"guidance_scale": "4"}, "guidance_scale='4': should be a valid number"),
        ({"seed": 1.5}, "seed=1.5: should be a valid integer"),
        ({"seed": 2**64}, "seed=18446744073709551616: should be less than or equal to 1844"),
        ({"seed": 10**5000}, "seed=.*: should be less than or equal"),
        ({"seed": -(2**63) - 1}, "seed=-9223372036854775809: should be greater than or equal"),
        ({"seed": np.array([1, 2])}, "seed=.*: should be a valid integer"),
        ({"output_format": "webp"}, "output_format='webp': should be 'jpeg' or 'png'"),
        ({"acceleration": "max"}, "acceleration='max': should be 'none', 'regular' or 'high'"),
        ({"enable_safety_checker": "no"}, "enable_safety_checker='no': should be a valid boolean"),
        ({"image_size": "huge"}, "image_size='huge': should be 'square_hd', 'square'"),
        ({"image_size": [1, 2]}, r"image_size=\[1, 2\]: should be 'square_hd'"),
        (
            {"image_size": {"width": 63}},
            "image_size.width=63: should be greater than or equal to 64",
        ),
        ({"image_size": {"width": 9.5}}, "image_size.width=9.5: should be a valid integer"),
        (
            {"image_size": {"heigth": 99}},
            "heigth: no such parameter; did you mean 'height'",
        ),
        (
            {"image_size": {"width": 4000, "height": 3000}},
            "image_size: 4000x3000 is 12.0 megapixels, more than 4,194,304 pixels: the nearest "
            "that fits is 2352x1776",
        ),
        ({"image_size": {"width": 20000}}, "image_size.width=20000: should be less than or equal"),
    ],
)
def test_an_invalid_request_names_value_and_rule(arguments: dict[str, Any], message: str) -> None:
    if "prompt" not in arguments and arguments:
        arguments = {"prompt": "", **arguments}
    with pytest.raises(InvalidRequest, match=message) as caught:
        Txt2ImgRequest.parse(arguments)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_every_fault_is_told_at_once_and_in_pydantics_form() -> None:
    with pytest.raises(InvalidRequest, match="num_images=9.*; .*strength=2") as caught:
        Img2ImgRequest.parse({"prompt": "", "image_url": "x", "num_images": 9, "strength": 2.0})
    assert [error["loc"] for error in caught.value.errors] == [("num_images",), ("strength",)]
    assert caught.value.errors[0]["type"] == "less_than_equal"


def test_faults_are_json_as_the_hosted_apis_422_needs() -> None:
    import json

    size = {"width": 4000, "height": 4000}
    with pytest.raises(InvalidRequest) as caught:
        Txt2ImgRequest.parse({"prompt": "", "image_size": size, "seed": 2**64, "x": 1})
    faults = json.loads(json.dumps(caught.value.errors))
    assert [fault["loc"] for fault in faults] == [["seed"], ["image_size"], ["x"]]
    with pytest.raises(InvalidRequest) as caught:
        Txt2ImgRequest.parse({"prompt": "", "image_size": {"width": 1}})
    assert caught.value.errors[0]["loc"] == ("image_size", "width")


@pytest.mark.parametrize("value", [3, None, ["x.png"], "", "  "])
def test_an_image_must_be_a_path_url_bytes_or_image(value: object) -> None:
    with pytest.raises(InvalidRequest, match="image_url=.*: .*give a path"):
        Img2ImgRequest.parse({"prompt": "", "image_url": value})


def test_images_are_taken_as_path_bytes_or_pil() -> None:
    for value in ("x.png", Path("x.png"), b"x", Image.new("RGB", (1, 1)), "data:,", "https://x/y"):
        assert Img2ImgRequest.parse({"prompt": "", "image_url": value}).image_url is value


def test_the_wire_is_lenient_where_the_hosted_api_is_but_never_reads_paths() -> None:
    body = {"prompt": "x", "num_images": "2", "seed": None, "loras": [], "guidance_scale": "3"}
    request = Txt2ImgRequest.parse(body, wire=True)
    assert (request.num_images, request.guidance_scale, request.seed) == (2, 3.0, None)
    for path in ("/etc/passwd", "x.png", "file:///etc/passwd", "~/x", "ftp://x/y"):
        with pytest.raises(InvalidRequest, match=r"image_url=.*http\(s\) URL or a data URI"):
            Img2ImgRequest.parse({"prompt": "", "image_url": path}, wire=True)
    with pytest.raises(InvalidRequest, match="image_url"):
        Img2ImgRequest.parse({"prompt": "", "image_url": b"x"}, wire=True)


def test_numpy_numbers_are_numbers() -> None:
    request = Txt2ImgRequest.parse(
        {
            "prompt": "",
            "seed": np.int64(5),
            "num_images": np.uint8(2),
            "guidance_scale": np.float64(3),
        }
    )
    assert (request.seed, request.num_images, request.guidance_scale) == (5, 2, 3.0)
    assert type(request.seed) is int


def test_requests_are_frozen_and_fix_their_seed_in_a_copy() -> None:
    request = Txt2ImgRequest.parse({"prompt": ""})
    with pytest.raises(ValidationError, match="frozen"):
        request.num_images = 2  # type: ignore[misc]
    fixed = request.with_seed()
    assert request.seed is None
    assert fixed.seed is not None
    assert 0 <= fixed.seed < 2**32
    assert Txt2ImgRequest.parse({"prompt": "", "seed": 0}).with_seed().seed == 0
    assert request.with_seed().seed != fixed.seed


def test_an_omitted_side_is_512() -> None:
    assert Txt2ImgRequest.parse({"prompt": "", "image_size": {"width": 768}}).size() == (768, 512)
    assert Txt2ImgRequest.parse({"prompt": "", "image_size": {}}).size() == (512, 512)
    size = ImageSize(width=128, height=256)
    assert Txt2ImgRequest.parse({"prompt": "", "image_size": size}).size() == (128, 256)


def test_four_megapixels_are_allowed_and_the_suggested_size_is_too() -> None:
    assert ImageSize(width=2048, height=2048)
    assert ImageSize(width=2050, height=2050)  # rounds to 2048
    assert ImageSize(width=14142, height=288)
    with pytest.raises(ValidationError, match="2048x2048"):
        ImageSize(width=2064, height=2048)


def test_the_json_schema_is_the_apis() -> None:
    schema = Img2ImgRequest.model_json_schema()
    assert schema["properties"]["image_url"]["type"] == "string"
    assert schema["properties"]["num_inference_steps"]["maximum"] == 50
    assert set(schema["required"]) == {"prompt", "image_url"}


sides = st.integers(64, 14142)


@given(sides, sides, st.sampled_from([16, 32, 64]))
def test_a_fitted_size_is_a_multiple_within_the_area(
    width: int, height: int, multiple: int
) -> None:
    across, down = fit_size(width=width, height=height, multiple=multiple)
    assert across % multiple == down % multiple == 0
    assert min(across, down) >= 64
    assert across * down <= MAX_PIXELS
    if width * height <= MAX_PIXELS * 0.9 and width < 14000 and height < 14000:
        assert abs(across - width) <= multiple
        assert abs(down - height) <= multiple


@given(sides, sides)
def test_a_refused_size_suggests_one_that_is_accepted(width: int, height: int) -> None:
    try:
        ImageSize(width=width, height=height)
    except ValidationError as error:
        suggestion = error.errors()[0]["msg"].rsplit(" ", 1)[-1]
        across, down = map(int, suggestion.split("x"))
        ImageSize(width=min(across, 14142), height=min(down, 14142))


def test_small_images_are_not_stretched_by_rounding() -> None:
    assert fit_input_size(width=71, height=72) in ((64, 64), (80, 80))
    assert fit_input_size(width=295, height=281) == (304, 288)
    assert fit_input_size(width=1024, height=768) == (1024, 768)
    assert fit_input_size(width=4032, height=3024) == (1648, 1232)


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_an_input_image_keeps_its_aspect_or_is_refused(width: int, height: int) -> None:
    fitted = fit_input_size(width=width, height=height)
    if fitted is None:
        assert max(width, height) / min(width, height) > 100
        return
    assert fitted[0] % 16 == fitted[1] % 16 == 0
    assert min(fitted) >= 64
    assert fitted[0] * fitted[1] <= 1440 * 1440
    limit = 1.5 if max(width, height) > 4 * min(width, height) else 1.15
    assert abs(math.log(fitted[0] / fitted[1] * height / width)) < math.log(limit)
