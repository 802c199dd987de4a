"""Fetch a model's files from the hub: only what is needed, each checked before it is in place.

`plan` asks the hub what there is and looks at what is here; `fetch` fetches the rest. Knows nothing
of what is in the files, or of how bytes get here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from krea_local import loading, weights
from krea_local.checksums import (
    CHECKSUM,
    NOTES,
    is_unchanged,
    noted_checksum,
)
from krea_local.errors import (
    InvalidRequest,
    OutputFailed,
    WeightsError,
    WeightsInvalid,
    WeightsNotFound,
)
from krea_local.paths import expanded
from krea_local.transfer import ANSWER_SECONDS, File, check, complete, locked, size_of
from krea_local.weights import (
    FULL,
    KREA,
    SAFETY_CHECKER_FILES,
    SAFETY_CHECKER_REPO,
    SRPO_FILE,
    VARIANTS,
    Family,
    Variant,
)


@dataclass(frozen=True)
class Plan:
    """What `fetch` will do.

    Attributes:
        on_hub: the model's family and hub id; None for the safety checker alone.
        variant: whose transformer is fetched instead of the model's own, if any.
        safety_checker: whether that is fetched too.
        folder: where to, or None for the hub's cache.
        files: all that are needed.
        missing: those of them that are not here, or not whole.
        unsure: those that are here, in their length, but from nobody knows where.
    """

    on_hub: tuple[Family, str] | None
    variant: Variant | None
    safety_checker: bool
    folder: Path | None
    files: tuple[File, ...]
    missing: tuple[File, ...]
    unsure: tuple[File, ...]

    @property
    def bytes_left(self) -> int:
        """What is to be fetched."""
        return sum(file.left for file in self.missing)

    def describe(self) -> str:
        """In one line what will be fetched, from where and to where."""
        repos = " and ".join(dict.fromkeys(file.repo for file in self.files))
        where = str(self.folder or _cache_folder())
        total = sum(file.size for file in self.files)
        if not self.missing:
            return f"{repos}: all {len(self.files)} files ({gigabytes(total)}) are in {where}"
        return (
            f"{repos}: {len(self.missing)} of {len(self.files)} files, "
            f"{gigabytes(self.bytes_left)} of {gigabytes(total)}, are to be fetched into {where}"
        )


def download(
    model: str = KREA.alias,
    *,
    variant: str = FULL,
    folder: str | os.PathLike[str] | None = None,
    safety_checker: bool = True,
    progress: bool = True,
    token: str | None = None,
) -> Path:
    """Fetch a model's files from the hub, so that `load` needs no network afterwards.

    Only what is needed is fetched, and what is here already is not. Every file is compared with the
    hub's checksum before it is put in its place. Broken off, it goes on where it stopped.

    Args:
        model: "krea", "dev", "srpo" or a hub id; the safety checker's id fetches that alone.
        variant: "bf16", the model's own weights; or, for FLUX.1 Krea [dev], its transformer in
            fewer bits, as others have repackaged it: "fp8", "gguf-q8", "gguf-q6", "gguf-q5",
            "gguf-q4". Everything else is the model's own.
        folder: where to, in the layout of weights.md; by default the hub's cache, where `load`
            finds it by the model's name.
        safety_checker: fetch that too, 0.34 GB; into `folder`/safety_checker if there is one.
        progress: show a bar on standard error, where that is a terminal.
        token: the hub's access token; by default HF_TOKEN or the one `hf auth login` saved.

    Returns:
        The folder that holds the files, or a variant's transformer: what `load` takes.

    Raises:
        WeightsNotFound: no such model, or the hub did not answer.
        WeightsInvalid: a file is not what the hub says it is.
        LicenceRequired: gated, with the page to accept and how to pass the token.
        UnsupportedModel: another architecture.
        OutputFailed: the disk is too small, or `folder` holds other files of these names.
        InvalidRequest: a parameter that is none of the above.
    """
    planned = plan(
        model, variant=variant, folder=folder, safety_checker=safety_checker, token=token
    )
    return fetch(planned, progress=progress, token=token)


def plan(
    model: str,
    *,
    variant: str = FULL,
    folder: str | os.PathLike[str] | None = None,
    safety_checker: bool = True,
    token: str | None = None,
) -> Plan:
    """Ask the hub for the list of files, and see what is here and whether there is room.

    Arguments and errors are those of `download`.
    """
    on_hub = _find_repo(model)
    if on_hub is None and variant != FULL:
        raise InvalidRequest(f"variant={variant!r}: the safety checker has none")
    other = weights.find_variant(*on_hub, variant) if on_hub else None
    _refuse_offline()
    target = expanded(folder).absolute() if folder is not None else None
    if target and target.exists() and not target.is_dir():
        raise OutputFailed(f"{str(target)!r} is not a folder: name another")
    files: list[File] = []
    for repo, patterns in weights.needed(*on_hub, variant=other) if on_hub else []:
        files += _listed(repo, patterns, target, token)
    if safety_checker or not on_hub:
        files += _listed(
            SAFETY_CHECKER_REPO, SAFETY_CHECKER_FILES, target and target / "safety_checker", token
        )
    files = list({file.place: file for file in files}.values())  # the cache keeps equals once
    try:
        unsure = tuple(file for file in files if _is_unsure(file))
        missing = tuple(file for file in files if file not in unsure and not _is_here(file))
        planned = Plan(on_hub, other, safety_checker, target, tuple(files), missing, unsure)
        _check_space(planned)
    except OSError as error:
        if isinstance(error, (OutputFailed, WeightsError)):
            raise
        where = str(target or _cache_folder())
        raise OutputFailed(f"cannot look into {where!r}: {error.strerror}") from error
    return planned


def fetch(planned: Plan, *, progress: bool = True, token: str | None = None) -> Path:
    """Do what `plan` has planned; as `download`."""
    try:
        with contextlib.ExitStack() as locks:
            for file in planned.missing:
                locks.enter_context(locked(file))
            check(planned.unsure, progress=progress)
            complete(planned.missing, progress=progress, token=token)
            check(planned.missing, progress=progress)
    except OSError as error:
        if isinstance(error, (OutputFailed, WeightsError)):
            raise
        where = str(planned.folder or _cache_folder())
        raise OutputFailed(
            f"cannot write into {where!r}: {error.strerror} (run it again: it goes on where "
            "it stopped)"
        ) from error
    return _finish(planned, token)


def gigabytes(count: int) -> str:
    """Bytes, for people: 33.7 GB, 0.34 GB, 1.2 MB, 0.3 kB."""
    if count < 10**6:
        return f"{count / 10**3:.1f} kB"
    if count < 10**7:
        return f"{count / 10**6:.1f} MB"
    return f"{count / 10**9:.{1 if count >= 10**9 else 2}f} GB"


def _find_repo(model: str) -> tuple[Family, str] | None:
    """The family and hub id; None for the safety checker's."""
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidRequest(f"model={model!r}: should be 'krea', 'dev', 'srpo' or a hub id")
    text = os.fspath(model)
    if text in ("mini", "tiny"):
        raise InvalidRequest(f"model={text!r}: is built in, there is nothing to download")
    if text == SAFETY_CHECKER_REPO:
        return None
    found = weights.find_repo(text)
    if found is None:
        raise InvalidRequest(
            f"model={text!r}: is a path; should be 'krea', 'dev', 'srpo' or a hub id (folder= and "
            "--folder say where to)"
        )
    return found


