"""What may be asked: the hosted API's parameters, their bounds, defaults and help.

The only place that judges user input. `Txt2ImgRequest` and `Img2ImgRequest` mirror
`fal-ai/flux/krea` and `fal-ai/flux/krea/image-to-image`; command-line flags, JSON schema and the
README's table derive from the fields here. Knows nothing of models, files or how pictures are made.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import reprlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from operator import index
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import Self

from krea_local.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image
    from pydantic.fields import FieldInfo

Acceleration = Literal["none", "regular", "high"]
OutputFormat = Literal["jpeg", "png"]
ImageSizePreset = Literal[
    "square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"
]

PRESETS: Mapping[ImageSizePreset, tuple[int, int]] = MappingProxyType(
    {
        "square_hd": (1024, 1024),
        "square": (512, 512),
        "portrait_4_3": (768, 1024),
        "portrait_16_9": (576, 1024),
        "landscape_4_3": (1024, 768),
        "landscape_16_9": (1024, 576),
    }
)
"""(width, height) of each `image_size` preset, in pixels."""

SIZE_MULTIPLE = 16  # 8x by FLUX.1's VAE, 2x by packing latents two by two
MIN_SIDE = 64
MAX_SIDE = 14142
MAX_PIXELS = 2048 * 2048  # the hosted API's "up to 4 megapixels"
MAX_INPUT_PIXELS = 1440 * 1440  # img2img degrades above about 1440 px a side: replicate/cog-flux#74
MODEL_DEFAULTS = ("guidance_scale", "acceleration")  # fields whose default the loaded model knows
RANDOM_SEEDS = 2**32  # JavaScript corrupts integers above 2^53; the hosted uint64 seeds are


def fit_size(
    *, width: int, height: int, multiple: int = SIZE_MULTIPLE, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The (width, height) nearest to what is asked that the model can make.

    Both are multiples of `multiple`, no side is below 64, and the area is at most `max_pixels`;
    a larger area is scaled down at the same aspect as nearly as the grid allows.
    """
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    floor = max(MIN_SIDE, multiple)
    sides = [
        max(floor, (round(side * scale) + multiple // 2) // multiple * multiple)
        for side in (width, height)
    ]
    while sides[0] * sides[1] > max_pixels:
        longer = 0 if sides[0] >= sides[1] else 1
        sides[longer] -= multiple
    return sides[0], sides[1]


def fit_input_size(
    *, width: int, height: int, multiple: int = SIZE_MULTIPLE
) -> tuple[int, int] | None:
    """The (width, height) at which an input image of this size is redrawn, or None if none fits.

    Keeps the aspect: small images grow until no side is below 64, large ones shrink to about
    2.07 megapixels (1440 x 1440). None when both cannot hold, for strips longer than about 1:500.
    """
    grow = max(1.0, MIN_SIDE / min(width, height))
    if width * height * grow * grow > MAX_INPUT_PIXELS and grow > 1.0:
        return None
    scale = min(grow, math.sqrt(MAX_INPUT_PIXELS / (width * height)))
    floor = max(MIN_SIDE, multiple)

    def sides(length: int) -> set[int]:
        below = int(length * scale) // multiple * multiple
        return {max(floor, below), max(floor, below + multiple)}

    def stretch(size: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(math.log(size[0] / size[1] * height / width))
        return round(aspect, 3), abs(math.log(size[0] * size[1] / (width * height * scale**2)))

    sizes = [
        (across, down)
        for across in sides(width)
        for down in sides(height)
        if across * down <= MAX_INPUT_PIXELS
    ]
    if not sizes or stretch(min(sizes, key=stretch))[0] > math.log(1.5):
        return None
    if (width, height) in sizes:
        return width, height
    return min(sizes, key=stretch)


def _integer(value: object) -> object:
    """Let numpy's integers pass as int; leave everything else to pydantic's strict check."""
    if isinstance(value, (bool, float)) or not hasattr(value, "__index__"):
        return value
    try:
        return index(value)
    except TypeError:  # an array of several
        return value


Int = Annotated[int, BeforeValidator(_integer)]


class ImageSize(BaseModel):
    """A size in pixels; an omitted side is 512, as in the hosted API."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    width: Int = Field(512, ge=MIN_SIDE, le=MAX_SIDE, description="Width in pixels.")
    height: Int = Field(512, ge=MIN_SIDE, le=MAX_SIDE, description="Height in pixels.")

    @model_validator(mode="after")
    def _at_most_four_megapixels(self) -> Self:
        across, down = (max(MIN_SIDE, (side + 8) // 16 * 16) for side in (self.width, self.height))
        if across * down > MAX_PIXELS:
            nearest = fit_size(width=self.width, height=self.height)
            raise ValueError(
                f"{self.width}x{self.height} is {self.width * self.height / 1e6:.1f} megapixels, "
                f"more than {MAX_PIXELS:,} pixels: the nearest that fits is "
                f"{nearest[0]}x{nearest[1]}"
            )
        return self


def _unicode(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode at character {error.start}") from None
    return value


def _image_source(value: object, info: ValidationInfo) -> object:
    from_wire = bool(info.context and info.context.get("wire"))
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty: give a path, a URL or a data URI")
        # A path in a request from the network would read the server's own files.
        if from_wire and not value.startswith(("http://", "https://", "data:")):
            raise ValueError("must be an http(s) URL or a data URI")
        return value
    is_pil_image = hasattr(value, "getexif") and hasattr(value, "convert")
    if not from_wire and (isinstance(value, (bytes, os.PathLike)) or is_pil_image):
        return value
    raise ValueError(
        f"is a {type(value).__name__}: give a path, a URL, a data URI, bytes or a PIL image"
    )


def _lora_path(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("should be a file, a hub id or a URL")
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("should be a file, a hub id or a URL")
    if info.context and info.context.get("wire") and not text.startswith(("http://", "https://")):
        # A path in a request from the network would read the server's own files.
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", text):
            raise ValueError("must be a hub id or an http(s) URL")
        owner, name, *file = text.split("/", 2)
        page = f"https://huggingface.co/{owner}/{name}"
        return f"{page}/resolve/main/{file[0]}" if file else page
    return text


class Lora(BaseModel):
    """A LoRA and how strongly it counts."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: Annotated[str, BeforeValidator(_lora_path)] = Field(
        description="A .safetensors file, a hub id (owner/name) or an http(s) URL."
    )
    scale: float = Field(
        1.0, ge=0, le=4, allow_inf_nan=False, description="1 as it was trained, 0 for nothing."
    )


def _loras(value: object) -> object:
    """A path stands for itself at scale 1, and any sequence will do."""
    if isinstance(value, (str, os.PathLike)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    return tuple({"path": one} if isinstance(one, (str, os.PathLike)) else one for one in value)


if TYPE_CHECKING:
    Loras = Sequence[Lora | Mapping[str, object] | str | os.PathLike[str]]
else:
    Loras = Annotated[tuple[Lora, ...], BeforeValidator(_loras)]

if TYPE_CHECKING:
    ImageSource = str | os.PathLike[str] | bytes | Image
else:
    ImageSource = Annotated[
        object, PlainValidator(_image_source), WithJsonSchema({"type": "string"})
    ]


def _size_kind(value: object) -> str:
    return "custom" if isinstance(value, (Mapping, ImageSize)) else "preset"


ImageSizeField = Annotated[
    Annotated[ImageSizePreset, Tag("preset")] | Annotated[ImageSize, Tag("custom")],
    Discriminator(_size_kind),
]


class _Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True
    )

    prompt: Annotated[str, AfterValidator(_unicode)] = Field(
        description="Text to render; may be empty."
    )
    num_inference_steps: Int = Field(
        28, ge=1, le=50, description="Denoising steps: more is slower and finer."
    )
    seed: Int | None = Field(
        None,
        ge=-(2**63),
        le=2**64 - 1,
        description="Same seed, prompt and version give the same image. Default: drawn at random.",
    )
    guidance_scale: float = Field(
        4.5, ge=1, le=20, allow_inf_nan=False, description="How strongly the prompt steers."
    )
    sync_mode: bool = Field(
        False, description="Return images in the API's JSON as data URIs instead of file URLs."
    )
    num_images: Int = Field(
        1, ge=1, le=4, description="Images per call, drawn with seed, seed+1, …"
    )
    enable_safety_checker: bool = Field(
        True, description="Replace images that the NSFW checker flags by black ones."
    )
    output_format: OutputFormat = Field("jpeg", description="File format of the images.")
    acceleration: Acceleration = Field("none", description="Speed against fidelity.")
    loras: Loras = Field(
        (),
        max_length=8,
        description="LoRAs to add, each a file, hub id or URL, or such a `path` with a `scale` "
        "from 0 to 4.",
    )

    @classmethod
    def parse(
        cls,
        arguments: Mapping[str, object],
        *,
        text: bool = False,
        wire: bool = False,
        local: bool = False,
    ) -> Self:
        """Validate `arguments`, by name.

        Args:
            arguments: parameter names and values.
            text: the values came from a command line: numbers may be strings.
            wire: the arguments came over the network: numbers may be strings, unknown names are
                ignored as the hosted API does, an image must be a URL and never a path.
            local: with `wire`, they are this process's own: paths, bytes and PIL images are fine.

        Raises:
            InvalidRequest: names every offending parameter, its value and the rule.
        """
        try:
            return cls.model_validate(
                dict(arguments),
                strict=not (text or wire),
                extra="ignore" if wire else "forbid",
                context={"wire": wire and not local},
            )
        except ValidationError as error:
            faults = [_plain(dict(fault)) for fault in error.errors(include_url=False)]
            message = "; ".join(_sentence(cls, fault) for fault in faults)
            raise InvalidRequest(message, faults) from error

    @classmethod
    def from_call(cls, arguments: Mapping[str, object]) -> Self:
        """Validate a Python call's arguments; names that are no fields are the caller's own.

        None for one of MODEL_DEFAULTS means the model's default and leaves the field unset.
        """
        return cls.parse(
            {
                name: arguments[name]
                for name in cls.model_fields
                if not (name in MODEL_DEFAULTS and arguments[name] is None)
            }
        )

    def with_seed(self) -> Self:
        """This request with its seed fixed: the one given, or a random one below 2^32."""
        seed = secrets.randbelow(RANDOM_SEEDS) if self.seed is None else self.seed
        return self.model_copy(update={"seed": seed})


class Txt2ImgRequest(_Request):
    """Text to image: the parameters of `fal-ai/flux/krea`."""

    image_size: ImageSizeField = Field(
        "landscape_4_3",
        description="A preset, or width and height: each side 64 or more, 4 megapixels at most.",
    )

    def size(self, multiple: int = SIZE_MULTIPLE) -> tuple[int, int]:
        """(width, height) to draw at: what was asked, rounded to the model's `multiple`."""
        width, height = self.asked_size
        return fit_size(width=width, height=height, multiple=multiple)

    @property
    def asked_size(self) -> tuple[int, int]:
        """(width, height) as asked, before rounding."""
        if isinstance(self.image_size, ImageSize):
            return self.image_size.width, self.image_size.height
        return PRESETS[self.image_size]


class Img2ImgRequest(_Request):
    """Image to image: the parameters of `fal-ai/flux/krea/image-to-image`."""

    image_url: ImageSource = Field(
        description="Image to redraw: a path, http(s) URL or data URI; in Python also bytes or a "
        "PIL image. Its aspect is kept."
    )
    strength: float = Field(
        0.95,
        ge=0.01,
        le=1,
        allow_inf_nan=False,
        description="Share of the steps that run: near 0 keeps the image, 1 ignores it.",
    )
    num_inference_steps: Int = Field(
        40, ge=10, le=50, description="Denoising steps: more is slower and finer."
    )


Function = TypeVar("Function", bound=Callable[..., object])


def documented(request: type[BaseModel]) -> Callable[[Function], Function]:
    """Let a function's docstring end with the parameters of `request`, as its fields tell them."""
    lines = [
        f"    {name}: {field.description}{describe_limits(name, field)}"
        for name, field in request.model_fields.items()
    ]
    lines.append(
        "    on_step: Called with a `Progress` after each piece of work; may raise `Cancelled`."
    )

    def add(function: Function) -> Function:
        own = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = "\n".join([own, "", "Args:", *lines])
        return function

    return add


def describe_limits(name: str, field: FieldInfo) -> str:
    """Range and default of a field, in brackets, or "" if it has neither."""
    ends = [
        getattr(rule, end) for end in ("ge", "le") for rule in field.metadata if hasattr(rule, end)
    ]
    notes = [f"{ends[0]} … {ends[1]}"] if len(ends) == 2 and name != "seed" else []
    if name == "image_size":
        notes.append(", ".join(PRESETS))
    if not field.is_required() and field.default not in (None, ()):
        is_switch = field.annotation is bool
        notes.append(f"default: {('off', 'on')[field.default] if is_switch else field.default}")
    if name == "guidance_scale":
        notes.append("3.5 for FLUX.1 [dev]")
    if name == "acceleration":
        notes.append("or what `load` was given")
    return f" ({'; '.join(notes)})" if notes else ""


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print some
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


def _plain(fault: dict[str, object]) -> dict[str, object]:
    """A fault without what is ours alone: the union's tags, exceptions that JSON cannot hold."""
    loc, context = fault["loc"], fault.get("ctx")
    assert isinstance(loc, tuple)
    fault["loc"] = tuple(part for part in loc if part not in ("preset", "custom"))
    if isinstance(context, dict):
        fault["ctx"] = {name: value for name, value in context.items() if name != "error"}
    return fault


def _sentence(model: type[BaseModel], fault: Mapping[str, object]) -> str:
    """One fault in words: the parameter, its value, the rule."""
    loc = fault["loc"]
    assert isinstance(loc, tuple)
    names = [str(part) for part in loc]
    name = ".".join(names) or "request"
    kind, rule = fault["type"], str(fault["msg"])
    if kind == "missing":
        return f"{name}: is required"
    if kind == "extra_forbidden":
        in_lora = names[0] == "loras"
        fields = list(Lora.model_fields if in_lora else model.model_fields)
        known = fields if in_lora else fields + list(ImageSize.model_fields)
        close = [other for other in known if names[-1] in other]
        close = close or difflib.get_close_matches(names[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields)}"
        return f"{name}: no such parameter; {hint}"
    rule = rule.removeprefix("Value error, ").replace("Input should", "should")
    if kind == "value_error" and names == ["image_size"]:
        return f"{name}: {rule}"
    return f"{name}={_shown(fault.get('input'))}: {rule}"
