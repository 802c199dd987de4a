"""Several processes, one picture: two on the CPU, which talk through gloo, against one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import krea_local
import krea_local.cli
from krea_local import DeviceUnavailable, InvalidRequest, cluster
from krea_local.pipeline import Krea

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_draws_one_picture_with_two_processes(
    tiny_folder: Path, krea: Krea, tmp_path: Path
) -> None:
    # 6 x 5 tokens, and 7 steps of which some are skipped: the processes have to decide alike.
    arguments = ["a red fox", "--model", str(tiny_folder), "--device", "cpu", "--json"]
    arguments += ["--image-size", "96x80", "--num-inference-steps", "9", "--acceleration", "high"]
    answer = run("-m", "krea_local", "txt2img", *arguments, "--output", str(tmp_path / "fox.png"))
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == 1  # the second process prints nothing
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]
    drawn = Image.open(tmp_path / "fox.png")
    recipe = krea_local.recipe.read_recipe(tmp_path / "fox.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", krea_local.KreaWarning)
        alone = krea.txt2img(
            "a red fox",
            image_size={"width": 96, "height": 80},
            num_inference_steps=9,
            acceleration="high",
            seed=recipe["seed"],  # drawn at random by the first process, and told to the second
        )
    difference = np.asarray(drawn, int) - np.asarray(alone.images[0], int)
    assert abs(difference).max() <= 1  # float32 sums in another order


def test_a_step_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP)
    answer = run(str(script))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("the same") == 2 * 4


STEP = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import dataclasses, torch
from krea_local import cluster
from krea_local.errors import InvalidRequest
from krea_local.skipping import Skipping, StepCache
from krea_local.transformer import Execution
from test_transformer import Inputs, distance, make

group = cluster.join("cpu")
assert (group.size, group.agree(10 + group.rank)) == (2, 10)
assert group.all_equal(("a", None))
assert not group.all_equal(group.rank)
ours, _ = make(num_attention_heads=4)
for batch, text, rows, columns in ((1, 4, 2, 2), (1, 5, 3, 3), (2, 3, 1, 5), (3, 1, 1, 1)):
    inputs = Inputs(batch=batch, text=text, rows=rows, columns=columns)
    wanted = ours(inputs.latents, inputs.condition(ours), 1)
    shared = ours.condition(
        inputs.prompt_embeds, inputs.pooled, timesteps=inputs.timesteps,
        guidance=torch.tensor([inputs.guidance]), group=group, **inputs.positions)
    assert len(shared.context) == (text + 1 - group.rank) // 2  # its part only
    found = ours(inputs.latents, shared, 1, Execution(group=group))
    assert distance(found, wanted) < 1e-5, distance(found, wanted)
    print("the same", flush=True)
for threshold, skips in ((0.1, False), (0.2, True)):
    # The first process saw no change, the second 30 %: they decide alike, by the mean.
    skipping = Skipping(threshold=threshold, first_full=1, last_full=0)
    cache = StepCache(skipping, torch.linspace(1, 0, 4), group)
    assert cache.skip(0, torch.ones(2, 3)) is None
    cache.keep(0, torch.ones(2, 3))
    assert (cache.skip(1, torch.ones(2, 3) + 0.3 * group.rank) is not None) == skips
try:
    group.check(3)
except InvalidRequest as error:
    assert "2 processes: should divide the model's 3 attention heads" in str(error)
else:
    raise AssertionError
group.leave()
"""


def test_a_process_that_fails_ends_them_all_before_a_wrong_picture_is_written(
    tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    output = tmp_path / "pictures"
    answer = run(str(script), str(tiny_folder), str(tmp_path / "prompts.txt"), str(output) + "/")
    assert answer.returncode != 0
    assert "memory does not suffice" in answer.stderr
    assert not output.exists() or list(output.iterdir()) == []


FAIL = """
import os, sys, torch
from krea_local import cli
from krea_local.transformer import FluxTransformer

forward, calls = FluxTransformer.forward, []
def failing(self, *arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    return forward(self, *arguments)
FluxTransformer.forward = failing
model, prompts, output = sys.argv[1:]
sys.exit(cli.main(
    ["txt2img", "--prompts", prompts, "--model", model, "--device", "cpu", "--output", output]
    + "--image-size 64x64 --num-inference-steps 4 --seed 1 --no-enable-safety-checker".split()))
"""


def test_after_a_failure_processes_draw_no_more(tiny_folder: Path) -> None:
    class Alone(cluster.Ulysses):
        def __init__(self) -> None:
            self.rank, self.size, self.device = 0, 1, torch.device("cpu")

        def agree(self, number: int) -> int:
            return number

        def all_equal(self, value: object) -> bool:
            return True

    def stop(progress: krea_local.Progress) -> None:
        raise krea_local.Cancelled("enough")

    model = krea_local.load(tiny_folder, dtype="float32", group=Alone())
    with pytest.raises(krea_local.Cancelled):
        model.txt2img("a fox", num_inference_steps=1, seed=1, on_step=stop)
    for _ in range(2):
        with pytest.raises(krea_local.GenerationFailed, match="places: start them again"):
            model.txt2img("a fox", num_inference_steps=1, seed=1)


def test_without_torchrun_there_is_nobody_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DeviceUnavailable, match="torchrun --nproc-per-node 2 -m krea_local"):
        cluster.join()


def test_more_processes_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceUnavailable, match="process 2 on this machine, which has 2 GPUs"):
        cluster.join()


def test_an_unknown_device_is_refused_before_anybody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    for device in ("gpu", "cuda:1"):
        with pytest.raises(InvalidRequest, match=f"'{device}': should be 'auto', 'cuda' or 'cpu'"):
            cluster.join(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="process 0 on this machine, which has 0 GPUs"):
        cluster.join("cuda")  # and not the CPU, unasked


def test_processes_asked_for_different_pictures_refuse(tiny_folder: Path) -> None:
    class Other(cluster.Ulysses):
        def __init__(self) -> None:
            self.rank, self.size, self.device = 0, 1, torch.device("cpu")

        def agree(self, number: int) -> int:
            return 5  # the first process's

        def all_equal(self, value: object) -> bool:
            asked, image = value
            assert (asked["prompt"], asked["seed"], image) == ("a fox", 5, None)
            return False

    model = krea_local.load(tiny_folder, dtype="float32", group=Other())
    with pytest.raises(InvalidRequest, match="asked for different pictures"):
        model.txt2img("a fox", num_inference_steps=1)


def test_prompts_from_standard_input_cannot_be_shared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert krea_local.cli.main(["txt2img", "--prompts", "-", "--model", "tiny"]) == 2
    assert "several processes cannot share it; name a file" in capsys.readouterr().err


def test_diffusers_transformer_is_not_shared(krea_diffusers: Krea) -> None:
    with pytest.raises(InvalidRequest, match="engine='diffusers' does not share"):
        Krea(
            krea_diffusers.models,
            device=torch.device("cpu"),
            label="",
            guidance_scale=1,
            load_safety_checker=krea_diffusers._load_safety_checker,
            group=object(),
        )
