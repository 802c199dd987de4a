"""Images in: from a path, URL, data URI, bytes or PIL image to clean RGB. Pixels to images.

Every limit on input images is here: 50 MiB of file, 32 megapixels judged from the header before
anything is decoded, known formats only. Knows nothing of requests, models or output files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import time
import urllib.parse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from krea_local.errors import InvalidImage

if TYPE_CHECKING:
    from torch import Tensor

    from krea_local.schema import ImageSource

MAX_FILE_BYTES = 50 * 2**20  # the hosted service's own cap
MAX_DECODED_PIXELS = 32_000_000  # Pillow's default lets a 20 KB file of 169 megapixels through
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FETCH_SECONDS = 30.0
MAX_REDIRECTS = 5


@dataclass(frozen=True)
class InputImage:
    """An input image, ready to be resized and encoded.

    Attributes:
        image: RGB, upright, 8 bits a channel.
        name: file name or URL without query, "" when it came as bytes; goes into the recipe.
        sha256: of the size and RGB pixels, whatever file format held them.
        notices: what was done to the image that its owner may not expect.
    """

    image: Image.Image
    name: str
    sha256: str
    notices: tuple[str, ...]


def open_image(source: ImageSource) -> InputImage:
    """Read an image from wherever it is.

    EXIF rotation is applied, transparency is laid on white, the first frame of an animation is
    taken, 16-bit grey is scaled to 8, CMYK and palettes become RGB.

    Raises:
        InvalidImage: not there, too slow, over 50 MiB, over 32 megapixels, or not an image.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, name="", origin="image_url (PIL image)")
    if isinstance(source, bytes):
        return _decode(source, name="", origin="image_url (bytes)")
    text = os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    scheme = text.split(":", 1)[0].lower() if ":" in text else ""
    if scheme == "data":
        return _decode(_data_uri(text), name="", origin="image_url (data URI)")
    if scheme in ("http", "https"):
        name = _public_name(text)
        return _decode(_fetch(text, name), name=name, origin=f"image_url {name}")
    if scheme == "file":
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    return _decode(_read_file(Path(text)), name=Path(text).name, origin=f"image_url {text!r}")


def resize(image: Image.Image, *, width: int, height: int) -> Image.Image:
    """`image` at exactly this size, by Lanczos; untouched when it already has it."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def image_to_pixels(image: Image.Image) -> Tensor:
    """RGB image → float32 pixels [1, 3, H, W] in [-1, 1], on the CPU."""
    import numpy as np
    import torch

    channels_last = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W, 3]
    return channels_last.permute(2, 0, 1)[None].float() / 127.5 - 1


def pixels_to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1], any dtype and device → RGB images.

    Rounds to 8 bits on the device, so that a quarter of the float32 bytes cross to the CPU.
    """
    import torch

    bytes_ = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(one) for one in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


def _read_file(path: Path) -> bytes:
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidImage(f"image_url: cannot read {str(path)!r}: {reason}") from error
    except ValueError as error:  # a NUL in the name
        raise InvalidImage(f"image_url: {str(path)!r} is not a path: {error}") from error
    return data


def _data_uri(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise InvalidImage("image_url: a data URI needs a comma before its data")
    if len(payload) > MAX_FILE_BYTES * 4 // 3 + 4:
        raise InvalidImage(f"image_url: the data URI is over {MAX_FILE_BYTES // 2**20} MiB")
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode(urllib.parse.unquote(payload), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"image_url: the data URI is not valid base64: {error}") from error


def _public_name(url: str) -> str:
    """A URL without what may be secret: credentials, query."""
    try:
        parts = urllib.parse.urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"[:200]
    except ValueError as error:
        raise InvalidImage(f"image_url: {url[:200]!r} is not a URL: {error}") from error


def _fetch(url: str, shown: str) -> bytes:
    import httpx

    deadline = time.monotonic() + FETCH_SECONDS
    data = bytearray()
    try:
        with (
            httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=10) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_FILE_BYTES:
                    raise InvalidImage(
                        f"image_url: {shown} is over {MAX_FILE_BYTES // 2**20} MiB, the limit"
                    )
                if time.monotonic() > deadline:
                    raise InvalidImage(
                        f"image_url: {shown} took over {FETCH_SECONDS:g} s to arrive: "
                        "download it and pass the file"
                    )
    except httpx.HTTPStatusError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        raise InvalidImage(f"image_url: {shown} answered {status}") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        reason = str(error) or type(error).__name__
        raise InvalidImage(f"image_url: could not load {shown}: {reason}") from error
    return bytes(data)


def _decode(data: bytes, *, name: str, origin: str) -> InputImage:
    if len(data) > MAX_FILE_BYTES:
        raise InvalidImage(f"{origin}: is over {MAX_FILE_BYTES // 2**20} MiB, the limit")
    if not data:
        raise InvalidImage(f"{origin}: is empty")
    with warnings.catch_warnings():
        # Pillow warns of large images; our own limit is lower. It also warns of odd metadata.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(image, origin)
                return _upright_rgb(image, name=name, origin=origin)
        except UnidentifiedImageError as error:
            known = ", ".join(FORMATS)
            raise InvalidImage(f"{origin}: is not an image ({known} are read)") from error
        except Image.DecompressionBombError as error:
            raise InvalidImage(f"{origin}: {error}") from error


def _check_pixels(image: Image.Image, origin: str) -> None:
    if not image.width * image.height:
        raise InvalidImage(f"{origin}: has no pixels")
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise InvalidImage(
            f"{origin}: is {image.width}x{image.height}, over {MAX_DECODED_PIXELS // 10**6} "
            "megapixels: make it smaller first"
        )


def _upright_rgb(image: Image.Image, *, name: str, origin: str) -> InputImage:
    _check_pixels(image, origin)
    notices = []
    try:
        frames = getattr(image, "n_frames", 1)
        # A JPEG with several frames is a camera's preview (MPO), not an animation.
        if frames > 1 and image.format != "MPO":
            notices.append(f"{origin} has {frames} frames: the first is used")
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb = _to_rgb(upright)
    except MemoryError as error:
        raise InvalidImage(f"{origin}: does not fit into memory") from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, IndexError … on
        # damaged files; to the caller all of them mean the same.
        raise InvalidImage(f"{origin}: cannot be decoded: {error}") from error
    if _is_transparent(upright):
        notices.append(f"{origin} is transparent: it was laid on white")
    digest = hashlib.sha256(b"%dx%d" % rgb.size + rgb.tobytes()).hexdigest()
    return InputImage(image=rgb, name=name, sha256=digest, notices=tuple(notices))


def _is_transparent(image: Image.Image) -> bool:
    if "transparency" in image.info:
        return True
    bands = image.getbands()
    return ("A" in bands or "a" in bands) and image.convert("RGBA").getchannel(
        "A"
    ).getextrema() != (255, 255)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_to_rgb(image)
    if _is_transparent(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey; Pillow's own conversion clips them to white."""
    import numpy as np

    grey = np.asarray(image).astype(np.float64)
    if image.mode == "F" and grey.size and np.nanmax(grey) <= 1:
        grey = grey * 65535
    if image.mode == "I" and grey.size and grey.max() > 65535:
        grey = grey / 65536
    eight_bits = np.nan_to_num(grey / 257).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(eight_bits).convert("RGB")
