"""Any valid request yields what it promises; any invalid one an error that names the field."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import krea_local
from krea_local import Img2ImgRequest, InvalidRequest, KreaWarning, Txt2ImgRequest

# Small enough that a picture takes milliseconds; the rest of the request space is whole.
SIDES = st.integers(64, 200)
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=80),
    "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
    "guidance_scale": st.none() | st.floats(1, 20),
    "sync_mode": st.booleans(),
    "num_images": st.integers(1, 4),
    "enable_safety_checker": st.booleans(),
    "output_format": st.sampled_from(["jpeg", "png"]),
    "acceleration": st.none() | st.sampled_from(["none", "regular", "high"]),
}
SIZES = st.fixed_dictionaries({"width": SIDES, "height": SIDES})
# Sizes and steps that take long are drawn in tests of their own.
TXT2IMG = st.fixed_dictionaries(
    {}, optional={**SHARED, "num_inference_steps": st.integers(1, 4)}
).flatmap(lambda d: SIZES.map(lambda size: {"num_inference_steps": 1, **d, "image_size": size}))
IMG2IMG = st.fixed_dictionaries(
    {"strength": st.integers(1, 100).map(lambda hundredths: hundredths / 100)},
    optional={**SHARED, "num_inference_steps": st.integers(10, 12)},
)
PICTURES = st.builds(
    lambda size, mode: Image.radial_gradient("L").resize(size).convert(mode),
    # A strip of 1 x 200 is redrawn at 64 x 12800; test_schema goes to all extremes.
    st.tuples(st.integers(16, 200), st.integers(16, 200)),
    st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"]),
)


def check(result: krea_local.Result, arguments: dict[str, Any]) -> None:
    count = arguments.get("num_images", 1)
    assert len(result.images) == len(result.has_nsfw_concepts) == count
    assert result.prompt == arguments["prompt"]
    if arguments.get("seed") is not None:
        assert result.seed == arguments["seed"]
    answer = result.to_api(sync_mode=True)
    kind = arguments.get("output_format", "jpeg")
    for image, described in zip(result.images, answer["images"], strict=True):
        assert image.mode == "RGB"
        assert (described["width"], described["height"]) == image.size
        assert described["url"].startswith(f"data:image/{kind};base64,")
        assert image.width % 16 == image.height % 16 == 0


@settings(max_examples=25)
@given(TXT2IMG)
def test_any_valid_text_to_image_request_is_drawn(
    krea: krea_local.Krea, arguments: dict[str, Any]
) -> None:
    arguments = {"prompt": "", **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KreaWarning)
        result = krea.txt2img(**arguments)
    check(result, arguments)
    for image in result.images:
        assert abs(image.width - arguments["image_size"]["width"]) <= 8
        assert abs(image.height - arguments["image_size"]["height"]) <= 8


@settings(max_examples=10)
@given(IMG2IMG, PICTURES)
def test_any_valid_image_to_image_request_is_drawn(
    krea: krea_local.Krea, arguments: dict[str, Any], picture: Image.Image
) -> None:
    arguments = {"prompt": "", **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KreaWarning)
        result = krea.img2img(image_url=picture, **arguments)
    check(result, arguments)


@pytest.mark.parametrize("preset", ["portrait_16_9", "landscape_4_3"])
def test_presets_are_drawn_at_their_true_size(krea: krea_local.Krea, preset: str) -> None:
    from krea_local.schema import PRESETS

    result = krea.txt2img("a fox", image_size=preset, num_inference_steps=1)
    assert result.images[0].size == PRESETS[preset]


junk = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.integers(),
    st.floats(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.binary(max_size=3),
    st.booleans(),
)


def is_valid(name: str, value: Any) -> bool:
    """What the hosted API's documentation allows, said again independently of the schema."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or (isinstance(value, float) and math.isfinite(value))
    rules = {
        "prompt": isinstance(value, str),
        "num_inference_steps": whole and 1 <= value <= 50,
        "seed": value is None or (whole and -(2**63) <= value < 2**64),
        "guidance_scale": number and 1 <= value <= 20,
        "num_images": whole and 1 <= value <= 4,
        "enable_safety_checker": isinstance(value, bool),
        "sync_mode": isinstance(value, bool),
        "output_format": value in ("jpeg", "png"),
        "acceleration": value in ("none", "regular", "high"),
        "image_size": value == {}
        or (isinstance(value, str) and value in krea_local.schema.PRESETS),
        "loras": value == [] or (isinstance(value, str) and bool(value.strip())),
        "strength": number and 0.01 <= value <= 1,
    }
    return rules[name]


@settings(max_examples=400)
@given(st.data())
def test_any_invalid_value_is_refused_by_name(data: st.DataObject) -> None:
    request = data.draw(st.sampled_from([Txt2ImgRequest, Img2ImgRequest]))
    base = {"prompt": ""} | ({"image_url": "x.png"} if request is Img2ImgRequest else {})
    name = data.draw(st.sampled_from([n for n in request.model_fields if n != "image_url"]))
    value = data.draw(junk)
    valid = is_valid(name, value)
    if name == "num_inference_steps" and request is Img2ImgRequest:
        valid = valid and value >= 10
    try:
        parsed = request.parse({**base, name: value})
    except InvalidRequest as error:
        assert not valid
        assert name in str(error)
        assert error.errors[0]["loc"][0] == name  # type: ignore[index]
    else:
        assert valid
        assert getattr(parsed, name) == value or name in ("image_size", "loras")


@given(st.dictionaries(st.text(max_size=8), junk, min_size=1, max_size=3))
def test_unknown_names_are_refused_in_python_and_ignored_from_the_wire(
    extra: dict[str, Any],
) -> None:
    extra = {
        name: value for name, value in extra.items() if name not in Txt2ImgRequest.model_fields
    }
    if extra:
        with pytest.raises(InvalidRequest, match="no such parameter"):
            Txt2ImgRequest.parse({"prompt": "", **extra})
    assert Txt2ImgRequest.parse({"prompt": "", **extra}, wire=True).prompt == ""
