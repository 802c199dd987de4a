"""The hosted API's endpoints: arguments in, errors out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from krea_local import InvalidRequest, OutOfMemory, UnknownEndpoint
from krea_local.endpoints import (
    ENDPOINTS,
    MAX_PROMPT_CHARACTERS,
    NOT_STARTED_IN_TIME,
    Endpoint,
    LoraRequest,
    find_endpoint,
    http_error,
)
from krea_local.errors import Cancelled, InvalidImage
from krea_local.schema import Img2ImgRequest, Txt2ImgRequest

if TYPE_CHECKING:
    from krea_local.pipeline import Krea

KREA = ENDPOINTS["fal-ai/flux/krea"]
LORA = ENDPOINTS["fal-ai/flux-krea-lora"]


def answer(endpoint: Endpoint, arguments: Any, *, wire: bool = True) -> list[dict[str, Any]]:
    """The faults that HTTP would be told, as its client reads them."""
    with pytest.raises(InvalidRequest) as raised:
        endpoint.parse(arguments, wire=wire)
    told = http_error(raised.value)
    assert (told.status, told.error_type, told.headers) == (422, None, {})
    body = json.dumps(told.body, allow_nan=False, ensure_ascii=False).encode()
    faults = json.loads(body)["detail"]
    assert faults
    return faults


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.id)
def test_every_endpoint_has_the_hosted_defaults(endpoint: Endpoint) -> None:
    image = {"image_url": "https://example.com/a.png"}
    request = endpoint.parse({"prompt": "a fox", **image})
    redraws = endpoint.id.endswith("/image-to-image")
    assert isinstance(request, Img2ImgRequest if redraws else Txt2ImgRequest)
    assert request.num_inference_steps == (40 if redraws else 28)
    low = "dev" in endpoint.id or "lora" in endpoint.id
    assert request.guidance_scale == (3.5 if low else 4.5)
    # Else the default of whatever model is loaded would win.
    assert "guidance_scale" in request.model_fields_set
    assert endpoint.app == "/".join(endpoint.id.split("/")[:2])
    assert find_endpoint(f"/{endpoint.id}/") is endpoint


def test_what_clients_in_the_wild_send_is_understood() -> None:
    request = KREA.parse(
        {
            "prompt": "a fox",
            "seed": None,
            "num_images": "2",
            "guidance_scale": "3",
            "num_inference_steps": 12.0,
            "sync_mode": "true",
            "image_size": {"width": "640", "unit": "px"},
            "negative_prompt": "blurry",
            "enable_prompt_expansion": True,
            "loras": "whatever this is",
        }
    )
    assert isinstance(request, Txt2ImgRequest)
    assert request.seed is None
    assert (request.num_images, request.guidance_scale) == (2, 3.0)
    assert (request.num_inference_steps, request.sync_mode) == (12, True)
    assert request.asked_size == (640, 512)
    assert request.loras == ()


def test_the_endpoint_with_loras_takes_hub_ids_and_urls_but_no_paths() -> None:
    request = LORA.parse(
        {
            "prompt": "x",
            "guidance_scale": 0,
            "loras": [{"path": "owner/name"}, {"path": "https://x.org/l"}],
        }
    )
    assert isinstance(request, LoraRequest)
    assert [lora.path for lora in request.loras] == [
        "https://huggingface.co/owner/name",
        "https://x.org/l",
    ]
    for path in ("/etc/passwd", "../l.safetensors", "l.safetensors", "file:///l", "~/l", ""):
        (fault,) = answer(LORA, {"prompt": "x", "loras": [{"path": path}]})
        assert fault["loc"] == ["body", "loras", 0, "path"]
    local = LORA.parse({"prompt": "x", "loras": ["/l.safetensors"]}, wire=False)
    assert [lora.path for lora in local.loras] == ["/l.safetensors"]
    assert answer(LORA, {"prompt": "x", "guidance_scale": 36})[0]["ctx"] == {"le": 35}
    assert answer(KREA, {"prompt": "x", "guidance_scale": 21})[0]["ctx"] == {"le": 20}


def test_images_over_the_wire_are_urls_and_in_this_process_anything(tmp_path: Path) -> None:
    redraw = ENDPOINTS["fal-ai/flux/krea/image-to-image"]
    for source in ("a.png", "/etc/passwd", "file:///etc/passwd", "ftp://x/y", "", 3, None, b"x"):
        (fault,) = answer(redraw, {"prompt": "x", "image_url": source})
        assert fault["loc"] == ["body", "image_url"]
    for fine in ("http://x/a.png", "https://x/a.png", "data:image/png;base64,AAAA"):
        redraw.parse({"prompt": "x", "image_url": fine})
    for local in (tmp_path / "a.png", "a.png", b"bytes", Image.new("RGB", (8, 8))):
        redraw.parse({"prompt": "x", "image_url": local, "seed": "3"}, wire=False)


def test_faults_read_as_pydantics_web_frameworks_put_them() -> None:
    assert answer(KREA, {}) == [
        {"loc": ["body", "prompt"], "msg": "Field required", "type": "missing", "input": {}}
    ]
    assert answer(KREA, {"prompt": "x", "num_images": 5}) == [
        {
            "loc": ["body", "num_images"],
            "msg": "Input should be less than or equal to 4",
            "type": "less_than_equal",
            "ctx": {"le": 4},
            "input": 5,
        }
    ]
    (fault,) = answer(KREA, {"prompt": "x", "image_size": "huge"})
    assert (fault["loc"], fault["type"]) == (["body", "image_size"], "literal_error")
    (fault,) = answer(KREA, {"prompt": "x", "image_size": {"height": 1}})
    assert fault["loc"] == ["body", "image_size", "height"]
    (fault,) = answer(KREA, [1, 2])
    assert (fault["loc"], fault["input"]) == (["body"], [1, 2])
    assert len(answer(KREA, {"num_images": 0, "output_format": "gif", "seed": "x"})) == 4


def test_a_prompt_over_the_wire_has_a_limit() -> None:
    longest = "x" * MAX_PROMPT_CHARACTERS
    assert KREA.parse({"prompt": longest}).prompt == longest
    (fault,) = answer(KREA, {"prompt": longest + "x"})
    assert fault["type"] == "string_too_long"
    assert fault["ctx"] == {"max_length": MAX_PROMPT_CHARACTERS}
    assert len(fault["input"]) < MAX_PROMPT_CHARACTERS
    assert KREA.parse({"prompt": longest * 2}, wire=False).prompt == longest * 2


nested: Any = []
for _ in range(10_000):
    nested = [nested]


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        10**5000,
        -(10**5000),
        "\ud800",
        {"width": "\ud800", "\udfff": "\ud800"},
        {3: 4, "width": -1},
        b"\xff\x00",
        object(),
        nested,
        [float("nan"), {"x": {"y": {"z": {"deeper": {1, 2}}}}}],
        "x" * 10**6,
        ["x"] * 10**6,
        Image.new("RGB", (8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["num_images", "image_size", "guidance_scale", "acceleration"])
def test_whatever_is_wrong_is_told_in_short_json(name: str, value: Any) -> None:
    faults = answer(KREA, {"prompt": "x", name: value})
    assert [fault["loc"][:2] for fault in faults] == [["body", name]] * len(faults)
    assert len(json.dumps(faults)) < 100_000
    answer(KREA, {name: value})  # the missing prompt's fault has all of the arguments


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    endpoint=st.sampled_from(list(ENDPOINTS.values())),
    arguments=st.dictionaries(
        st.sampled_from([*Img2ImgRequest.model_fields, "image_size"]) | st.text(), values
    ),
    wire=st.booleans(),
)
def test_any_arguments_are_taken_or_refused_in_json(
    endpoint: Endpoint, arguments: dict[str, Any], wire: bool
) -> None:
    try:
        endpoint.parse(arguments, wire=wire)
    except InvalidRequest as error:
        told = http_error(error)
        assert told.status == 422
        json.dumps(told.body, allow_nan=False, ensure_ascii=False).encode()


def test_errors_have_the_statuses_that_official_clients_expect() -> None:
    image = http_error(InvalidImage("image_url: \ud800 is not an image"))
    assert image.status == 422
    assert image.body["detail"][0]["loc"] == ["body", "image_url"]
    json.dumps(image.body, ensure_ascii=False).encode()
    assert http_error(Cancelled("x")).status == 499
    # 503 would make the JavaScript client submit it four times.
    memory = http_error(OutOfMemory("too large"))
    assert (memory.status, memory.body["detail"]) == (500, "too large")
    secret = http_error(RuntimeError("/home/me/secret"))
    assert (secret.status, secret.error_type) == (500, "internal_error")
    assert "secret" not in json.dumps(secret.body)
    assert secret.headers == {"X-Fal-Error-Type": "internal_error"}
    assert NOT_STARTED_IN_TIME.headers["X-Fal-Request-Timeout-Type"] == "user"


@pytest.mark.parametrize("name", ["fal-ai/flux/schnell", "", "\ud800", "fal-ai/flux/krea/redux"])
def test_an_unknown_endpoint_is_a_404_that_says_what_there_is(name: str) -> None:
    with pytest.raises(UnknownEndpoint) as raised:
        find_endpoint(name)
    told = http_error(raised.value)
    assert (told.status, told.error_type) == (404, "not_found")
    assert "other weights" in told.body["detail"] or "fal-ai/flux/krea" in told.body["detail"]
    json.dumps(told.body, ensure_ascii=False).encode()


def references(part: Any) -> list[str]:
    if isinstance(part, dict):
        return [name for name in part if name in ("$ref", "$defs", "ge", "le")] + [
            found for one in part.values() for found in references(one)
        ]
    return [found for one in part for found in references(one)] if isinstance(part, list) else []


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.id)
def test_a_schema_says_what_is_taken(endpoint: Endpoint) -> None:
    schema: Any = endpoint.schema()
    assert json.loads(json.dumps(schema)) == schema
    assert references(schema) == []
    properties = schema["properties"]
    assert properties["guidance_scale"]["default"] == endpoint.guidance_scale
    assert ("loras" in properties) == endpoint.takes_loras
    assert ("image_size" in properties) == issubclass(endpoint.request, Txt2ImgRequest)
    needed = {"prompt", "image_url"} if "image_url" in properties else {"prompt"}
    assert set(schema["required"]) == needed
    given = {"prompt": "x", "image_url": "https://x.org/a.png"}
    for name, field in properties.items():
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound in field:
                endpoint.parse({**given, name: field[bound]})
                answer(endpoint, {**given, name: field[bound] + beyond})
    assert properties["num_images"] == {
        **properties["num_images"],
        "type": "integer",
        "minimum": 1,
        "maximum": 4,
        "default": 1,
    }


def test_a_request_for_loras_is_drawn_as_any_other(krea: Krea) -> None:
    size = {"width": 64, "height": 64}
    arguments = {"prompt": "a fox", "image_size": size, "num_inference_steps": 2, "seed": 1}
    drawn = krea.run(LORA.parse({**arguments, "guidance_scale": 0.5}))
    assert drawn.images[0].size == (64, 64)
    assert set(drawn.timings) == {"text", "denoise", "decode", "safety", "total"}
    same = krea.run(KREA.parse({**arguments, "guidance_scale": 3.5}))
    again = krea.run(LORA.parse(arguments))
    assert again.images[0].tobytes() == same.images[0].tobytes()
