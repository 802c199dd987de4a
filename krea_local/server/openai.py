"""OpenAI's images API, which chat front ends speak: generations, edits, models.

What it has no name for (seed, guidance_scale, strength …) goes by the names of the hosted API, in
the client's `extra_body`. Source: the `openai` package and its API reference.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping

from fastapi import APIRouter, FastAPI
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from krea_local.endpoints import ENDPOINTS, IMAGE_TO_IMAGE, Endpoint
from krea_local.errors import UnknownEndpoint
from krea_local.server import answers, calls
from krea_local.server.answers import Refusal, answer
from krea_local.server.web import Web

# Hints that change nothing of the picture here, or that ask for what it is anyway.
IGNORED = ("quality", "style", "user", "background", "moderation", "output_compression")
REFUSED = ("mask", "stream", "partial_images")
OWN = (*IGNORED, *REFUSED, "model", "prompt", "n", "size", "response_format", "image", "image[]")
MAX_FIELDS = 50
MAX_FIELD_BYTES = 2**18


def add_routes(app: FastAPI, web: Web) -> None:
    """Add OpenAI's paths."""
    router = APIRouter(tags=["openai"], include_in_schema=False)
    began = int(time.time())

    @router.get("/v1/models")
    async def models() -> Response:
        listed = [_model(name, began) for name in _names(web)]
        return answer({"object": "list", "data": listed})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in _names(web):
            raise _no_model(web, name)
        return answer(_model(name, began))

    @router.post("/v1/images/generations")
    async def generations(request: HttpRequest) -> Response:
        asked = await calls.read_object(request)
        endpoint = _endpoint(web, asked, edits=False)
        arguments = _arguments(asked)
        size = asked.get("size")
        if size not in (None, "", "auto"):
            arguments["image_size"] = _size(size)
        elif "image_size" not in arguments:
            arguments["image_size"] = "square_hd"  # OpenAI's own choice for "auto"
        return await _drawn(web, request, endpoint, arguments, asked, None)

    @router.post("/v1/images/edits")
    async def edits(request: HttpRequest) -> Response:
        reading = request.form(max_files=2, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
        async with reading as form:
            asked = {name: value for name, value in form.multi_items() if isinstance(value, str)}
            files = [
                (name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)
            ]
            for name, _ in files:
                if name not in ("image", "image[]"):
                    raise _refuse(name, f"{name} is not supported here")
            if len(files) != 1:
                raise _refuse("image", "should be one file")
            image = await files[0][1].read()
        endpoint = _endpoint(web, asked, edits=True)
        if asked.get("size") not in (None, "", "auto"):
            raise _refuse("size", "should be auto: an edited picture keeps its input's aspect")
        return await _drawn(web, request, endpoint, _arguments(asked), asked, image)

    app.include_router(router)


def _names(web: Web) -> list[str]:
    ids = [one.id for one in ENDPOINTS.values() if one.model == web.service.model]
    return [web.service.model, *ids]


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "krea-local"}


def _no_model(web: Web, name: str) -> Refusal:
    names = ", ".join(_names(web))
    return Refusal(404, f"no model {name[:100]!r} here; there are {names}", "model_not_found")


def _endpoint(web: Web, asked: Mapping[str, object], *, edits: bool) -> Endpoint:
    name = asked.get("model")
    if name in (None, "", web.service.model):
        return calls.endpoint_of_model(web, edits=edits)
    try:
        endpoint = calls.endpoint_here(web, str(name))
    except UnknownEndpoint:
        raise _no_model(web, str(name)) from None
    other = ENDPOINTS.get(endpoint.id + IMAGE_TO_IMAGE if edits else endpoint.id)
    if edits and endpoint.id.endswith(IMAGE_TO_IMAGE):
        return endpoint
    if other is None or (not edits and endpoint.id.endswith(IMAGE_TO_IMAGE)):
        raise _refuse("model", f"{endpoint.id} does not do that")
    return other


def _arguments(asked: Mapping[str, object]) -> dict[str, object]:
    """The call in the hosted API's names; judged by its own schema."""
    for name in REFUSED:
        if asked.get(name) not in (None, False, "", "false"):
            raise _refuse(name, f"{name} is not supported here")
    wanted = asked.get("response_format") or "url"
    if wanted not in ("url", "b64_json"):
        raise _refuse("response_format", "should be url or b64_json")
    arguments = {name: value for name, value in asked.items() if name not in OWN}
    arguments["prompt"] = asked.get("prompt")
    arguments["sync_mode"] = False
    count = asked.get("n")
    if count not in (None, ""):
        arguments["num_images"] = count
    if not arguments.get("output_format"):
        arguments["output_format"] = "png"
    return arguments


def _size(size: object) -> dict[str, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", str(size))
    if match is None:
        raise _refuse("size", 'should be "auto" or such as "1024x1024"')
    return {"width": int(match[1]), "height": int(match[2])}


def _refuse(name: str, text: str) -> Refusal:
    return Refusal(400, [{"loc": ["body", name], "msg": text, "type": "value_error"}])


async def _drawn(
    web: Web,
    request: HttpRequest,
    endpoint: Endpoint,
    arguments: Mapping[str, object],
    asked: Mapping[str, object],
    image: bytes | None,
) -> Response:
    job = await calls.submit(web, request, endpoint, arguments, image=image)
    done = await calls.finished(web, request, job.id)
    if done is None:
        return Response(status_code=499)
    headers = {"x-fal-request-id": job.id, "x-request-id": job.id}
    outcome = done.outcome
    if outcome is None:
        headers["x-should-retry"] = "false"  # OpenAI's client draws twice more otherwise
        return answers.refused(request.url.path, answers.failure_of(done), headers)
    base = answers.base_url(web, request)
    data: list[dict[str, object]] = []
    for picture in outcome.pictures:
        if asked.get("response_format") == "b64_json":
            content = await answers.file_bytes(web, picture.file)
            data.append({"b64_json": base64.b64encode(content).decode()})
        else:
            data.append({"url": answers.file_url(base, picture.file)})
    first = outcome.pictures[0]
    body = {
        "created": int(done.created),
        "data": data,
        "size": f"{first.width}x{first.height}",
        "output_format": done.arguments.get("output_format"),
        "seed": outcome.seed,
        "has_nsfw_concepts": list(outcome.has_nsfw_concepts),
    }
    return answer(body, headers=headers)
