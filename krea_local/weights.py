"""Find a checkpoint: built in, in a folder, or on the hub.

A checkpoint is a folder in the diffusers layout of FLUX.1 [dev]: `transformer/`, `vae/`,
`text_encoder/`, `text_encoder_2/`, `tokenizer/`, `tokenizer_2/`, `scheduler/`. Its two large parts,
transformer and T5, may come from single files instead. A folder means offline: nothing is fetched;
only a hub id may be. Knows nothing of what is in the files.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from krea_local.errors import (
    InvalidRequest,
    KreaError,
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


@dataclass(frozen=True)
class Variant:
    """A transformer in fewer bits: one file, in a repository of its own.

    Attributes:
        repo: that repository.
        file: in it.
    """

    repo: str
    file: str


def _gguf(kind: str) -> Variant:
    return Variant("QuantStack/FLUX.1-Krea-dev-GGUF", f"flux1-krea-dev-{kind}.gguf")


KREA = Family("FLUX.1 Krea [dev]", "black-forest-labs/FLUX.1-Krea-dev", 4.5, "krea")
DEV = Family("FLUX.1 [dev]", "black-forest-labs/FLUX.1-dev", 3.5, "dev")
SRPO = Family("FLUX.1 SRPO [dev]", "tencent/SRPO", 4.5, "srpo", base_repo=DEV.repo)
FAMILIES = (KREA, DEV, SRPO)

FULL = "bf16"
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "fp8": Variant(
            "Comfy-Org/FLUX.1-Krea-dev_ComfyUI",
            "split_files/diffusion_models/flux1-krea-dev_fp8_scaled.safetensors",
        ),
        "gguf-q8": _gguf("Q8_0"),
        "gguf-q6": _gguf("Q6_K"),
        "gguf-q5": _gguf("Q5_K_M"),
        "gguf-q4": _gguf("Q4_K_M"),
    }
)
"""FLUX.1 Krea [dev]'s transformer as others have repackaged it; `weights.md` tells who."""

