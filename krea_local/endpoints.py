"""The hosted API's endpoints: what each takes, and how errors read as its HTTP answers.

`fal-ai/flux/krea` and its siblings of the same architecture. Shared by the in-process client and
the server. Knows nothing of sockets, queues or models.

Source: the service's published OpenAPI schemas and the official clients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from krea_local.errors import (
    Cancelled,
    InvalidImage,
    InvalidRequest,
    KreaError,
    UnknownEndpoint,
)
from krea_local.schema import Img2ImgRequest, Txt2ImgRequest

Request = Txt2ImgRequest | Img2ImgRequest
ModelAlias = Literal["krea", "dev", "srpo"]
MAX_PROMPT_CHARACTERS = 10_000
IMAGE_TO_IMAGE = "/image-to-image"
STREAM = "/stream"
TOLD_CHARACTERS = 1000  # of a value, in an error
TOLD_ITEMS = 50
NOT_THERE = ("redux", "inpainting", "finetuned", "fill", "ultra")
"""Siblings of the hosted service that need other weights or inputs than this library has."""


class LoraRequest(Txt2ImgRequest):
    """Text to image with LoRAs: the parameters of `fal-ai/flux-krea-lora`."""

    guidance_scale: float = Field(
        3.5, ge=0, le=35, allow_inf_nan=False, description="How strongly the prompt steers."
    )


@dataclass(frozen=True)
class Endpoint:
    """One endpoint of the hosted API.

    Attributes:
        id: as clients name it, "fal-ai/flux/krea".
        request: what it takes.
        model: whose weights it draws with.
        guidance_scale: its default.
        takes_loras: whether `loras` counts; elsewhere the hosted API ignores it, as all it does not
            know.
    """

    id: str
    request: type[Request]
    model: ModelAlias
    guidance_scale: float
    takes_loras: bool = field(default=False)

    @property
    def app(self) -> str:
        """Owner and alias, as the URLs of queued requests have them: "fal-ai/flux"."""
        return "/".join(self.id.split("/")[:2])

    def parse(self, arguments: Mapping[str, object], *, wire: bool = True) -> Request:
        """Validate the arguments of a call, with this endpoint's own defaults.

        Unknown names are ignored and numbers may be strings, as with the hosted API.

        Args:
            arguments: the call's JSON object.
            wire: they came over the network: no local path is taken for an image or a LoRA, no
                prompt over `MAX_PROMPT_CHARACTERS`. Else paths, bytes and PIL images are fine.

        Raises:
            InvalidRequest: names every offending parameter, its value and the rule.
        """
        if not isinstance(arguments, Mapping):
            raise _invalid(
                (), arguments, "model_attributes_type", "Input should be a valid dictionary"
            )
        known = {name: value for name, value in arguments.items() if isinstance(name, str)}
        if not self.takes_loras:
            known.pop("loras", None)
        request = self.request.parse(known, wire=True, local=not wire)
        if wire and len(request.prompt) > MAX_PROMPT_CHARACTERS:
            raise _invalid(
                ("prompt",),
                request.prompt,
                "string_too_long",
                f"String should have at most {MAX_PROMPT_CHARACTERS} characters",
                {"max_length": MAX_PROMPT_CHARACTERS},
            )
        if "guidance_scale" in request.model_fields_set:
            return request
        return request.model_copy(update={"guidance_scale": self.guidance_scale})

    def schema(self) -> dict[str, object]:
        """JSON schema of the arguments over the network; refers to nothing outside itself."""
        schema = self.request.model_json_schema()
        properties = schema["properties"]
        properties["guidance_scale"]["default"] = self.guidance_scale
        properties["prompt"]["maxLength"] = MAX_PROMPT_CHARACTERS
        # Pydantic leaves bounds inside a union in its own words.
        seed = properties["seed"]["anyOf"][0]
        seed["minimum"], seed["maximum"] = seed.pop("ge"), seed.pop("le")
        if not self.takes_loras:
            del properties["loras"]
        inlined = _inlined(schema, schema.pop("$defs", {}))
        assert isinstance(inlined, dict)
        return {**inlined, "title": self.id}


def _invalid(
    loc: tuple[str, ...],
    given: object,
    kind: str,
    rule: str,
    context: Mapping[str, object] = MappingProxyType({}),
) -> InvalidRequest:
    fault = {"loc": loc, "msg": rule, "type": kind, "input": given}
    if context:
        fault["ctx"] = context
    return InvalidRequest(f"{'.'.join(loc) or 'arguments'}: {rule}", [fault])


def _inlined(part: object, definitions: Mapping[str, object]) -> object:
    """`part` of a schema with what it refers to in place; unknown names are allowed."""
    if isinstance(part, list):
        return [_inlined(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {
        name: _inlined(one, definitions)
        for name, one in part.items()
        if name != "additionalProperties"
    }


def _both(name: str, model: ModelAlias, guidance_scale: float) -> tuple[Endpoint, Endpoint]:
    return (
        Endpoint(name, Txt2ImgRequest, model, guidance_scale),
        Endpoint(name + IMAGE_TO_IMAGE, Img2ImgRequest, model, guidance_scale),
    )


ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        endpoint.id: endpoint
        for endpoint in (
            *_both("fal-ai/flux/krea", "krea", 4.5),
            *_both("fal-ai/flux-1/krea", "krea", 4.5),
            *_both("fal-ai/flux/dev", "dev", 3.5),
            *_both("fal-ai/flux-1/dev", "dev", 3.5),
            *_both("fal-ai/flux/srpo", "srpo", 4.5),
            *_both("fal-ai/flux-1/srpo", "srpo", 4.5),
            Endpoint("fal-ai/flux-krea-lora", LoraRequest, "krea", 3.5, takes_loras=True),
        )
    }
)


def find_endpoint(name: str) -> Endpoint:
    """The endpoint of that id, slashes around it aside.

    Raises:
        UnknownEndpoint: there is none; says which there are.
    """
    endpoint = ENDPOINTS.get(name.strip("/"))
    if endpoint is None:
        if any(part in NOT_THERE for part in name.split("/")):
            raise UnknownEndpoint(f"{name[:200]!r} needs other weights or inputs than are here")
        known = ", ".join(ENDPOINTS)
        raise UnknownEndpoint(f"no endpoint {name[:200]!r} here; there are {known}")
    return endpoint


@dataclass(frozen=True)
class HttpError:
    """An error as the hosted API answers it.

    Attributes:
        status: of HTTP.
        error_type: goes into the header `X-Fal-Error-Type`; None for faults of the arguments, which
            the API answers without one.
        body: the JSON object, whose `detail` is a text or a list of faults.
    """

    status: int
    error_type: str | None
    body: Mapping[str, object]

    @property
    def headers(self) -> dict[str, str]:
        """The headers that tell official clients what kind of error it is."""
        if self.error_type is None:
            return {}
        told = {"X-Fal-Error-Type": self.error_type}
        if self.error_type == "request_timeout":
            # Clients try a 504 again unless this says that the caller's own limit was up.
            told["X-Fal-Request-Timeout-Type"] = "user"
        return told


NOT_STARTED_IN_TIME = HttpError(
    504,
    "request_timeout",
    MappingProxyType(
        {
            "detail": "Request timed out before it was started",
            "error_type": "request_timeout",
        }
    ),
)
"""What a request is answered that waited longer than its `X-Fal-Request-Timeout`."""


def http_error(error: BaseException) -> HttpError:
    """What the hosted API would answer for `error`.

    Out of memory and failed loads are 500, not 503: the JavaScript client submits a job four times
    over on 503.
    """
    if isinstance(error, InvalidImage):
        told = _text(str(error))
        fault = {"loc": ["body", "image_url"], "msg": told, "type": "image_load_error"}
        return HttpError(422, None, {"detail": [fault]})
    if isinstance(error, InvalidRequest):
        faults = [_fault(one) for one in error.errors] or [
            {"loc": ["body"], "msg": _text(str(error)), "type": "value_error"}
        ]
        return HttpError(422, None, {"detail": faults})
    if isinstance(error, UnknownEndpoint):
        kind = "not_found"
        return HttpError(404, kind, {"detail": _text(str(error)), "error_type": kind})
    if isinstance(error, Cancelled):
        kind = "client_cancelled"
        return HttpError(499, kind, {"detail": "Request was cancelled", "error_type": kind})
    # What is no error of ours may tell of the machine: its text stays in the log.
    text = str(error) if isinstance(error, KreaError) else "internal error: the log has it"
    kind = "internal_error"
    return HttpError(500, kind, {"detail": _text(text), "error_type": kind})


def _fault(fault: Mapping[str, object]) -> dict[str, object]:
    """One fault as pydantic's web frameworks put it: under "body", without what is not JSON."""
    loc = fault.get("loc", ())
    assert isinstance(loc, (tuple, list))
    places = loc[1:] if loc[:1] in (["body"], ("body",)) else loc
    told: dict[str, object] = {
        "loc": ["body", *map(_told, places)],
        "msg": _text(str(fault["msg"])),
        "type": fault["type"],
    }
    for name in ("ctx", "input"):
        if name in fault and not (name == "ctx" and not fault["ctx"]):
            told[name] = _told(fault[name])
    return told


def _told(value: object, depth: int = 3) -> object:
    """`value` as JSON that every reader takes: without NaN, huge numbers, bytes, endless nesting.

    Long texts and lists are cut: an input image may have come in the arguments.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):  # beyond some digits Python itself refuses to print them
        bits = value.bit_length()
        return int(value) if bits <= 1024 else f"an integer of {bits} bits"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping) and depth:
        return {
            _text(str(name)): _told(one, depth - 1)
            for name, one in itertools.islice(value.items(), TOLD_ITEMS)
            if isinstance(name, (str, int))
        }
    if isinstance(value, (list, tuple)) and depth:
        return [_told(one, depth - 1) for one in value[:TOLD_ITEMS]]
    return f"({type(value).__name__})"


def _text(value: str) -> str:
    """`value` without surrogates, which UTF-8 has no bytes for, and cut where it is long."""
    cut = value if len(value) <= TOLD_CHARACTERS else value[:TOLD_CHARACTERS] + "…"
    return cut.encode("utf-8", "replace").decode()
