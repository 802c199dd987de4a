"""Paths as people write them. Knows nothing of what is in the files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from krea_local.errors import InvalidRequest


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ and ~user replaced by the home folder.

    Raises:
        InvalidRequest: there is no such user, no home folder, a NUL in the path, or symbolic links
            on it that lead in a circle.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InvalidRequest(f"{text!r} is not a path: it holds a NUL")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidRequest(f"{text!r}: {error}") from error
    if _leads_in_a_circle(path):
        raise InvalidRequest(f"{text!r} leads nowhere: its symbolic links go in a circle")
    return path


def _leads_in_a_circle(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    except ValueError:  # no text that can be a path
        return False
    return False


def cache_folder() -> Path:
    """Ours in the user's cache folder: in $XDG_CACHE_HOME, or in ~/.cache."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "krea_local"
