"""FLUX.1 Krea [dev] on one's own GPU, with the hosted API's parameters.

    import krea_local
    result = krea_local.txt2img("a red fox in fresh snow", image_size="landscape_4_3", seed=7)
    result.images[0].save("fox.png")

Importing this loads no torch; the first `load` or call does.
"""

from typing import TYPE_CHECKING, Any

from krea_local._version import __version__
from krea_local.api import img2img, load, txt2img
from krea_local.converting import convert
from krea_local.errors import (
    Cancelled,
    DeviceError,
    DeviceUnavailable,
    GenerationFailed,
    InvalidImage,
    InvalidRequest,
    KreaError,
    KreaWarning,
    LicenceRequired,
    OutOfMemory,
    OutputFailed,
    UnknownEndpoint,
    UnsupportedModel,
    WeightsError,
    WeightsInvalid,
    WeightsNotFound,
)
from krea_local.fetching import download
from krea_local.progress import Progress
from krea_local.result import Result
from krea_local.schema import ImageSize, Img2ImgRequest, Txt2ImgRequest
from krea_local.verifying import FileCheck, verify

if TYPE_CHECKING:
    from krea_local.pipeline import Krea

__all__ = [
    "Cancelled",
    "DeviceError",
    "DeviceUnavailable",
    "FileCheck",
    "GenerationFailed",
    "ImageSize",
    "Img2ImgRequest",
    "InvalidImage",
    "InvalidRequest",
    "Krea",
    "KreaError",
    "KreaWarning",
    "LicenceRequired",
    "OutOfMemory",
    "OutputFailed",
    "Progress",
    "Result",
    "Txt2ImgRequest",
    "UnknownEndpoint",
    "UnsupportedModel",
    "WeightsError",
    "WeightsInvalid",
    "WeightsNotFound",
    "__version__",
    "convert",
    "download",
    "img2img",
    "load",
    "txt2img",
    "verify",
]


def __getattr__(name: str) -> Any:
    """`Krea` on first use: its module imports torch."""
    if name == "Krea":
        from krea_local.pipeline import Krea

        return Krea
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
