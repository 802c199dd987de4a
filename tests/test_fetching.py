from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub import COMMIT, Hub, checksum

import krea_local
from krea_local import (
    InvalidRequest,
    LicenceRequired,
    OutputFailed,
    UnsupportedModel,
    WeightsInvalid,
    WeightsNotFound,
    cli,
    fetching,
    loading,
    transfer,
    weights,
)
from krea_local.checksums import noted_checksum
from krea_local.weights import DEV, KREA, SAFETY_CHECKER_REPO, SRPO

ROOT = Path(__file__).parents[1]
LARGE = "transformer/diffusion_pytorch_model.safetensors"
STORAGE = "models--black-forest-labs--FLUX.1-Krea-dev"
CHECKER_FILES = 3
PATIENCE = 300  # seconds: the machine may be busy; it takes five


@pytest.fixture(scope="session")
def source(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds: also what nobody needs."""
    folder = tmp_path_factory.mktemp("hub") / "source"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("safety_checker"))
    (folder / "flux1-krea-dev.safetensors").write_bytes(b"24 GB that nobody needs")
    (folder / "README.md").write_text("nor this")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, never read")
    return folder


@pytest.fixture
def hub(
    source: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A hub, and an empty cache; without waiting between tries."""
    constants = huggingface_hub.constants
    repos = {KREA.repo: source, SAFETY_CHECKER_REPO: tiny_folder / "safety_checker"}
    with Hub(repos).running() as running:
        for name, value in (
            ("HF_HUB_OFFLINE", False),
            ("ENDPOINT", running.url),
            (
                "HUGGINGFACE_CO_URL_TEMPLATE",
                running.url + "/{repo_id}/resolve/{revision}/{filename}",
            ),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transfer, "WAITS", (0.0,) * 3)
        monkeypatch.chdir(tmp_path)
        yield running
        huggingface_hub.close_session()


def wanted(source: Path) -> set[str]:
    """The files of the model that should be fetched, without the checker's."""
    names = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in (".bin", ".md")
    }
    return names - {"flux1-krea-dev.safetensors"}


def partial_of(name: str, source: Path, cache: Path) -> Path:
    checksum_ = checksum(name, (source / name).read_bytes())
    return cache / STORAGE / "blobs" / f"{checksum_}.incomplete"


