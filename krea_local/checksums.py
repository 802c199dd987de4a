"""What a file should hash to, as the hub's client notes it beside the files, and what it does.

In the hub's cache the names of a snapshot are links to files that are named by their checksum; a
folder fetched from the hub has a note a file under `.cache/huggingface/download/`. Large files go
by their SHA-256 (64 hex digits), small ones by git's SHA-1 (40). Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

CHECKSUM = r"[0-9a-f]{64}|[0-9a-f]{40}"
CHUNK = 2**20  # bytes
SHA256 = 64 * "0"  # one of its kind
NOTES = Path(".cache") / "huggingface" / "download"


def noted_checksum(root: Path, name: str) -> str | None:
    """The checksum that the file `name` of the folder `root` should have, or None if none is noted.

    Whether the file has changed since does not matter.
    """
    file = root / name
    if file.is_symlink():
        content = file.readlink()
        if content.parent.name == "blobs" and re.fullmatch(CHECKSUM, content.name):
            return content.name
    note = _read_note(root, name)
    return note and note[0]


def is_unchanged(root: Path, name: str, checksum: str) -> bool:
    """Whether a note says that the file had `checksum`, and the file is no younger than it."""
    note = _read_note(root, name)
    # As the hub's client: file systems round times, by a second at most.
    return note is not None and note[0] == checksum and (root / name).stat().st_mtime - 1 <= note[1]


def write_note(root: Path, name: str, checksum: str, commit: str) -> None:
    """Note that the file `name` of the folder `root` has `checksum`, in the hub's client's form."""
    note = _note(root, name)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{commit}\n{checksum}\n{time.time()}\n", encoding="utf-8")


def compute_checksum(
    file: Path, kind: str, on_bytes: Callable[[int], None] = lambda count: None
) -> str:
    """The checksum of `file`, of the same kind as `kind`, a checksum: SHA-256 or git's SHA-1.

    `on_bytes` hears how many bytes were read since the last call.
    """
    if len(kind) == 64:
        digest = hashlib.sha256()
    else:
        size = file.stat().st_size
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def _note(root: Path, name: str) -> Path:
    return root / NOTES / f"{name}.metadata"


def _read_note(root: Path, name: str) -> tuple[str, float] | None:
    """The checksum in a note, and when it was written (seconds since 1970)."""
    try:
        _, checksum, when = _note(root, name).read_text(encoding="utf-8").splitlines()[:3]
        return (checksum, float(when)) if re.fullmatch(CHECKSUM, checksum) else None
    except (OSError, ValueError):
        return None
