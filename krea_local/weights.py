"""Find a checkpoint: built in, in a folder, or on the hub.

A checkpoint is a folder in the diffusers layout of FLUX.1 [dev]: `transformer/`, `vae/`,
`text_encoder/`, `text_encoder_2/`, `tokenizer/`, `tokenizer_2/`, `scheduler/`. A folder means
offline: nothing is fetched; only a hub id may be. Knows nothing of what is in the files.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from krea_local.errors import (
    InvalidRequest,
    LicenceRequired,
    UnsupportedModel,
    WeightsError,
    WeightsInvalid,
    WeightsNotFound,
)
from krea_local.paths import expanded
from krea_local.tiny import write_tiny


@dataclass(frozen=True)
class Family:
    """A published model of FLUX.1 [dev]'s architecture.

    Attributes:
        name: what it is called.
        repo: its repository on the Hugging Face hub.
        guidance_scale: the hosted API's default for it.
        base_repo: where everything but the transformer comes from, if not from `repo`.
        alias: the short name that `load` takes.
    """

    name: str
    repo: str
    guidance_scale: float
    alias: str
    base_repo: str | None = None


KREA = Family("FLUX.1 Krea [dev]", "black-forest-labs/FLUX.1-Krea-dev", 4.5, "krea")
DEV = Family("FLUX.1 [dev]", "black-forest-labs/FLUX.1-dev", 3.5, "dev")
SRPO = Family("FLUX.1 SRPO [dev]", "tencent/SRPO", 4.5, "srpo", base_repo=DEV.repo)
FAMILIES = (KREA, DEV, SRPO)

SAFETY_CHECKER_REPO = "Falconsai/nsfw_image_detection"
MODEL_VARIABLE = "KREA_LOCAL_MODEL"
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
FOLDERS = (*COMPONENTS, "tokenizer", "tokenizer_2", "scheduler")
SRPO_FILE = "diffusion_pytorch_model.safetensors"
# The two single files in the repository's root repeat 24 GB of the folders.
PATTERNS = ["model_index.json", *(f"{folder}/*" for folder in FOLDERS)]
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

# Names that people mistake for this model, told apart before anything is fetched.
OTHER_MODELS = (
    (r"flux[._-]?2", "FLUX.2"),
    (r"krea[._-]?2", "Krea 2"),
    (r"schnell", "FLUX.1 [schnell]"),
    (r"kontext", "FLUX.1 Kontext [dev]"),
    (r"(flux|dev).*fill", "FLUX.1 Fill [dev]"),
    (r"redux", "FLUX.1 Redux [dev]"),
    (r"stable-diffusion|sdxl", "Stable Diffusion"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are.

    Attributes:
        label: what recipes call it: the hub id, "tiny", or the folder's name.
        family: whose defaults it has.
        folder: the diffusers layout.
        transformer_file: a transformer outside `folder`, or None.
        offline: it came from a folder, so nothing that belongs to it is fetched either.
    """

    label: str
    family: Family
    folder: Path
    transformer_file: Path | None = None
    offline: bool = True


def find(
    model: str | os.PathLike[str] | None = None, *, token: str | None = None, fetch: bool = True
) -> Checkpoint:
    """Find the files of `model`, fetching them only if it is named and lives on the hub.

    Args:
        model: "tiny"; "krea", "dev", "srpo" (folders of these names are "./dev" …); a folder; a hub
            id; or None for what the variable KREA_LOCAL_MODEL says, else FLUX.1 Krea [dev] if the
            hub's cache holds it.
        token: the hub's access token; by default HF_TOKEN or the one `hf auth login` saved.
        fetch: False to look for a hub id in the hub's cache only.

    Raises:
        WeightsNotFound: not there, with the ways to get it.
        LicenceRequired: gated, with the page to accept and how to pass the token.
        UnsupportedModel: another architecture.
        WeightsInvalid: a pickle.
    """
    if model is None:
        model = os.environ.get(MODEL_VARIABLE) or None
    if model is None:
        return _find_default()
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidRequest(f"model={model!r}: should be a name or a path")
    text = os.fspath(model)
    path = expanded(text)
    if text == "tiny":
        return Checkpoint(label="tiny", family=KREA, folder=_tiny_folder())
    alias = next((known for known in FAMILIES if text == known.alias), None)
    if not alias and (path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text)):
        return _find_folder(path)
    family = alias or next((known for known in FAMILIES if text == known.repo), None)
    repo = family.repo if family else text
    _refuse_by_name(repo)
    if "/" not in repo:
        names = ", ".join(repr(known.alias) for known in FAMILIES)
        raise WeightsNotFound(f"no model {text!r}: give a folder, a hub id, {names} or 'tiny'")
    return _find_on_hub(
        family or _guess_family(repo), repo, token=token, local_files_only=not fetch
    )


