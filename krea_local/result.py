"""What a call returns: images, flags, seed and timings; as files, or as the hosted API's JSON.

Knows nothing of models or of how pictures are made.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea_local.errors import InvalidRequest, OutputFailed
from krea_local.paths import cache_folder, expanded
from krea_local.recipe import CONTENT_TYPES, GeneratedImage, encode, write_atomically
from krea_local.schema import OutputFormat

OUTPUT_VARIABLE = "KREA_LOCAL_OUTPUT"


@dataclass(frozen=True)
class Result:
    """The pictures of one call, and what is to be known of them.

    Attributes:
        images: PIL images that carry their recipe into any PNG or JPEG they are saved to.
        seed: of the first image, given or drawn; image i has seed + i.
        has_nsfw_concepts: for each image whether the safety checker flagged it; a flagged image is
            black. All False with the checker off.
        timings: seconds by stage: text, encode (image to image), denoise, decode, safety, total;
            0 for a stage that was not wanted.
        prompt: as given.
        notices: what was done that differs from the letter of the request.
        output_format: what `save` and `to_api` encode to.
        sync_mode: whether `to_api` gives data URIs.
    """

    images: tuple[GeneratedImage, ...]
    seed: int
    has_nsfw_concepts: tuple[bool, ...]
    timings: Mapping[str, float]
    prompt: str
    notices: tuple[str, ...] = ()
    output_format: OutputFormat = "jpeg"
    sync_mode: bool = False

    def save(self, folder: str | os.PathLike[str], name: str | None = None) -> list[Path]:
        """Write each image, with its recipe, to a new file in `folder`; nothing is overwritten.

        Args:
            folder: made if it is not there.
            name: start of the file names, by default taken from the prompt; the seed follows, and a
                number where that file exists.

        Returns:
            The files, in the order of `images`. Each is written whole or not at all.

        Raises:
            OutputFailed: the folder or a file cannot be written.
        """
        folder = expanded(folder)
        if name is not None and (name in ("", "..") or Path(name).name != name or "\0" in name):
            raise InvalidRequest(f"name={name!r}: should be a file name without a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputFailed(f"cannot make the folder {str(folder)!r}: {reason}") from error
        stem = _slug(self.prompt) if name is None else name
        return [
            _write_new(encode(image, self.output_format), folder, f"{stem}-{self.seed + i}", self)
            for i, image in enumerate(self.images)
        ]

    def to_api(
        self, *, sync_mode: bool | None = None, folder: str | os.PathLike[str] | None = None
    ) -> dict[str, Any]:
        """This result as the hosted API's JSON object, with its five keys.

        Args:
            sync_mode: images as data URIs instead of file URLs; by default as the request said.
            folder: where the files of the URLs are written; by default the one that the variable
                KREA_LOCAL_OUTPUT names, else `krea_local` in the user's cache folder.

        Raises:
            OutputFailed: a file cannot be written.
        """
        content_type = CONTENT_TYPES[self.output_format]
        if self.sync_mode if sync_mode is None else sync_mode:
            urls = [
                f"data:{content_type};base64,"
                + base64.b64encode(encode(image, self.output_format)).decode()
                for image in self.images
            ]
        else:
            target = default_folder() if folder is None else folder
            urls = [path.absolute().as_uri() for path in self.save(target)]
        return self.with_urls(urls)

    def with_urls(self, urls: Sequence[str]) -> dict[str, Any]:
        """This result as the hosted API's JSON object, its images at `urls`, in their order."""
        content_type = CONTENT_TYPES[self.output_format]
        return {
            "images": [
                {
                    "url": url,
                    "width": image.width,
                    "height": image.height,
                    "content_type": content_type,
                }
                for url, image in zip(urls, self.images, strict=True)
            ],
            "timings": {"inference": self.timings["total"], **self.timings},
            "seed": self.seed,
            "has_nsfw_concepts": list(self.has_nsfw_concepts),
            "prompt": self.prompt,
        }


def default_folder() -> Path:
    """Where files go that nobody named a folder for."""
    named = os.environ.get(OUTPUT_VARIABLE)
    if named:
        return Path(named)
    return cache_folder()


def _write_new(data: bytes, folder: Path, stem: str, result: Result) -> Path:
    extension = result.output_format
    for count in range(1, 10_000):
        suffix = "" if count == 1 else f"-{count}"
        path = folder / f"{stem}{suffix}.{extension}"
        if path.exists():
            continue
        try:
            write_atomically(data, path)
        except FileExistsError:  # another process was faster
            continue
        return path
    raise OutputFailed(f"{str(folder)!r} holds 10,000 pictures named {stem!r}: name another folder")


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()[:200]).strip("-_")
    return words[:48].rstrip("-_") or "image"
