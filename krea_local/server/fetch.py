"""Input images: fetched by URL, from public addresses only; and judged before anything draws them.

PNG, JPEG and WebP, 50 MiB and 32 megapixels at most, the latter by the header before anything is
decoded. Knows nothing of jobs or of where images are kept.
"""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from krea_local.errors import InvalidImage
from krea_local.images import (
    FETCH_SECONDS,
    MAX_DECODED_PIXELS,
    MAX_FILE_BYTES,
    MAX_REDIRECTS,
)
from krea_local.server.dialling import Refused, Rules, ask, parse_url
from krea_local.server.files import content_type

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

REDIRECTS = (301, 302, 303, 307, 308)
MOST_WEBP_PIXELS = 12_000_000
"""Decoding WebP takes four copies of 4 bytes a pixel; larger ones are left to the worker."""


class FetchFailed(Exception):
    """An image by URL could not be had; says why, in words for whoever sent the URL."""


async def fetch_image(url: str, rules: Rules) -> bytes:
    """The bytes behind a URL, in 30 s and 50 MiB at the most, over 5 redirects at the most.

    Raises:
        FetchFailed: refused, not there, too slow or too large.
    """
    try:
        return await asyncio.wait_for(_fetch(url, rules), FETCH_SECONDS)
    except asyncio.TimeoutError:
        raise FetchFailed(f"it took over {FETCH_SECONDS:g} s to arrive") from None
    except (Refused, OSError) as error:
        raise FetchFailed(str(error)) from error


async def _fetch(url: str, rules: Rules) -> bytes:
    parsed = parse_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
        async with ask("GET", parsed, rules, headers=headers) as answer:
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                return await _body(answer.status, answer.headers, answer.body)
            parsed = parse_url(answer.headers["location"], str(parsed))
    raise FetchFailed(f"it was redirected more than {MAX_REDIRECTS} times")


async def _body(status: int, headers: Mapping[str, str], pieces: AsyncIterator[bytes]) -> bytes:
    if not 200 <= status < 300:
        raise FetchFailed(f"the server answered {status}")
    # Images are compressed already; what is compressed again may be a bomb.
    if headers.get("content-encoding", "identity") != "identity":
        raise FetchFailed("it arrives compressed")
    data = bytearray()
    async for piece in pieces:
        data += piece
        if len(data) > MAX_FILE_BYTES:
            raise FetchFailed(f"it is over {MAX_FILE_BYTES // 2**20} MiB, the limit")
    return bytes(data)


def check_image(data: bytes) -> tuple[str, int, int]:
    """(content type, width, height) of an image that can be decoded. Blocks; see `ImageCheck`.

    Raises:
        InvalidImage: no PNG, JPEG or WebP, too large, truncated, or not what its header says.
    """
    if len(data) > MAX_FILE_BYTES:
        raise InvalidImage(f"image_url: is over {MAX_FILE_BYTES // 2**20} MiB, the limit")
    kind = content_type(data)
    if kind is None:
        raise InvalidImage("image_url: is not an image (PNG, JPEG, WEBP are read)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of large images and odd metadata
        try:
            with Image.open(io.BytesIO(data), formats=[kind.removeprefix("image/")]) as image:
                return kind, *_decoded_size(image)
        except InvalidImage:
            raise
        except UnidentifiedImageError as error:
            raise InvalidImage("image_url: is not an image (PNG, JPEG, WEBP are read)") from error
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            reason = str(error) or type(error).__name__
            raise InvalidImage(f"image_url: cannot be decoded: {reason}") from error


def _decoded_size(image: ImageFile) -> tuple[int, int]:
    width, height = image.size
    pixels = width * height
    if not pixels:
        raise InvalidImage("image_url: has no pixels")
    if pixels > MAX_DECODED_PIXELS:
        raise InvalidImage(
            f"image_url: is {width}x{height}, over {MAX_DECODED_PIXELS // 10**6} megapixels: make "
            "it smaller first"
        )
    if image.format == "JPEG":
        # All of the file is read, but an eighth of each side is kept.
        image.draft("RGB", (width // 8 or 1, height // 8 or 1))
    if image.format != "WEBP" or pixels <= MOST_WEBP_PIXELS:
        image.load()
    return width, height


class ImageCheck:
    """`check_image` off the loop, one image at a time, so that memory stays bounded."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def __call__(self, data: bytes) -> tuple[str, int, int]:
        """As `check_image`."""
        async with self._turn:
            return await asyncio.to_thread(check_image, data)
