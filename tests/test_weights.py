from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub

from krea_local import (
    LicenceRequired,
    UnsupportedModel,
    WeightsInvalid,
    WeightsNotFound,
    loading,
    weights,
)
from krea_local.weights import DEV, KREA, SRPO

ROOT = Path(__file__).parents[1]


def test_tiny_is_made_once_a_process_and_is_a_folder() -> None:
    checkpoint = weights.find("tiny")
    assert (checkpoint.label, checkpoint.family) == ("tiny", KREA)
    assert (checkpoint.folder / "model_index.json").exists()
    assert weights.find("tiny").folder == checkpoint.folder


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("FLUX.1-Krea-dev", KREA),
        ("my-model", KREA),
        ("FLUX.1-dev", DEV),
        ("flux1-dev-bf16", DEV),
        ("FLUX.1-SRPO-dev", SRPO),
    ],
)
def test_a_folders_name_tells_its_family(tmp_path: Path, name: str, family: object) -> None:
    (tmp_path / name).mkdir()
    for source in (tmp_path / name, str(tmp_path / name), f"{tmp_path / name}/"):
        checkpoint = weights.find(source)
        assert checkpoint.family == family
        assert checkpoint.label == name
        assert checkpoint.offline


def test_a_folder_of_the_hubs_cache_is_known_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    checkpoint = weights.find(folder)
    assert (checkpoint.label, checkpoint.family) == ("black-forest-labs/FLUX.1-dev", DEV)


