"""OpenAI's images API, spoken by its own package."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import Server

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")


TWO_STEPS = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="local", max_retries=0) as client:
        yield client


def png(size: tuple[int, int] = (96, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_comes_as_a_url_or_inline(client: Any) -> None:
    asked = {"prompt": "a fox", "size": "128x128", "extra_body": TWO_STEPS}
    by_url = client.images.generate(model="krea", response_format="url", **asked)
    inline = client.images.generate(response_format="b64_json", **asked)
    data = httpx.get(by_url.data[0].url).content
    assert base64.b64decode(inline.data[0].b64_json) == data
    drawn = Image.open(io.BytesIO(data))
    assert (drawn.format, drawn.size) == ("PNG", (128, 128))
    assert by_url.size == "128x128"
    assert by_url.output_format == "png"
    assert by_url.created > 0


def test_several_pictures_of_a_named_endpoint(client: Any) -> None:
    answer = client.images.generate(
        model="fal-ai/flux/krea",
        prompt="a fox",
        n=2,
        size="128x64",
        output_format="jpeg",
        quality="high",
        extra_body=TWO_STEPS,
    )
    pictures = [Image.open(io.BytesIO(httpx.get(one.url).content)) for one in answer.data]
    assert [(one.format, one.size) for one in pictures] == [("JPEG", (128, 64))] * 2


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 5}, "num_images"),
        ({"n": 0}, "num_images"),
        ({"size": "wide"}, "size"),
        ({"size": "99999x1"}, "image_size.width"),
        ({"response_format": "png"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
        ({"stream": True}, "stream"),
        ({"prompt": None}, "prompt"),
        ({"extra_body": {"num_inference_steps": 99}}, "num_inference_steps"),
    ],
)
def test_a_wrong_argument_is_named_in_openais_shape(
    client: Any, wrong: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(**{"prompt": "a fox", **wrong})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.param == param


def test_a_model_that_is_not_here_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.images.generate(model="dall-e-3", prompt="a fox")
    assert raised.value.code == "model_not_found"
    assert "krea" in str(raised.value)


def test_models_are_listed(client: Any) -> None:
    names = [one.id for one in client.models.list()]
    assert names[:2] == ["krea", "fal-ai/flux/krea"]
    assert "fal-ai/flux/dev" not in names
    assert client.models.retrieve("fal-ai/flux/krea").owned_by == "krea-local"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_picture_is_edited(client: Any) -> None:
    answer = client.images.edit(
        model="krea",
        image=("a.png", png(), "image/png"),
        prompt="a fox",
        response_format="b64_json",
        extra_body={"num_inference_steps": 10, "strength": 0.3, "seed": 1},
    )
    drawn = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert drawn.size == (96, 64)
    listed = client.images.edit(image=[png()], prompt="x", extra_body={"num_inference_steps": 10})
    assert listed.data[0].url


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"mask": png()}, "mask"),
        ({"size": "1024x1024"}, "size"),
        ({"image": [png(), png()]}, "image"),
        ({"image": b"no image"}, "image_url"),
        ({"n": 9}, "num_images"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(client: Any, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.edit(**{"image": png(), "prompt": "x", **wrong})
    assert raised.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b"--x\r\n\r\n\r\n--x--",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--\r\n",
    ],
)
def test_a_form_that_is_none_is_refused(server: Server, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{server.url}/v1/images/edits", content=body, headers=headers)
    assert answer.status_code == 400
    headers = {"content-type": "multipart/form-data"}
    answer = httpx.post(f"{server.url}/v1/images/edits", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