def assert_same(folder: Path, source: Path) -> None:
    for name in wanted(source):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_only_what_is_needed_is_fetched_and_found_by_name(
    hub: Hub, source: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = krea_local.download(progress=False)
    assert_same(folder, source)
    checker = {f"{SAFETY_CHECKER_REPO}/{name}" for name in weights.SAFETY_CHECKER_FILES}
    assert set(hub.fetched) == {f"{KREA.repo}/{name}" for name in wanted(source)} | checker
    assert len(hub.fetched) == len(set(hub.fetched))
    checkpoint = weights.find("krea", fetch=False)
    assert checkpoint.folder == folder == tmp_path / "cache" / STORAGE / "snapshots" / COMMIT
    assert weights.find(fetch=False).folder == folder  # and without a name
    found = weights.find_safety_checker(checkpoint, SAFETY_CHECKER_REPO)
    name = "model.safetensors"
    assert (found / name).read_bytes() == (tiny_folder / "safety_checker" / name).read_bytes()
    assert not list(tmp_path.rglob("*.incomplete"))
    assert (folder / LARGE).is_symlink()  # into the cache's own layout


def test_a_second_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    for folder in (None, tmp_path / "folder"):
        first = krea_local.download("krea", folder=folder, progress=False)
        hub.fetched.clear()
        planned = fetching.plan("krea", folder=folder)
        assert (planned.missing, planned.unsure, planned.bytes_left) == ((), (), 0)
        assert "all " in planned.describe()
        assert krea_local.download("krea", folder=folder, progress=False) == first
        assert hub.fetched == []


def test_what_the_hubs_own_client_fetched_is_known(hub: Hub, tmp_path: Path) -> None:
    local = tmp_path / "local"
    for options in ({}, {"local_dir": local}):
        with weights.hub_bars(show=False):
            huggingface_hub.snapshot_download(KREA.repo, allow_patterns=weights.PATTERNS, **options)
    hub.fetched.clear()
    krea_local.download("krea", safety_checker=False, progress=False)
    krea_local.download("krea", folder=local, safety_checker=False, progress=False)
    assert hub.fetched == []


def test_a_folder_is_the_layout_and_its_own_safety_checker(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    folder = krea_local.download("krea", folder="models/krea", progress=False)
    assert folder == tmp_path / "models" / "krea"
    assert_same(folder, source)
    checkpoint = weights.find(folder)
    loading.check_layout(checkpoint)
    assert weights.find_safety_checker(checkpoint, SAFETY_CHECKER_REPO) == folder / "safety_checker"
    assert not (tmp_path / "cache").exists()
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    assert noted_checksum(folder, LARGE) == checksum(LARGE, (source / LARGE).read_bytes())
    # The hub's own client knows it again.
    hub.fetched.clear()
    with weights.hub_bars(show=False):
        huggingface_hub.snapshot_download(
            KREA.repo, allow_patterns=weights.PATTERNS, ignore_patterns="*.bin", local_dir=folder
        )
    assert hub.fetched == []


def test_what_the_cache_holds_is_copied_to_a_folder_if_it_is_right(hub: Hub, source: Path) -> None:
    cached = krea_local.download("krea", progress=False)
    hub.fetched.clear()
    assert_same(krea_local.download("krea", folder="a", progress=False), source)
    assert hub.fetched == []
    data = (cached / LARGE).read_bytes()
    (cached / LARGE).write_bytes(data[:-1] + b"!")
    assert_same(krea_local.download("krea", folder="b", progress=False), source)
    assert hub.fetched == [f"{KREA.repo}/{LARGE}"]


@pytest.mark.parametrize("folder", [None, "folder"])
@pytest.mark.parametrize("name", ["fp8", "gguf-q8"])
def test_a_variant_is_one_file_and_the_rest_of_the_model(
    folder: str | None, name: str, hub: Hub, source: Path, tmp_path: Path
) -> None:
    variant = weights.VARIANTS[name]
    repackaged = tmp_path / "repackaged"
    (repackaged / variant.file).parent.mkdir(parents=True)
    content = (source / LARGE).read_bytes()
    (repackaged / variant.file).write_bytes(content)
    (repackaged / "other.gguf").write_bytes(b"a kind that nobody asked for")
    hub.repos = {**hub.repos, variant.repo: repackaged}
    file = krea_local.download("krea", variant=name, folder=folder, progress=False)
    assert file.read_bytes() == content
    assert f"{variant.repo}/{variant.file}" in hub.fetched
    assert f"{variant.repo}/other.gguf" not in hub.fetched
    assert f"{KREA.repo}/{LARGE}" not in hub.fetched
    assert f"{KREA.repo}/transformer/config.json" in hub.fetched
    checkpoint = weights.find(file, fetch=False)
    assert checkpoint.transformer_file == file
    loading.check_layout(checkpoint)
    assert checkpoint.family == KREA
    if folder:
        assert file.parent == tmp_path / folder
    else:  # found without a name, and called by what it is
        found = weights.find(fetch=False)
        assert (found.transformer_file, found.label) == (file, file.stem)
    hub.fetched.clear()
    assert krea_local.download("krea", variant=name, folder=folder, progress=False) == file
    assert hub.fetched == []


def test_a_variant_that_is_not_known_is_refused(hub: Hub) -> None:
    with pytest.raises(InvalidRequest, match=r"variant='fp4': should be one of 'bf16', 'fp8', 'gg"):
        krea_local.download("krea", variant="fp4")
    with pytest.raises(InvalidRequest, match=r"'fp8': is known of FLUX.1 Krea \[dev\] alone"):
        krea_local.download("dev", variant="fp8")
    with pytest.raises(InvalidRequest, match="the safety checker has none"):
        krea_local.download(SAFETY_CHECKER_REPO, variant="fp8")
    assert hub.asked == []


@pytest.mark.parametrize("folder", [None, "folder"])
def test_an_empty_file_is_a_file(
    hub: Hub, source: Path, tmp_path: Path, folder: str | None
) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "vae" / "empty.txt").write_bytes(b"")
    hub.repos = {**hub.repos, KREA.repo: other}
    for fetched in (len(wanted(other)), 0):
        hub.fetched.clear()
        found = krea_local.download("krea", folder=folder, safety_checker=False, progress=False)
        assert (found / "vae" / "empty.txt").read_bytes() == b""
        assert len(hub.fetched) in (fetched, fetched - 1)  # there is nothing of it to ask for


def test_the_safety_checker_is_left_out_or_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    krea_local.download("krea", folder="a", safety_checker=False, progress=False)
    assert not (tmp_path / "a" / "safety_checker").exists()
    hub.fetched.clear()
    krea_local.download(SAFETY_CHECKER_REPO, folder="a", progress=False)
    assert len(hub.fetched) == CHECKER_FILES
    assert (tmp_path / "a" / "safety_checker" / "model.safetensors").exists()
    hub.fetched.clear()
    folder = krea_local.download(SAFETY_CHECKER_REPO, safety_checker=False, progress=False)
    assert len(hub.fetched) == CHECKER_FILES
    assert (folder / "preprocessor_config.json").exists()


def test_srpo_in_a_folder_is_its_transformer_among_devs_folders(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    srpo = tmp_path / "srpo-source"
    srpo.mkdir()
    shutil.copy(source / LARGE, srpo / weights.SRPO_FILE)
    hub.repos = {**hub.repos, SRPO.repo: srpo, DEV.repo: source}
    folder = krea_local.download("srpo", folder="FLUX.1-SRPO", progress=False)
    assert f"{DEV.repo}/{LARGE}" not in hub.fetched
    assert f"{SRPO.repo}/{weights.SRPO_FILE}" in hub.fetched
    assert_same(folder, source)
    loading.check_layout(weights.find(folder))
    assert weights.find(folder).family == SRPO
    krea_local.download("srpo", progress=False)
    checkpoint = weights.find("srpo", fetch=False)
    assert checkpoint.transformer_file is not None
    assert checkpoint.transformer_file.read_bytes() == (source / LARGE).read_bytes()


@pytest.mark.parametrize("folder", [None, "folder"])
def test_broken_connections_go_on_where_they_broke(
    hub: Hub, source: Path, folder: str | None
) -> None:
    hub.breaks[LARGE] = [50_000, 100_000, 150_000]
    found = krea_local.download("krea", folder=folder, progress=False)
    assert_same(found, source)
    assert hub.ranges[LARGE] == [0, 50_000, 100_000, 150_000]


def test_a_hub_that_starts_over_is_followed(hub: Hub, source: Path) -> None:
    hub.breaks[LARGE] = [50_000]
    hub.ignores_ranges = True
    assert_same(krea_local.download("krea", progress=False), source)
    assert hub.ranges[LARGE] == [0, 50_000]


def test_a_hub_that_never_gets_further_is_given_up(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.breaks[LARGE] = [50_000] * 20
    with pytest.raises(WeightsNotFound, match=rf"fetch {KREA.repo}/{LARGE}: .*goes on where"):
        krea_local.download("krea", progress=False)
    assert len(hub.ranges[LARGE]) == 2 + len(transfer.WAITS)
    partial = partial_of(LARGE, source, tmp_path / "cache")
    assert partial.stat().st_size == 50_000
    hub.breaks.clear()
    hub.ranges.clear()
    planned = fetching.plan("krea")
    assert [file.done for file in planned.missing if file.name == LARGE] == [50_000]
    krea_local.download("krea", progress=False)
    assert hub.ranges[LARGE] == [50_000]


def test_a_hub_that_sends_less_than_it_lists_is_asked_for_the_rest(hub: Hub, source: Path) -> None:
    data = (source / LARGE).read_bytes()
    hub.sends[LARGE] = data[:70_000]  # as if that were all: a whole answer, by its own length
    with pytest.raises(WeightsNotFound, match="sent less than the file's length"):
        krea_local.download("krea", progress=False)
    hub.sends.clear()
    assert_same(krea_local.download("krea", progress=False), source)


def test_a_hub_that_sends_more_than_it_lists_is_refused(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    data = (source / LARGE).read_bytes()
    hub.sends[LARGE] = data + bytes(3_000_000)
    with pytest.raises(
        WeightsInvalid, match=rf"more of {KREA.repo}/{LARGE} than the {len(data):,}"
    ):
        krea_local.download("krea", progress=False)
    for file in tmp_path.rglob("*.incomplete"):
        assert file.stat().st_size <= len(data)


@pytest.mark.parametrize("name", [LARGE, "model_index.json"])
@pytest.mark.parametrize("folder", [None, "folder"])
def test_wrong_content_is_named_removed_and_fetched_anew(
    hub: Hub, source: Path, tmp_path: Path, folder: str | None, name: str
) -> None:
    data = bytearray((source / name).read_bytes())
    data[len(data) // 2] ^= 1
    hub.sends[name] = bytes(data)
    with pytest.raises(
        WeightsInvalid, match=rf"is not {KREA.repo}/{name}: .*removed, run it again"
    ):
        krea_local.download("krea", folder=folder, progress=False)
    good = checksum(name, (source / name).read_bytes())
    assert not (tmp_path / "cache" / STORAGE / "blobs" / good).exists()
    assert not (tmp_path / "folder" / name).exists()
    hub.sends.clear()
    hub.fetched.clear()
    assert_same(krea_local.download("krea", folder=folder, progress=False), source)
    assert hub.fetched == [f"{KREA.repo}/{name}"]


def test_a_damaged_partial_file_does_not_get_into_the_cache(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    hub.breaks[LARGE] = [50_000] * 20
    with pytest.raises(WeightsNotFound):
        krea_local.download("krea", progress=False)
    partial = partial_of(LARGE, source, tmp_path / "cache")
    partial.write_bytes(bytes(50_000))
    hub.breaks.clear()
    with pytest.raises(WeightsInvalid, match="its checksum is"):
        krea_local.download("krea", progress=False)
    assert not partial.exists()


def test_a_truncated_file_of_the_cache_is_fetched_anew(hub: Hub, source: Path) -> None:
    folder = krea_local.download("krea", progress=False)
    blob = (folder / LARGE).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    hub.fetched.clear()
    assert_same(krea_local.download("krea", progress=False), source)
    assert hub.fetched == [f"{KREA.repo}/{LARGE}"]


def test_files_of_unknown_origin_are_taken_if_right_and_never_replaced(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(source, folder)
    krea_local.download("krea", folder=folder, safety_checker=False, progress=False)
    assert hub.fetched == []
    assert fetching.plan("krea", folder=folder, safety_checker=False).unsure == ()
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    data = (mine / LARGE).read_bytes()
    for changed in (data[:-1] + b"!", data + b"more"):
        (mine / LARGE).write_bytes(changed)
        with pytest.raises((WeightsInvalid, OutputFailed), match=f"{LARGE}' is .*delete it"):
            krea_local.download("krea", folder=mine, progress=False)
        assert (mine / LARGE).read_bytes() == changed
        assert hub.fetched == []


@pytest.mark.parametrize(
    ("status", "headers", "error", "message"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, LicenceRequired, "accept its licence at https://"),
        (403, {"X-Error-Code": "GatedRepo"}, LicenceRequired, "HF_TOKEN"),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            LicenceRequired,
            r"refuses .* to this token \(401\)",
        ),
        (403, {}, LicenceRequired, r"refuses .* to this token \(403\)"),
        (404, {"X-Error-Code": "RepoNotFound"}, WeightsNotFound, "no repository https://"),
        (404, {"X-Error-Code": "EntryNotFound"}, WeightsNotFound, "could not fetch .*404"),
        (429, {}, WeightsNotFound, "could not fetch .*429 Too Many Requests"),
        (500, {}, WeightsNotFound, "could not fetch .*500"),
    ],
)
@pytest.mark.parametrize("name", ["api", LARGE])
def test_refusals_tell_what_to_do(
    hub: Hub,
    name: str,
    status: int,
    headers: dict[str, str],
    error: type[Exception],
    message: str,
) -> None:
    hub.says[name] = [(status, headers)] * 10
    with pytest.raises(error, match=message):
        krea_local.download("krea", progress=False)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_fault_is_waited_for(hub: Hub, source: Path, status: int) -> None:
    hub.says[LARGE] = [(status, {})] * 2
    assert_same(krea_local.download("krea", progress=False), source)


def test_the_token_stays_with_the_hub(hub: Hub, source: Path, tmp_path: Path) -> None:
    with Hub(hub.repos).running() as elsewhere:
        where = f"{elsewhere.url}/{KREA.repo}/resolve/{COMMIT}/{LARGE}"
        elsewhere.breaks[LARGE] = [50_000]
        hub.says[LARGE] = [(302, {"Location": where})] * 2
        folder = krea_local.download("krea", token="accepted", progress=False)
    assert_same(folder, source)
    assert elsewhere.ranges[LARGE] == [0, 50_000]
    assert elsewhere.tokens == {None}
    assert "Bearer accepted" in hub.tokens


def test_the_token_is_sent(hub: Hub, source: Path) -> None:
    hub.gated = (KREA.repo,)
    with pytest.raises(LicenceRequired, match=f"accept its licence at https://.*{KREA.repo}"):
        krea_local.download("krea", progress=False)
    assert_same(krea_local.download("krea", token="accepted", progress=False), source)


@pytest.mark.parametrize("folder", [None, "folder"])
def test_too_small_a_disk_is_told_before_anything_is_fetched(
    hub: Hub,
    source: Path,
    tmp_path: Path,
    folder: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    looked: list[Path] = []

    def disk_usage(path: Path) -> object:
        looked.append(path)
        return usage(0, 0, 12_345_678)

    sizes = fetching.plan("krea", folder=folder).bytes_left
    assert sizes > sum((source / name).stat().st_size for name in wanted(source))
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    krea_local.download("krea", folder=folder, progress=False)  # enough
    shutil.rmtree(tmp_path / (folder or "cache"))
    hub.fetched.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, sizes - 1))
    shown = f"{sizes / 1e6:.1f} MB"
    with pytest.raises(OutputFailed, match=rf"{shown} are to be .*, {shown} .*--folder.*HF_HOME"):
        krea_local.download("krea", folder=folder, progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, sizes))
    krea_local.download("krea", folder=folder, progress=False)
    assert set(looked) == {tmp_path}  # of the nearest folder that is there


def test_a_partial_file_needs_only_the_rest_of_the_disk(hub: Hub) -> None:
    whole = fetching.plan("krea").bytes_left
    hub.breaks[LARGE] = [50_000] * 20
    with pytest.raises(WeightsNotFound):
        krea_local.download("krea", progress=False)
    left = {file.name: file.size - file.done for file in fetching.plan("krea").missing}
    assert (
        left[LARGE]
        == next(file.size for file in fetching.plan("krea").files if file.name == LARGE) - 50_000
    )
    assert fetching.plan("krea").bytes_left < whole - 49_999


def test_a_full_disk_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_append", full)
    with pytest.raises(OutputFailed, match=r"cannot write into '.*cache': No space left"):
        krea_local.download("krea", progress=False)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("tiny", InvalidRequest, "'tiny': is built in"),
        ("mini", InvalidRequest, "'mini': is built in"),
        (3, InvalidRequest, "model=3: should be"),
        ("/tmp", InvalidRequest, "'/tmp': is a path"),
        ("nothing", WeightsNotFound, "no model 'nothing'"),
        ("black-forest-labs/FLUX.2-dev", UnsupportedModel, "is FLUX.2"),
        ("some/where", WeightsNotFound, "no repository https://huggingface.co/some/where"),
        (
            SAFETY_CHECKER_REPO.replace("nsfw", "sfw"),
            WeightsNotFound,
            "no repository",
        ),
    ],
)
def test_what_cannot_be_fetched_is_refused(
    hub: Hub, model: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        krea_local.download(model, progress=False)
    assert hub.fetched == []


def test_a_repository_of_another_layout_is_refused_before_it_is_fetched(
    hub: Hub, tiny_folder: Path
) -> None:
    hub.repos = {**hub.repos, "some/lora": tiny_folder / "transformer"}
    with pytest.raises(WeightsNotFound, match="some/lora has no transformer/: "):
        krea_local.download("some/lora", progress=False)
    assert hub.fetched == []


def test_names_that_lead_elsewhere_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    original = huggingface_hub.HfApi.model_info

    def model_info(*arguments: object, **options: object) -> object:
        info = original(*arguments, **options)  # type: ignore[arg-type]
        info.siblings[-1].rfilename = "vae/../../../evil.json"
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(
        WeightsInvalid, match=r"'vae/../../../evil.json', which would lie elsewhere"
    ):
        krea_local.download("krea", folder="folder", progress=False)
    assert hub.fetched == []


def test_offline_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFound, match="HF_HUB_OFFLINE is set"):
        krea_local.download("krea")
    assert hub.asked == []


def test_a_file_where_the_folder_should_be_is_told(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="is not a folder"):
        krea_local.download("krea", folder="file")


def test_two_at_once_do_not_write_one_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    planned = fetching.plan("krea")
    monkeypatch.setattr(transfer, "LOCK_SECONDS", 0.1)
    with FileLock(planned.missing[0].lock), pytest.raises(OutputFailed, match="another process"):
        fetching.fetch(planned, progress=False)


def test_the_command_says_what_it_will_do_and_what_to_run_next(
    hub: Hub, capsys: pytest.CaptureFixture[str], source: Path
) -> None:
    assert cli.main(["download"]) == 0
    out, err = capsys.readouterr()
    assert out == 'krea-local txt2img "a red fox in fresh snow" --model krea\n'
    count = len(wanted(source)) + CHECKER_FILES
    assert f"{KREA.repo} and {SAFETY_CHECKER_REPO}: {count} of {count} files, " in err
    assert len(err.splitlines()) == 1
    hub.fetched.clear()
    assert cli.main(["download", "krea", "--folder", "krea", "--no-safety-checker"]) == 0
    assert capsys.readouterr().out.endswith("--model ./krea\n")
    assert not Path("krea/safety_checker").exists()
    assert cli.main(["download", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["download", "nothing"]) == 3
    assert cli.main(["download", "tiny"]) == 2
    hub.says["api"] = [(403, {"X-Error-Code": "GatedRepo"})]
    assert cli.main(["download"]) == 3
    assert "accept its licence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [(33_700_000_000, "33.7 GB"), (343_000_000, "0.34 GB"), (1_234_567, "1.2 MB"), (250, "0.2 kB")],
)
def test_sizes_are_told_for_people(count: int, text: str) -> None:
    assert fetching.gigabytes(count) == text


def test_ctrl_c_or_a_kill_in_the_middle_and_then_it_goes_on(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    data = (source / LARGE).read_bytes()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "krea_local", "download"]
    hub.pause = 0.2  # 50 kB a second
    partial = partial_of(LARGE, source, tmp_path / "hub")
    sizes = []
    deadline = time.monotonic() + PATIENCE
    for how in (signal.SIGINT, signal.SIGKILL):
        before = partial.stat().st_size if partial.exists() else 0
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                while (partial.stat().st_size if partial.exists() else 0) <= before:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                process.send_signal(how)
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
        assert out == ""
        if how is signal.SIGINT:
            assert process.returncode == 130
            assert "interrupted; run it again, and it goes on" in err
        assert "Traceback" not in err
        sizes.append(partial.stat().st_size)
    assert 0 < sizes[0] < sizes[1] < len(data)
    hub.pause = 0.0
    hub.ranges.clear()
    last = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert last.returncode == 0, last.stderr
    assert hub.ranges[LARGE] == [sizes[1]]
    folder = tmp_path / "hub" / STORAGE / "snapshots" / COMMIT
    assert (folder / LARGE).read_bytes() == data