def test_the_variable_sets_the_default(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KREA_LOCAL_MODEL", str(tiny_folder))
    assert weights.find().folder == tiny_folder


def test_without_a_name_nothing_is_fetched_and_every_way_is_told() -> None:
    with pytest.raises(
        WeightsNotFound, match=r"33.7 GB.*`krea-local download`.*KREA_LOCAL_MODEL.*model='mini'"
    ):
        weights.find()


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("black-forest-labs/FLUX.2-dev", "FLUX.2"),
        ("black-forest-labs/FLUX.2-klein-4B", "FLUX.2"),
        ("FLUX.2-dev", "FLUX.2"),
        ("krea2", "Krea 2"),
        ("krea/Krea-2-dev", "Krea 2"),
        ("black-forest-labs/FLUX.1-schnell", r"FLUX.1 \[schnell\]"),
        ("black-forest-labs/FLUX.1-Kontext-dev", r"FLUX.1 Kontext \[dev\]"),
        ("black-forest-labs/FLUX.1-Fill-dev", r"FLUX.1 Fill \[dev\]"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion"),
    ],
)
def test_other_models_are_refused_by_name(name: str, model: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"is {model}.*FLUX.1 Krea \[dev\]"):
        weights.find(name)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("foo", WeightsNotFound, "no model 'foo': give a folder, a hub id, 'krea'"),
        ("./foo", WeightsNotFound, "no folder 'foo'"),
        ("/nowhere/at/all", WeightsNotFound, "no folder '/nowhere/at/all'"),
        ("a/b/c", WeightsNotFound, "no folder 'a/b/c'"),
        ("some/where", WeightsNotFound, "some/where is not in the hub's cache"),
        ("krea", WeightsNotFound, "black-forest-labs/FLUX.1-Krea-dev is not in the hub's cache"),
    ],
)
def test_what_is_not_there_is_told(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weights.find(name)


def test_other_files_and_pickles_are_refused(tmp_path: Path) -> None:
    for name, error in (
        ("flux1-krea-dev.zip", UnsupportedModel),
        ("flux1-krea-dev.ckpt", WeightsInvalid),
        ("model.bin", WeightsInvalid),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(error, match=name):
            weights.find(tmp_path / name)


def test_the_safety_checker_is_looked_for_in_the_checkpoint_then_by_name(
    tiny_folder: Path, tmp_path: Path
) -> None:
    checkpoint = weights.find(tiny_folder)
    repo = weights.SAFETY_CHECKER_REPO
    assert weights.find_safety_checker(checkpoint, repo) == tiny_folder / "safety_checker"
    assert weights.find_safety_checker(checkpoint, tmp_path) == tmp_path
    bare = weights.find(tmp_path)
    with pytest.raises(
        WeightsNotFound, match=r"krea-local download Falcons.*enable_safety_checker=False"
    ):
        weights.find_safety_checker(bare, repo)


def run(code: str, hub: Hub, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python whose hub is `hub`; huggingface_hub reads these variables at its import."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hub_id_is_fetched_drawn_with_and_then_found_offline(
    tiny_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source, ignore=shutil.ignore_patterns("safety_checker"))
    (source / "flux1-krea-dev.safetensors").write_bytes(b"24 GB that nobody needs")
    repos = {KREA.repo: source, weights.SAFETY_CHECKER_REPO: tiny_folder / "safety_checker"}
    draw = """
import krea_local
result = krea_local.txt2img(
    "a fox", image_size={"width": 64, "height": 64}, num_inference_steps=1, seed=1, model="krea"
)
print(result.images[0].info["krea_local"]["model"], result.has_nsfw_concepts)
"""
    with Hub(repos, gated=(KREA.repo,)).running() as hub:
        drawn = run(draw, hub, tmp_path, HF_TOKEN="accepted")
        assert drawn.stdout == f"{KREA.repo} (False,)\n", drawn.stderr
        assert "Fetching" not in drawn.stderr  # bars are for terminals
        assert f"{KREA.repo}/flux1-krea-dev.safetensors" not in hub.fetched
        assert len(hub.fetched) == 18
    # Now by default, without a name and without a hub.
    found = run("from krea_local import weights; print(weights.find().label)", hub, tmp_path)
    assert found.stdout == f"{KREA.repo}\n", found.stderr


def test_a_gated_or_missing_repository_tells_what_to_click_and_type(
    tiny_folder: Path, tmp_path: Path
) -> None:
    code = """
import krea_local
from krea_local import weights
for name in ("krea", "dev"):
    try:
        weights.find(name)
    except krea_local.WeightsError as error:
        print(type(error).__name__, error)
"""
    with Hub({KREA.repo: tiny_folder}, gated=(KREA.repo,)).running() as hub:
        answer = run(code, hub, tmp_path)
    gated, missing = answer.stdout.splitlines()
    assert gated.startswith(LicenceRequired.__name__)
    assert f"accept its licence at https://huggingface.co/{KREA.repo}" in gated
    assert "hf auth login" in gated
    assert "HF_TOKEN" in gated
    assert missing.startswith(WeightsNotFound.__name__)
    assert f"no repository https://huggingface.co/{DEV.repo}" in missing
    unreachable = run(code, hub, tmp_path)  # the server is gone
    assert unreachable.stdout.count("WeightsNotFound") == 2, unreachable.stderr


def test_a_model_from_a_folder_never_asks_the_hub(tiny_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("safety_checker"))
    code = f"""
import krea_local
from krea_local import weights
try:
    weights.find_safety_checker(weights.find({str(bare)!r}), weights.SAFETY_CHECKER_REPO)
except krea_local.WeightsNotFound as error:
    print(error)
try:
    weights.find()
except krea_local.WeightsNotFound as error:
    print(error)
"""
    repos = {KREA.repo: tiny_folder, weights.SAFETY_CHECKER_REPO: tiny_folder / "safety_checker"}
    with Hub(repos).running() as hub:
        answer = run(code, hub, tmp_path)
        named = run(
            "from krea_local.cli import main; main(['info'])",
            hub,
            tmp_path,
            KREA_LOCAL_MODEL="krea",
        )
        assert "is not in the hub's cache" in named.stdout, named.stderr
    assert "enable_safety_checker=False" in answer.stdout, answer.stderr
    assert "model='mini'" in answer.stdout
    assert hub.asked == []


def test_a_connection_that_breaks_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class RemoteProtocolError(Exception):
        """As the hub's HTTP library raises it, whichever that is."""

    def broken(*_: object, **__: object) -> None:
        raise RemoteProtocolError("peer closed connection\nwithout sending complete message body")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(
        WeightsNotFound, match=r"peer closed connection \(run it again: what is whole"
    ):
        weights.find("krea")


def test_srpo_takes_its_transformer_alone_and_the_rest_from_dev(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    original = tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(original)
    state["proj_out.bias"] += 1
    srpo = tmp_path / "srpo"
    srpo.mkdir()
    # SRPO's file is float32, in the diffusers layout, without a configuration.
    save_file({name: t.float() for name, t in state.items()}, srpo / weights.SRPO_FILE)
    code = """
from krea_local import weights
checkpoint = weights.find("srpo")
print(checkpoint.label, checkpoint.folder, checkpoint.transformer_file, sep="\\n")
"""
    with Hub({SRPO.repo: srpo, DEV.repo: tiny_folder}).running() as hub:
        answer = run(code, hub, tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert not any(f"{DEV.repo}/transformer/diffusion" in name for name in hub.fetched)
    label, folder, file = answer.stdout.splitlines()
    assert label == "tencent/SRPO"
    models = loading.load_models(
        weights.Checkpoint(label, SRPO, Path(folder), Path(file)),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert SRPO.guidance_scale == 4.5
    assert models.transformer.dtype == torch.bfloat16
    assert torch.equal(models.transformer.final_layer.linear.bias, state["proj_out.bias"])