def find_safety_checker(checkpoint: Checkpoint, source: str | os.PathLike[str]) -> Path:
    """The folder of the safety checker that goes with `checkpoint`.

    Looks in the checkpoint's own `safety_checker/`, then for `source` as a folder, then as a hub id
    (in the hub's cache only, where the checkpoint itself came from a folder).

    Raises:
        WeightsNotFound: none of them, with the ways out.
    """
    own = checkpoint.folder / "safety_checker"
    text = os.fspath(source)
    if own.is_dir() and text == SAFETY_CHECKER_REPO:
        return own
    folder = expanded(text)
    if folder.is_dir():
        return folder
    try:
        return _snapshot(
            text,
            ["config.json", "preprocessor_config.json", "model.safetensors"],
            token=None,
            local_files_only=checkpoint.offline,
        )
    except WeightsError as error:
        raise WeightsNotFound(
            f"the safety checker {text!r} is not there ({own} or the hub's cache): get it with "
            f"`hf download {SAFETY_CHECKER_REPO} config.json preprocessor_config.json "
            "model.safetensors`, or switch it off with enable_safety_checker=False "
            "(--no-enable-safety-checker)"
        ) from error


def _find_default() -> Checkpoint:
    try:
        return _find_on_hub(KREA, KREA.repo, token=None, local_files_only=True)
    except WeightsNotFound as error:
        raise WeightsNotFound(
            f"no weights of {KREA.name} on this machine. To fetch its 33.7 GB, name it: "
            f"model='{KREA.alias}' (--model {KREA.alias}). To use a folder, name that, or set "
            f"{MODEL_VARIABLE}. To try without weights: model='tiny' (weights.md has the details)"
        ) from error


def _find_folder(path: Path) -> Checkpoint:
    if path.suffix in PICKLES:
        raise WeightsInvalid(f"{str(path)!r} is a pickle, which can run any code: it is never read")
    if path.is_file():
        raise UnsupportedModel(
            f"{str(path)!r} is a single file: give the folder with transformer/, vae/, "
            "text_encoder/ … (weights.md shows it)"
        )
    if not path.is_dir():
        raise WeightsNotFound(f"no folder {str(path)!r}")
    resolved = path.resolve()
    # A folder of the hub's cache is named by a hash; the model's name is further up.
    cached = next((part for part in resolved.parts if part.startswith("models--")), resolved.name)
    return Checkpoint(
        label=cached.removeprefix("models--").replace("--", "/"),
        family=_guess_family(cached),
        folder=path,
    )


def _guess_family(name: str) -> Family:
    """The family that a folder's or repository's name speaks of; FLUX.1 Krea [dev] if none."""
    lowered = name.lower()
    if "srpo" in lowered:
        return SRPO
    if re.search(r"flux[.-]?1[.-]dev", lowered):
        return DEV
    return KREA


def _find_on_hub(
    family: Family, repo: str, *, token: str | None, local_files_only: bool = False
) -> Checkpoint:
    if family.base_repo and repo == family.repo:
        file = _snapshot(repo, [SRPO_FILE], token=token, local_files_only=local_files_only)
        # Its base's own 24 GB transformer is not needed, only that transformer's configuration.
        patterns = [*(p for p in PATTERNS if p != "transformer/*"), "transformer/config.json"]
        folder = _snapshot(
            family.base_repo, patterns, token=token, local_files_only=local_files_only
        )
        return Checkpoint(repo, family, folder, file / SRPO_FILE, offline=local_files_only)
    folder = _snapshot(repo, PATTERNS, token=token, local_files_only=local_files_only)
    return Checkpoint(repo, family, folder, offline=local_files_only)


def _snapshot(repo: str, patterns: list[str], *, token: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{repo}"
    login = "run `hf auth login` or set HF_TOKEN"
    try:
        return Path(
            snapshot_download(
                repo, allow_patterns=patterns, token=token, local_files_only=local_files_only
            )
        )
    except GatedRepoError as error:
        raise LicenceRequired(
            f"{repo} is gated: accept its licence at {page}, then {login} (a token with read "
            "access to gated repositories)"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsNotFound(f"no repository {page}, or it is private: {login}") from error
    except LocalEntryNotFoundError as error:
        raise WeightsNotFound(
            f"{repo} is not in the hub's cache, and the hub was not asked or did not answer: "
            "check the connection and HF_HUB_OFFLINE, and try again"
        ) from error
    except Exception as error:
        # HTTP errors, a full disk, and the transport's own errors, whose classes depend on the HTTP
        # library that the hub's client happens to use.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsNotFound(
            f"could not fetch {repo}: {reason[0]} (run it again: it goes on where it stopped)"
        ) from error


@contextlib.contextmanager
def hub_bars(*, show: bool) -> Iterator[None]:
    """Show the hub's progress bars on terminals only, if at all; its own setting is put back."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if (show and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@functools.cache
def _tiny_folder() -> Path:
    """The tiny checkpoint, made once a process and removed with it."""
    parent = Path(tempfile.mkdtemp(prefix="krea_local-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    return write_tiny(parent / "tiny")


def _refuse_by_name(repo: str) -> None:
    for pattern, name in OTHER_MODELS:
        if re.search(pattern, repo.lower()):
            raise UnsupportedModel(other_model(f"{repo!r} is {name}"))


def other_model(what: str) -> str:
    """The message that refuses a checkpoint of another architecture."""
    ours = ", ".join(family.name for family in FAMILIES)
    return f"{what}, another model than those krea_local runs: {ours}"
