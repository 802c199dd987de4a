"""Bring files of the hub to this machine, whole or to be gone on with.

Plain HTTP requests that begin where a partial file ends: the hub's own client (2.4) goes on within
a process only, and begins a file anew in the next. A file gets to its place when its checksum is
the hub's. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from krea_local.checksums import compute_checksum, write_note
from krea_local.errors import Cancelled, KreaError, OutputFailed, WeightsInvalid, WeightsNotFound
from krea_local.progress import Bar
from krea_local.weights import told_of_hub

ANSWER_SECONDS = 30.0  # the longest silence of the hub before we ask anew
AT_ONCE = 4  # files
LOCK_SECONDS = 3.0
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP answers worth another try
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try that follows no new bytes


@dataclass(frozen=True)
class File:
    """A file of the hub and its place here.

    Attributes:
        repo: its repository.
        commit: the repository's revision.
        name: in the repository.
        size: bytes.
        checksum: SHA-256 or git's SHA-1, in hex digits.
        place: where it goes: in a folder, or in the hub's cache, by its checksum.
        partial: what of it is here already, if it is not whole.
        lock: held while it is fetched; that of the hub's client in the cache.
        root: the folder in the diffusers layout that it is of, or None in the cache.
        cached: where the hub's cache has it, if it has.
    """

    repo: str
    commit: str
    name: str
    size: int
    checksum: str
    place: Path
    partial: Path
    lock: Path
    root: Path | None
    cached: Path

    @property
    def done(self) -> int:
        """Bytes that are here; more than `size` if the file is another one."""
        return size_of(self.partial)

    @property
    def left(self) -> int:
        """Bytes that are to be fetched."""
        return self.size - min(self.done, self.size)

    def note(self) -> None:
        """Leave the hub's client's note beside a file in a folder."""
        if self.root:
            name = self.place.relative_to(self.root).as_posix()
            write_note(self.root, name, self.checksum, self.commit)


@contextlib.contextmanager
def locked(file: File) -> Iterator[None]:
    """Keep other processes off a file; raises `OutputFailed` if one is at it."""
    from huggingface_hub.utils import WeakFileLock

    file.lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(file.lock, timeout=LOCK_SECONDS))
        except TimeoutError as error:
            raise OutputFailed(
                f"another process is fetching {str(file.place)!r}: wait for it"
            ) from error
        yield


def complete(files: Sequence[File], *, progress: bool, token: str | None) -> None:
    """Complete the partial files, a few at once; the small first, so that refusals come early."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    stop = threading.Event()
    counting = threading.Lock()
    total = sum(file.left for file in files)
    bar = Bar(total, show=progress and total > 0, unit="B")

    def count(file: File, new: int) -> None:
        with counting:
            bar.advance(file.name.split("/")[0], new)

    try:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            work = [
                threads.submit(_complete, file, token, stop, count)
                for file in sorted(files, key=lambda file: file.size)
            ]
            try:
                for one in as_completed(work):
                    one.result()
            finally:  # after an error or Ctrl-C the others end at their next chunk
                stop.set()
    finally:
        bar.close()


class _Broken(KreaError):
    """The hub broke off, or asked for patience; holds why."""


def _complete(
    file: File, token: str | None, stop: threading.Event, count: Callable[[File, int], None]
) -> None:
    """Fetch what is missing of a partial file, asking again where the connection breaks."""
    if file.done > file.size:
        file.partial.unlink()
    file.partial.parent.mkdir(parents=True, exist_ok=True)
    if file.root and not file.done and not stop.is_set() and _is_cached(file):
        shutil.copyfile(file.cached, file.partial)
        count(file, file.size)
    best, waits = file.done, iter(WAITS)
    with file.partial.open("ab") as out:
        while file.done < file.size:
            reason = "the hub sent less than the file's length"
            try:
                _append(file, out, token, stop, count)
            except _Broken as error:
                reason = str(error)
            out.flush()
            if file.done > best:  # not merely what was had before a start from zero
                best, waits = file.done, iter(WAITS)
            elif (wait := next(waits, None)) is not None:
                stop.wait(wait)
            else:
                raise WeightsNotFound(
                    f"could not fetch {file.repo}/{file.name}: {reason} (run it again: it goes on "
                    "where it stopped)"
                )


def _is_cached(file: File) -> bool:
    """Whether the hub's cache has a file, undamaged."""
    return (
        file.cached.exists()
        and size_of(file.cached) == file.size
        and compute_checksum(file.cached, file.checksum) == file.checksum
    )


def _append(
    file: File,
    out: BinaryIO,
    token: str | None,
    stop: threading.Event,
    count: Callable[[File, int], None],
) -> None:
    with contextlib.closing(_chunks(file, out.tell(), token, stop)) as chunks:
        for position, chunk in chunks:
            if position != out.tell():  # the hub starts over
                count(file, position - out.tell())
                out.truncate(position)
                out.seek(position)
            if position + len(chunk) > file.size:
                raise WeightsInvalid(
                    f"the hub sends more of {file.repo}/{file.name} than the {file.size:,} bytes "
                    "that it lists: run it again later"
                )
            out.write(chunk)
            count(file, len(chunk))


def _chunks(
    file: File, start: int, token: str | None, stop: threading.Event
) -> Generator[tuple[int, bytes], None, None]:
    """What the hub sends of a file from byte `start` on, as (position, bytes).

    Raises:
        _Broken: it broke off.
        Cancelled: `stop` is set.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(file.repo, file.name, revision=file.commit)
    # Compressed answers have neither the file's length nor its positions.
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with told_of_hub(file.repo):
        try:
            _refuse_stopped(stop)
            with get_session().stream("GET", url, headers=headers, timeout=ANSWER_SECONDS) as got:
                hf_raise_for_status(got)
                part = re.match(r"bytes (\d+)-", got.headers.get("Content-Range", ""))
                position = int(part[1]) if part else 0
                if position not in (0, start):
                    raise _Broken(f"the hub answers from byte {position:,}, not {start:,}")
                for chunk in got.iter_bytes():
                    _refuse_stopped(stop)
                    yield position, chunk
                    position += len(chunk)
        except HfHubHTTPError as error:
            if error.response.status_code in PASSING:
                raise _Broken(str(error).strip().splitlines()[0]) from error
            raise
        except (_Broken, Cancelled):
            raise
        except Exception as error:  # of the HTTP library, whichever the hub's client uses
            raise _Broken(str(error) or type(error).__name__) from error


def _refuse_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled("cancelled; run it again, and it goes on where it stopped")


def check(files: Sequence[File], *, progress: bool) -> None:
    """Compare files with the hub's checksums, and put in its place what was only partial.

    Raises:
        WeightsInvalid: one differs. It is removed if we fetched it.
    """
    bar = Bar(sum(file.size for file in files), show=progress and bool(files), unit="B")
    try:
        for file in files:
            fetched = file.partial.exists()
            path = file.partial if fetched else file.place
            found = compute_checksum(path, file.checksum, lambda n: bar.advance("check", n))
            if found != file.checksum:
                if fetched:
                    path.unlink()
                raise WeightsInvalid(
                    f"{str(file.place)!r} is not {file.repo}/{file.name}: its checksum is "
                    f"{found[:12]}…, the hub's {file.checksum[:12]}…; "
                    + ("it was removed, run it again" if fetched else "delete it and run it again")
                )
            if fetched:
                file.place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(file.place)
            file.note()
    finally:
        bar.close()


def size_of(path: Path) -> int:
    """Bytes; 0 for a file that is not there."""
    return path.stat().st_size if path.exists() else 0
