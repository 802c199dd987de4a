"""Files for requests: as data URIs, or as copies in a folder of this machine.

Nothing leaves the machine. Knows nothing of requests or models.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from krea_local.errors import OutputFailed
from krea_local.recipe import write_atomically
from krea_local.result import default_folder

if TYPE_CHECKING:
    from PIL import Image

UploadRepositoryId = Literal["fal_v3", "cdn", "fal"]
REPOSITORIES = ("fal_v3", "cdn", "fal")


def encode(data: str | bytes, content_type: str) -> str:
    """`data` as a data URI; text as UTF-8."""
    raw = data.encode() if isinstance(data, str) else data
    return f"data:{content_type};base64,{base64.b64encode(raw).decode()}"


def encode_file(path: str | os.PathLike[str]) -> str:
    """The file as a data URI, its type judged by its name."""
    return encode(Path(path).read_bytes(), content_type_of(path))


def encode_image(image: Image.Image, format: str = "jpeg") -> str:
    """A PIL image as a data URI, in the file format that Pillow knows by that name."""
    return encode(image_bytes(image, format), f"image/{format}")


def store(data: str | bytes, content_type: str, file_name: str | None) -> str:
    """Keep a copy of `data` and return its file URI.

    It lies in `uploads` in the folder that KREA_LOCAL_OUTPUT names, else in the user's cache
    folder, under a name of its own; nothing deletes it.

    Raises:
        OutputFailed: the folder or the file cannot be written.
    """
    raw = data.encode() if isinstance(data, str) else data
    folder = default_folder() / "uploads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputFailed(f"cannot make the folder {str(folder)!r}: {reason}") from error
    extension = Path(file_name or "").suffix or mimetypes.guess_extension(content_type) or ".bin"
    # The extension alone is the caller's, and harmless: a suffix holds no separators.
    path = folder / f"{secrets.token_hex(16)}{extension[:16]}"
    write_atomically(raw, path)
    return path.absolute().as_uri()


def content_type_of(path: str | os.PathLike[str]) -> str:
    """The media type that a file's name tells."""
    return mimetypes.guess_type(os.fspath(path))[0] or "application/octet-stream"


def image_bytes(image: Image.Image, format: str) -> bytes:
    """A PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def check_repositories(
    repository: UploadRepositoryId | None,
    fallback: UploadRepositoryId | Sequence[UploadRepositoryId] | None,
) -> None:
    """Refuse what the official client refuses; all else means this machine.

    Raises:
        ValueError: no such repository.
    """
    others = [fallback] if isinstance(fallback, str) else list(fallback or ())
    for name in [repository or "fal_v3", *others]:
        if name not in REPOSITORIES:
            known = ", ".join(REPOSITORIES)
            raise ValueError(f"upload repository {name!r}: should be one of {known}")
        if name == "cdn":
            warnings.warn("upload repository 'cdn' is now 'fal_v3'", DeprecationWarning, 3)