# The trained miniature, which comes with the package; benchmarks/miniature has how it was made.
MINI_FOLDER = Path(__file__).parent / "mini"
MINI_SIDE = 512  # the smallest that it was trained at
SAFETY_CHECKER_REPO = "Falconsai/nsfw_image_detection"
SAFETY_CHECKER_FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]
MODEL_VARIABLE = "KREA_LOCAL_MODEL"
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
FOLDERS = (*COMPONENTS, "tokenizer", "tokenizer_2", "scheduler")
SRPO_FILE = "diffusion_pytorch_model.safetensors"
# The two single files in the repository's root repeat 24 GB of the folders.
PATTERNS = ["model_index.json", *(f"{folder}/*" for folder in FOLDERS)]
SINGLE_FILES = (".safetensors", ".sft", ".gguf")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
IGNORED = [f"*{suffix}" for suffix in PICKLES]  # never read, so never fetched

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
        label: what recipes call it: the hub id, "mini", "tiny", or the folder's name.
        family: whose defaults it has.
        folder: the diffusers layout.
        transformer_file: a transformer outside `folder`, or None.
        text_encoder_2_file: T5 outside `folder`, or None.
        offline: it came from a folder, so nothing that belongs to it is fetched either.
        least_side: of pictures that it was trained on, in pixels, where that is known.
    """

    label: str
    family: Family
    folder: Path
    transformer_file: Path | None = None
    text_encoder_2_file: Path | None = None
    offline: bool = True
    least_side: int = 0


def find(
    model: str | os.PathLike[str] | None = None,
    *,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder_2: str | os.PathLike[str] | None = None,
    token: str | None = None,
    fetch: bool = True,
) -> Checkpoint:
    """Find the files of `model`, fetching them only if it is named and lives on the hub.

    Args:
        model: "mini"; "tiny"; "krea", "dev", "srpo" (folders of these names are "./dev" …); a
            folder; a hub id; a file with a transformer, whose other parts are then looked for
            beside it or where None finds them; or None for what the variable KREA_LOCAL_MODEL says,
            else FLUX.1 Krea [dev] if the hub's cache holds it.
        transformer: a file to take instead of the model's own transformer.
        text_encoder_2: a file to take instead of its T5.
        token: the hub's access token; by default HF_TOKEN or the one `hf auth login` saved.
        fetch: False to look for a hub id in the hub's cache only.

    Raises:
        WeightsNotFound: not there, with the ways to get it.
        LicenceRequired: gated, with the page to accept and how to pass the token.
        UnsupportedModel: another architecture.
        WeightsInvalid: a pickle.
    """
    files = {"transformer": transformer, "text_encoder_2": text_encoder_2}
    apart = {name: _weights_file(name, file) for name, file in files.items() if file is not None}
    if model is None:
        model = os.environ.get(MODEL_VARIABLE) or None
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise InvalidRequest(f"model={model!r}: should be a name or a path")
    path = expanded(os.fspath(model)) if model is not None else None
    if path is not None and path.suffix.lower() in SINGLE_FILES and not path.is_dir():
        if "transformer" in apart:
            raise InvalidRequest(f"model={str(path)!r} is a transformer, and so is transformer=")
        apart["transformer"] = _weights_file("model", path)
        model = _beside(path) or _default_folder()
    try:
        checkpoint = _find(model, tuple(apart), token=token, fetch=fetch)
    except WeightsNotFound as error:
        if model is None and "transformer" in apart:
            name = apart["transformer"].name
            raise WeightsNotFound(f"{name!r} is a transformer; of the rest: {error}") from error
        raise
    if "transformer" in apart:
        name = apart["transformer"].stem
        family = _guess_family(name, default=checkpoint.family)
        checkpoint = replace(checkpoint, label=name, family=family)
    return replace(
        checkpoint,
        transformer_file=apart.get("transformer", checkpoint.transformer_file),
        text_encoder_2_file=apart.get("text_encoder_2"),
    )


def _find(
    model: str | os.PathLike[str] | None, apart: tuple[str, ...], *, token: str | None, fetch: bool
) -> Checkpoint:
    """As `find`; of the components `apart`, only the configuration is wanted."""
    if model is None:
        return _find_default(apart)
    text = os.fspath(model)
    if text == "tiny":
        return Checkpoint(label="tiny", family=KREA, folder=_tiny_folder())
    if text == "mini":
        return Checkpoint(label="mini", family=KREA, folder=MINI_FOLDER, least_side=MINI_SIDE)
    on_hub = find_repo(text)
    if on_hub is None:
        return _find_folder(expanded(text))
    family, repo = on_hub
    return find_on_hub(family, repo, apart, token=token, local_files_only=not fetch)


def find_repo(model: str) -> tuple[Family, str] | None:
    """The family and hub id that `model` names, an alias or an id; None if it names a path.

    Raises:
        UnsupportedModel: another architecture, by its name.
        WeightsNotFound: neither a path nor a hub id.
    """
    alias = next((known for known in FAMILIES if model == known.alias), None)
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)
    if not alias and (expanded(model).exists() or not is_id):
        return None
    family = alias or next((known for known in FAMILIES if model == known.repo), None)
    repo = family.repo if family else model
    _refuse_by_name(repo)
    if "/" not in repo:
        names = ", ".join(repr(known.alias) for known in FAMILIES)
        raise WeightsNotFound(
            f"no model {model!r}: give a folder, a hub id, {names}, 'mini' or 'tiny'"
        )
    return family or _guess_family(repo), repo


def find_variant(family: Family, repo: str, name: str) -> Variant | None:
    """What `name` stands for; None for the model's own weights.

    Raises:
        InvalidRequest: nothing, or for another model.
    """
    if name == FULL:
        return None
    if name not in VARIANTS:
        known = ", ".join(map(repr, (FULL, *VARIANTS)))
        raise InvalidRequest(f"variant={name!r}: should be one of {known}")
    if (family, repo) != (KREA, KREA.repo):
        raise InvalidRequest(f"variant={name!r}: is known of {KREA.name} alone, not of {repo}")
    return VARIANTS[name]


def needed(
    family: Family, repo: str, apart: tuple[str, ...] = (), variant: Variant | None = None
) -> list[tuple[str, list[str]]]:
    """What a model takes of the hub: repositories, each with the patterns of the files' names.

    Of the components `apart`, and of a base's 24 GB transformer, only the configuration.
    """
    if variant is not None:
        return [(variant.repo, [variant.file]), *needed(family, repo, ("transformer", *apart))]

    def patterns(*apart: str) -> list[str]:
        spared = {f"{name}/*": f"{name}/config.json" for name in apart}
        return [spared.get(pattern, pattern) for pattern in PATTERNS]

    if family.base_repo and repo == family.repo:
        return [(repo, [SRPO_FILE]), (family.base_repo, patterns("transformer", *apart))]
    return [(repo, patterns(*apart))]


def find_safety_checker(checkpoint: Checkpoint, source: str | os.PathLike[str]) -> Path:
    """The folder of the safety checker that goes with `checkpoint`.

    Looks in the checkpoint's own `safety_checker/`, then for `source` as a folder, then as a hub id
    (in the hub's cache only, where the checkpoint itself came from a folder).

    Raises:
        WeightsNotFound: none of them, with the ways out.
    """
    text = os.fspath(source)
    own = checkpoint.folder / "safety_checker"
    if own.is_dir() and text == SAFETY_CHECKER_REPO:
        return own
    folder = expanded(text)
    if folder.is_dir():
        return folder
    try:
        return snapshot(
            text,
            SAFETY_CHECKER_FILES,
            token=None,
            local_files_only=checkpoint.offline,
        )
    except WeightsError as error:
        raise WeightsNotFound(
            f"the safety checker {text!r} is not there ({own} or the hub's cache): get it with "
            f"`krea-local download {SAFETY_CHECKER_REPO}`, or switch it off with "
            "enable_safety_checker=False (--no-enable-safety-checker)"
        ) from error


def _weights_file(name: str, file: str | os.PathLike[str]) -> Path:
    """The path of a single file of weights.

    Raises:
        InvalidRequest: not a path, or of a kind that is none.
        WeightsInvalid: a pickle.
        WeightsNotFound: no such file.
    """
    if not isinstance(file, (str, os.PathLike)):
        raise InvalidRequest(f"{name}={file!r}: should be a path")
    path = expanded(os.fspath(file))
    refuse_pickle(path)
    if path.suffix.lower() not in SINGLE_FILES:
        raise InvalidRequest(f"{name}={str(path)!r}: should be a file, {', '.join(SINGLE_FILES)}")
    if not path.is_file():
        raise WeightsNotFound(f"no file {str(path)!r}")
    return path


def _default_folder() -> str | Path | None:
    """What the variable KREA_LOCAL_MODEL names, or the checkpoint beside the file that it names."""
    named = os.environ.get(MODEL_VARIABLE) or None
    if named and expanded(named).suffix.lower() in SINGLE_FILES:
        return _beside(expanded(named))
    return named


def _beside(file: Path) -> Path | None:
    """The folder of `file`, if it is a checkpoint that lacks nothing but perhaps a transformer."""
    folder = file.parent
    complete = all((folder / name).is_dir() for name in FOLDERS)
    return folder if complete else None


def refuse_pickle(path: Path) -> None:
    """Raise `WeightsInvalid` for a file that is a pickle by its name."""
    if path.suffix in PICKLES:
        raise WeightsInvalid(f"{str(path)!r} is a pickle, which can run any code: it is never read")


def _find_default(apart: tuple[str, ...]) -> Checkpoint:
    try:
        return find_on_hub(KREA, KREA.repo, apart, token=None, local_files_only=True)
    except WeightsNotFound as error:
        with contextlib.suppress(WeightsNotFound):
            return _cached_variant(apart)
        raise WeightsNotFound(
            f"no weights of {KREA.name} on this machine. To fetch its 33.7 GB: `krea-local "
            f"download`, or name it: model='{KREA.alias}' (--model {KREA.alias}). To use a folder, "
            f"name that, or set {MODEL_VARIABLE}. To try without weights: model='mini' (weights.md "
            "has the details)"
        ) from error


def _cached_variant(apart: tuple[str, ...]) -> Checkpoint:
    """The default model with a variant's transformer, if that was fetched; its name tells.

    Raises:
        WeightsNotFound: none was.
    """
    apart = ("transformer", *apart)
    checkpoint = find_on_hub(KREA, KREA.repo, apart, token=None, local_files_only=True)
    for variant in VARIANTS.values():
        with contextlib.suppress(WeightsNotFound):
            folder = snapshot(variant.repo, [variant.file], token=None, local_files_only=True)
            file = folder / variant.file
            if file.is_file():
                return replace(checkpoint, label=file.stem, transformer_file=file)
    raise WeightsNotFound(f"no transformer in {str(checkpoint.folder)!r}")


def _find_folder(path: Path) -> Checkpoint:
    refuse_pickle(path)
    if path.is_file():
        raise UnsupportedModel(
            f"{str(path)!r} is not a file of weights ({', '.join(SINGLE_FILES)}): give one, or the "
            "folder with transformer/, vae/, text_encoder/ … (weights.md shows it)"
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


def _guess_family(name: str, default: Family = KREA) -> Family:
    """The family that a file's, folder's or repository's name speaks of; `default` if none."""
    lowered = name.lower()
    if "srpo" in lowered:
        return SRPO
    if "krea" in lowered:
        return KREA
    if re.search(r"flux[.-]?1[.-]dev", lowered):
        return DEV
    return default


def find_on_hub(
    family: Family,
    repo: str,
    apart: tuple[str, ...] = (),
    *,
    token: str | None,
    local_files_only: bool = False,
) -> Checkpoint:
    """The checkpoint of a hub id, without the weights of those `apart`; raises as `find`."""
    *own, folder = [
        snapshot(repository, patterns, token=token, local_files_only=local_files_only)
        for repository, patterns in needed(family, repo, apart)
    ]
    file = own[0] / SRPO_FILE if own else None
    return Checkpoint(repo, family, folder, file, offline=local_files_only)


def snapshot(repo: str, patterns: list[str], *, token: str | None, local_files_only: bool) -> Path:
    """The folder in the hub's cache of a repository's files; raises as `find`."""
    from huggingface_hub import snapshot_download

    with told_of_hub(repo):
        return Path(
            snapshot_download(
                repo,
                allow_patterns=patterns,
                ignore_patterns=IGNORED,
                token=token,
                local_files_only=local_files_only,
            )
        )


@contextlib.contextmanager
def told_of_hub(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises about `repo` into our errors."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{repo}"
    login = "run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except KreaError:
        raise
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
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise LicenceRequired(
                f"the hub refuses {repo} to this token ({error.response.status_code}): {login} "
                "with a token that may read gated repositories"
            ) from error
        # HTTP errors, a full disk, and the transport's own errors, whose classes depend on the HTTP
        # library that the hub's client happens to use.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsNotFound(
            f"could not fetch {repo}: {reason[0]} (run it again: what is whole is kept)"
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
