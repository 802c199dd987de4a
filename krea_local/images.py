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
import stat
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from krea_local.background import TooSlow, wait_for
from krea_local.errors import InvalidImage, InvalidRequest
from krea_local.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor

    from krea_local.schema import ImageSource

MAX_FILE_BYTES = 50 * 2**20  # the hosted service's own cap
MAX_DECODED_PIXELS = 32_000_000  # Pillow's default lets a 20 KB file of 169 megapixels through
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
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


def open_image(
    source: ImageSource,
    *,
    formats: tuple[str, ...] = FORMATS,
    check: Callable[[], None] = lambda: None,
) -> InputImage:
    """Read an image from wherever it is.

    EXIF rotation is applied, transparency is laid on white, the first frame of an animation is
    taken, 16-bit grey is scaled to 8, CMYK and palettes become RGB.

    Args:
        source: where it is, or what.
        formats: those of FORMATS that are read; of bytes only, all else knows FORMATS.
        check: called while one is fetched; what it raises ends that.

    Raises:
        InvalidImage: not there, too slow, over 50 MiB, over 32 megapixels, or not an image.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, name="", origin="image_url (PIL image)")
    if isinstance(source, bytes):
        return _decode(source, name="", origin="image_url (bytes)", formats=formats)
    text = os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    scheme = text.split(":", 1)[0].lower() if ":" in text else ""
    if scheme == "data":
        return _decode(read_data_uri(text), name="", origin="image_url (data URI)")
    if scheme in ("http", "https"):
        name = _public_name(text)
        return _decode(_fetch(text, name, check), name=name, origin=f"image_url {name}")
    if scheme == "file":
        _public_name(text)
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
    return [Image.fromarray(one) for one in bytes_.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def _read_file(path: Path) -> bytes:
    try:
        path = expanded(path)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe or device may never end
            raise InvalidImage(f"image_url: {str(path)!r} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidImage(f"image_url: cannot read {str(path)!r}: {reason}") from error
    except InvalidRequest as error:
        raise InvalidImage(f"image_url: {error}") from error
    return data


def read_data_uri(uri: str) -> bytes:
    """The bytes that a data URI carries.

    Raises:
        InvalidImage: it is none, or holds more than 50 MiB.
    """
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
        raise InvalidImage(f"image_url: is not a URL: {error}") from error


def _fetch(url: str, shown: str, check: Callable[[], None]) -> bytes:
    """The bytes behind a URL, in FETCH_SECONDS at the most.

    A thread of its own fetches, because no timeout of an HTTP client bounds the whole of an
    answer: a server may send its headers, too, a byte at a time.
    """

    def work(_: threading.Event) -> bytes:
        try:
            return _download(url, shown)
        except InvalidImage:
            raise
        # httpx's own errors, and what bad proxy and certificate variables raise before it starts.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise InvalidImage(f"image_url: could not load {shown}: {reason}") from error

    try:
        return wait_for(work, check=check, seconds=FETCH_SECONDS)
    except TooSlow:
        raise InvalidImage(
            f"image_url: {shown} took over {FETCH_SECONDS:g} s to arrive: download it and pass the "
            "file"
        ) from None


def _download(url: str, shown: str) -> bytes:
    import httpx

    deadline = time.monotonic() + FETCH_SECONDS
    data = bytearray()
    with (
        httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=10) as client,
        # Images are compressed already; what is compressed again may be a bomb.
        client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
    ):
        if not response.is_success:
            status = f"{response.status_code} {response.reason_phrase}"
            raise InvalidImage(f"image_url: {shown} answered {status}")
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise InvalidImage(f"image_url: {shown} arrives compressed ({coding[:40]}): not read")
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > MAX_FILE_BYTES:
                raise InvalidImage(
                    f"image_url: {shown} is over {MAX_FILE_BYTES // 2**20} MiB, the limit"
                )
            if time.monotonic() > deadline:
                break  # nobody waits any more
    return bytes(data)


def _decode(
    data: bytes, *, name: str, origin: str, formats: tuple[str, ...] = FORMATS
) -> InputImage:
    if len(data) > MAX_FILE_BYTES:
        raise InvalidImage(f"{origin}: is over {MAX_FILE_BYTES // 2**20} MiB, the limit")
    if not data:
        raise InvalidImage(f"{origin}: is empty")
    with warnings.catch_warnings():
        # Pillow warns of large images; our own limit is lower. It also warns of odd metadata.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check_pixels(image, origin)
                return _upright_rgb(image, name=name, origin=origin)
        except InvalidImage:
            raise
        except UnidentifiedImageError as error:
            known = ", ".join(formats)
            raise InvalidImage(f"{origin}: is not an image ({known} are read)") from error
        except Exception as error:
            raise _undecodable(origin, error) from error


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
        # Not of TIFF, where counting can take minutes, nor of JPEG, where it is a camera's preview.
        frames = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        if frames > 1 and image.tell() == 0:
            notices.append(f"{origin} has {frames} frames: the first is used")
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb = _to_rgb(upright)
        if _is_transparent(upright):
            notices.append(f"{origin} is transparent: it was laid on white")
    except Exception as error:
        raise _undecodable(origin, error) from error
    digest = hashlib.sha256(b"%dx%d" % rgb.size + rgb.tobytes()).hexdigest()
    return InputImage(image=rgb, name=name, sha256=digest, notices=tuple(notices))


def _undecodable(origin: str, error: Exception) -> InvalidImage:
    # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, RuntimeError … on
    # damaged files; to the caller all of them mean the same.
    return InvalidImage(f"{origin}: cannot be decoded: {str(error) or type(error).__name__}")


def _is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is; having an alpha channel, or a transparent colour unused, is not."""
    may_be = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if not may_be or _is_deep(image):
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _is_deep(image: Image.Image) -> bool:
    """Grey of more than 8 bits, or of floats."""
    return image.mode.startswith(("I", "F"))


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return _grey_to_rgb(image)
    if _is_transparent(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey, which Pillow's own conversion clips to white.

    16-bit files say so; for the others the largest value tells whether white is 1, 255, 65535 or
    2^32 - 1.
    """
    import numpy as np

    grey = np.nan_to_num(np.asarray(image).astype(np.float64))
    largest = float(grey.max())
    if image.mode.startswith("I;16"):
        white = 65535
    else:
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((one for one in whites if largest <= one), 2**32 - 1)
    eight_bits = (grey * 255 / white).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(eight_bits).convert("RGB")
