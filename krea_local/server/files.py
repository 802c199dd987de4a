"""The store's files on disk: written whole or not at all, found by an id that nobody can guess.

A file is `<two hex digits>/<id>`; under its temporary name it does not count. Knows nothing of
jobs or of the database that says which files belong to what.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Collection
from pathlib import Path

from krea_local.errors import OutputFailed

_ID = re.compile(r"[0-9a-f]{32}")
_PARTIAL = ".part"


def new_id() -> str:
    """A name for a file, 128 bits of chance."""
    return secrets.token_hex(16)


def content_type(data: bytes) -> str | None:
    """What an image file is by its first bytes; None unless PNG, JPEG or WebP."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def harmless_name(name: str) -> str:
    """A file name without folders, and without what a shell, a browser or a terminal obeys."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w. -]+", "_", name).strip(". ")[:100]


class Files:
    """A folder of files by id.

    Args:
        folder: made if it is not there, for this user alone.

    Raises:
        OutputFailed: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # All at once, so that a new file has one folder to sync, not two.
            for shard in range(256):
                (self.folder / f"{shard:02x}").mkdir(mode=0o700, exist_ok=True)
            _sync_folder(self.folder)
        except OSError as error:
            raise OutputFailed(f"cannot make {str(folder)!r}: {error.strerror}") from error

    def path(self, id: str) -> Path:
        """Where the file of that id is, or would be."""
        assert _ID.fullmatch(id), "ids come from the database"
        return self.folder / id[:2] / id

    def write(self, id: str, data: bytes) -> None:
        """Write a file; when this returns, a loss of power does not lose it.

        Raises:
            OutputFailed: the disk is full or fails.
        """
        path = self.path(id)
        temporary = path.with_name(f".{id}{_PARTIAL}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputFailed(f"cannot write a file: {error.strerror or error}") from error

    def remove(self, ids: Collection[str]) -> None:
        """Delete files; those that are not there, or cannot go now, are left to `sweep`."""
        for one in ids:
            with contextlib.suppress(OSError):
                self.path(one).unlink()

    def sweep(self, known: Collection[str]) -> int:
        """Delete what a crash left: unfinished files, and finished ones that are not `known`.

        Returns:
            How many there were.
        """
        count = 0
        for path in self.folder.glob("??/*"):
            ours = _ID.fullmatch(path.name) or path.name.endswith(_PARTIAL)
            if ours and path.name not in known:
                with contextlib.suppress(OSError):
                    path.unlink()
                    count += 1
        return count


def _sync_folder(folder: Path) -> None:
    """Have names in `folder` on the disk, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