def _refuse_offline() -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise WeightsNotFound(
            "HF_HUB_OFFLINE is set, so nothing can be fetched: unset it (`krea-local verify` looks "
            "at what is here)"
        )


def _listed(repo: str, patterns: list[str], root: Path | None, token: str | None) -> Iterator[File]:
    """The files of `repo` that match, with their places in `root` or the hub's cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with weights.told_of_hub(repo):
        info = HfApi(token=token).model_info(repo, files_metadata=True, timeout=ANSWER_SECONDS)
    listed = {sibling.rfilename: sibling for sibling in info.siblings or []}
    for pattern in patterns:
        if pattern != "model_index.json" and not [
            *filter_repo_objects(listed, allow_patterns=pattern)
        ]:
            raise WeightsNotFound(
                f"{repo} has no {pattern.removesuffix('*')}: it is not in the diffusers layout of "
                "FLUX.1 (weights.md shows it)"
            )
    wanted = filter_repo_objects(listed, allow_patterns=patterns, ignore_patterns=weights.IGNORED)
    for name in sorted(wanted):
        lfs = listed[name].lfs
        size = lfs.size if lfs else listed[name].size
        checksum = lfs.sha256 if lfs else listed[name].blob_id
        if size is None or not re.fullmatch(CHECKSUM, checksum or "") or not info.sha:
            raise WeightsNotFound(
                f"the hub tells no size or checksum of {repo}/{name}: does HF_ENDPOINT name a hub?"
            )
        if ".." in PurePosixPath(name).parts or "\\" in name:
            raise WeightsInvalid(f"{repo} has a file {name!r}, which would lie elsewhere")
        assert checksum is not None
        yield _placed(repo, info.sha, name, size, checksum, root)


def _placed(repo: str, commit: str, name: str, size: int, checksum: str, root: Path | None) -> File:
    storage = _storage_folder(repo)
    cached = place = storage / "blobs" / checksum
    if root is None:
        partial = place.with_name(f"{checksum}.incomplete")
        lock = storage.parent / ".locks" / storage.name / f"{checksum}.lock"
    else:
        # SRPO's one file is the transformer of FLUX.1 [dev]'s folders; variants lie beside those.
        local = f"transformer/{name}" if name == SRPO_FILE else name
        if any((repo, name) == (one.repo, one.file) for one in VARIANTS.values()):
            local = PurePosixPath(name).name
        place = root / local
        partial = root / NOTES / f"{local}.{checksum}.incomplete"
        lock = root / NOTES / f"{local}.lock"
    return File(repo, commit, name, size, checksum, place, partial, lock, root, cached)


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _storage_folder(repo: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return _cache_folder() / repo_folder_name(repo_id=repo, repo_type="model")


def _is_here(file: File) -> bool:
    if file.root:
        name = file.place.relative_to(file.root).as_posix()
        return _is_whole(file, file.place) and is_unchanged(file.root, name, file.checksum)
    # Without symbolic links the cache holds the files under their names.
    return _is_whole(file, file.place) or _is_whole(file, _named_in_cache(file))


def _is_whole(file: File, path: Path) -> bool:
    return path.exists() and size_of(path) == file.size


def _named_in_cache(file: File) -> Path:
    return _storage_folder(file.repo) / "snapshots" / file.commit / file.name


def _is_unsure(file: File) -> bool:
    """Whether a file in a folder has to be read to know whether it is the right one.

    Raises:
        OutputFailed: it is not, and nobody knows where it came from.
    """
    if not file.root or not file.place.exists():
        return False
    name = file.place.relative_to(file.root).as_posix()
    if not _is_whole(file, file.place) and noted_checksum(file.root, name) is None:
        raise OutputFailed(
            f"{str(file.place)!r} is there already and not what {file.repo} holds: "
            f"{size_of(file.place):,} bytes, not {file.size:,}; name another folder, or delete it"
        )
    return _is_whole(file, file.place) and not is_unchanged(file.root, name, file.checksum)


def _check_space(planned: Plan) -> None:
    """Raise `OutputFailed` if what is to be fetched does not fit onto the disk."""
    left: dict[int, int] = defaultdict(int)
    places: dict[int, Path] = {}
    for file in planned.missing:
        place = next(one for one in file.partial.parents if one.exists())
        device = place.stat().st_dev
        places[device] = place
        left[device] += file.left
    for device, count in left.items():
        free = shutil.disk_usage(places[device]).free
        if count > free:
            raise OutputFailed(
                f"{gigabytes(count)} are to be fetched, {gigabytes(free)} are free on the disk of "
                f"{str(planned.folder or _cache_folder())!r}: free some, or choose another disk "
                "with folder= (--folder DIR) or, for the whole cache, the variable HF_HOME"
            )


def _finish(planned: Plan, token: str | None) -> Path:
    """Have the hub's client enter the files into its cache, and see that a model is complete."""
    variant = planned.variant
    if planned.folder:
        place = planned.folder
        if variant:
            place /= PurePosixPath(variant.file).name
        if planned.on_hub:
            loading.check_layout(weights.find(place))
        return place
    for file in planned.missing:  # a damaged one under this name would stay
        if _named_in_cache(file).exists() and not _is_whole(file, _named_in_cache(file)):
            _named_in_cache(file).unlink()
    with weights.hub_bars(show=False):
        folder = Path()
        if planned.safety_checker or not planned.on_hub:
            folder = weights.snapshot(
                SAFETY_CHECKER_REPO, SAFETY_CHECKER_FILES, token=token, local_files_only=False
            )
        if planned.on_hub:
            apart = ("transformer",) if variant else ()
            checkpoint = weights.find_on_hub(*planned.on_hub, apart, token=token)
            folder = checkpoint.folder
            if variant:
                own = weights.snapshot(
                    variant.repo, [variant.file], token=token, local_files_only=False
                )
                folder = own / variant.file
                checkpoint = replace(checkpoint, transformer_file=folder)
            loading.check_layout(checkpoint)
    return folder
