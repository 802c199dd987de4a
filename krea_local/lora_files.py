"""Where the file of a LoRA is: on this machine, on the hub, or behind a URL, which is fetched once.

Knows nothing of what is in it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from krea_local.background import LOOK_SECONDS, TooSlow, wait_for
from krea_local.errors import Cancelled, InvalidRequest, KreaError, OutputFailed, WeightsNotFound
from krea_local.files import check_safetensors
from krea_local.lora import PEFT_CONFIG
from krea_local.paths import cache_folder, expanded
from krea_local.progress import Bar
from krea_local.weights import PICKLES, hub_bars, refuse_pickle, told_of_hub

USUAL_NAME = "pytorch_lora_weights.safetensors"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
HUB_URL = re.compile(
    rf"https://(?:huggingface\.co|hf\.co)/({HUB_ID})"
    r"(?:/(?:resolve|blob|tree)/([^/?#]+)(?:/([^?#]+))?)?/?(?:[?#].*)?"
)
MAX_BYTES = 8 * 2**30  # of all of FLUX.1's layers in bfloat16, rank 512 takes 5.7
ANSWER_SECONDS, FETCH_SECONDS = 30.0, 3600.0
MAX_REDIRECTS = 5
# Downloads from the hub at a time. One that nobody waits for any more goes on, and is there the
# next time; without a limit they would pile up.
_AT_THE_HUB = threading.BoundedSemaphore(2)


def find_lora(
    path: str | os.PathLike[str], *, progress: bool = True, check: Callable[[], None] = lambda: None
) -> Path:
    """The safetensors file of a LoRA; fetched, if it is elsewhere and not yet here.

    Args:
        path: a file; a folder with one such file; a hub id, with or without the file's name in it
            ("owner/name/file.safetensors"); a page of the hub; or an http(s) URL.
        progress: show a bar on standard error, where that is a terminal.
        check: called while one is fetched; what it raises ends that. (What the hub's own library
            is fetching goes on in the background, and is there the next time.)

    Raises:
        WeightsNotFound: not there, or several are and none has the usual name.
        WeightsInvalid: a pickle, or not safetensors.
        LicenceRequired: the hub wants its licence accepted.
        OutputFailed: the disk is full.
    """
    text = os.fspath(path)
    if re.match(r"https?://", text):
        on_hub = HUB_URL.fullmatch(text)
        if on_hub:
            return _on_hub(*on_hub.groups(), progress=progress, check=check)
        return _behind_url(text, progress=progress, check=check)
    place = expanded(text)
    try:
        if place.is_dir():
            names = [file.name for file in place.glob("*.safetensors")]
            return place / _choose(names, f"the folder {text!r}")
        if place.is_file():
            refuse_pickle(place)
            check_safetensors(place)
            return place
    except OSError as error:
        raise WeightsNotFound(f"cannot look at {text!r}: {error.strerror or error}") from error
    named = re.fullmatch(rf"({HUB_ID})(?:/(.+))?", text)
    if not named or Path(named[1]).suffix in (".safetensors", *PICKLES):
        raise WeightsNotFound(
            f"no LoRA {text!r}: give a .safetensors file, a hub id (owner/name) or a URL"
        )
    return _on_hub(named[1], None, named[2], progress=progress, check=check)


def _choose(names: list[str], where: str) -> str:
    """The one file that is meant."""
    if len(names) == 1 or USUAL_NAME in names:
        return names[0] if len(names) == 1 else USUAL_NAME
    if not names:
        raise WeightsNotFound(f"no .safetensors in {where}")
    listed = ", ".join(sorted(names)[:5])
    raise WeightsNotFound(f"{where} holds {len(names)} .safetensors: name one of {listed}")


def _on_hub(
    repo: str,
    revision: str | None,
    name: str | None,
    *,
    progress: bool,
    check: Callable[[], None],
) -> Path:
    from huggingface_hub import hf_hub_download

    revision, name = (part and urllib.parse.unquote(part) for part in (revision, name))
    if name:
        refuse_pickle(Path(name))

    def fetch(left: threading.Event) -> list[Path]:
        while not _AT_THE_HUB.acquire(timeout=LOOK_SECONDS):
            if left.is_set():
                return []
        try:
            with told_of_hub(repo), hub_bars(show=progress):
                names = [name] if name else _listed(repo, revision)
                return [Path(hf_hub_download(repo, one, revision=revision)) for one in names]
        finally:
            _AT_THE_HUB.release()

    files = wait_for(fetch, check=check)
    check_safetensors(files[0])
    return files[0]


@functools.cache  # so that a repeated call asks the hub for nothing
def _listed(repo: str, revision: str | None) -> list[str]:
    """The one LoRA of a repository, and what PEFT says of it; offline, of what is in the cache."""
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        names = list_repo_files(repo, revision=revision)
    except Exception:
        patterns = ["*.safetensors", PEFT_CONFIG]
        with contextlib.suppress(Exception):
            folder = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=True
            )
            names = [file.name for file in Path(folder).iterdir()]
            return _chosen(names, repo)
        raise
    return _chosen(names, repo)


def _chosen(names: list[str], repo: str) -> list[str]:
    top = [one for one in names if one.endswith(".safetensors") and "/" not in one]
    beside = [PEFT_CONFIG] if PEFT_CONFIG in names else []
    return [_choose(top, f"https://huggingface.co/{repo}"), *beside]


def _behind_url(url: str, *, progress: bool, check: Callable[[], None]) -> Path:
    """The file in our cache, fetched if it is not there yet."""
    try:
        parts = urllib.parse.urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"[:200]
    except ValueError as error:
        raise InvalidRequest(f"loras: {url!r} is not a URL: {error}") from error
    name = Path(urllib.parse.unquote(parts.path)).name
    refuse_pickle(Path(name))
    stem = re.sub(r"[^\w.-]", "_", name.removesuffix(".safetensors"), flags=re.ASCII)[:80] or "lora"
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    place = cache_folder() / "loras" / f"{stem}-{key}.safetensors"
    partial = place.with_name(f".{secrets.token_hex(8)}.part")
    try:
        if place.exists():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        wait_for(
            lambda left: _fetch(url, shown, partial, left, progress=progress),
            check=check,
            seconds=FETCH_SECONDS,
        )
        check_safetensors(partial)
        partial.replace(place)
    except TooSlow:
        message = f"loras: {shown} took over {FETCH_SECONDS:g} s to arrive"
        raise WeightsNotFound(message) from None
    except Cancelled:
        raise
    except KreaError as error:
        # The name that it would have had says more than the partial file's.
        raise type(error)(str(error).replace(str(partial), shown)) from error
    except OSError as error:
        raise _unwritable(place, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return place


def _fetch(url: str, shown: str, place: Path, left: threading.Event, *, progress: bool) -> None:
    """Write what is behind a URL; when `left` is set, stop and leave nothing."""
    import httpx

    try:
        with (
            httpx.Client(
                follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=ANSWER_SECONDS
            ) as client,
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            if not answer.is_success:
                status = f"{answer.status_code} {answer.reason_phrase}"
                raise WeightsNotFound(f"loras: {shown} answered {status}")
            length = int(answer.headers.get("Content-Length", 0))
            _write(answer.iter_raw(), length, shown, place, left, progress=progress)
    except KreaError:
        raise
    # httpx's own errors, and what bad proxy and certificate variables raise before it starts.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise WeightsNotFound(f"loras: could not load {shown}: {reason}") from error


def _write(
    chunks: Iterator[bytes],
    length: int,
    shown: str,
    place: Path,
    left: threading.Event,
    *,
    progress: bool,
) -> None:
    bar, count = Bar(length, show=progress and length > 0, unit="B"), 0
    try:
        with _opened(place) as file:
            for chunk in chunks:
                if left.is_set():
                    break
                count += len(chunk)
                if count > MAX_BYTES:
                    raise WeightsNotFound(f"loras: {shown} is over {MAX_BYTES // 2**30} GiB")
                try:
                    file.write(chunk)
                except OSError as error:
                    raise _unwritable(place, error) from error
                bar.advance("lora", len(chunk))
    finally:
        bar.close()
        if left.is_set():  # whoever waited has cleared up, perhaps before there was a file
            place.unlink(missing_ok=True)


def _opened(place: Path) -> IO[bytes]:
    try:
        return place.open("xb", buffering=0)
    except OSError as error:
        raise _unwritable(place, error) from error


def _unwritable(place: Path, error: OSError) -> OutputFailed:
    return OutputFailed(f"cannot write into {str(place.parent)!r}: {error.strerror or error}")
