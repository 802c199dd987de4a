from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import krea_local
from krea_local import DeviceUnavailable, InvalidRequest, WeightsNotFound, api

SMALL = {"width": 64, "height": 64}


def test_the_four_lines_of_the_readme(
    no_models_kept: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KREA_LOCAL_MODEL", "tiny")
    result = krea_local.txt2img(
        "a red fox in fresh snow", image_size="square", num_inference_steps=1, seed=7
    )
    result.images[0].save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (512, 512)
    redrawn = krea_local.img2img(
        "the same fox at dusk",
        image_url=str(tmp_path / "fox.png"),
        strength=0.1,
        num_inference_steps=10,
    )
    assert redrawn.images[0].size == (512, 512)


def test_the_model_is_loaded_once_and_one_is_kept(no_models_kept: None, tiny_folder: Path) -> None:
    arguments = {"image_size": SMALL, "num_inference_steps": 1, "seed": 1}
    first = krea_local.txt2img("a fox", model=tiny_folder, **arguments)
    kept = dict(api._kept_models)
    second = krea_local.txt2img("a fox", model=str(tiny_folder), **arguments)
    assert api._kept_models == kept
    assert first.images[0].tobytes() == second.images[0].tobytes()
    krea_local.txt2img("a fox", model="tiny", **arguments)
    assert list(api._kept_models) == ["tiny"]


def test_a_typo_does_not_cost_the_model_that_is_kept(no_models_kept: None) -> None:
    krea_local.txt2img("a fox", model="tiny", image_size=SMALL, num_inference_steps=1)
    (kept,) = api._kept_models.values()
    with pytest.raises(WeightsNotFound):
        krea_local.txt2img("a fox", model="./typo")
    assert list(api._kept_models.values()) == [kept]


def test_models_are_loaded_from_several_threads(tiny_folder: Path) -> None:
    """Their libraries patch classes of the whole process while they load."""
    found: list[bytes] = []

    def work() -> None:
        model = krea_local.load(tiny_folder, device="cpu")  # the checker is read at the first call
        drawn = model.txt2img("a fox", image_size=SMALL, num_inference_steps=1, seed=1)
        found.append(drawn.images[0].tobytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    assert len(found) == 5
    assert len(set(found)) == 1


def test_a_bad_request_does_not_load_the_model_first(no_models_kept: None) -> None:
    with pytest.raises(InvalidRequest, match="num_images=9"):
        krea_local.txt2img("a fox", num_images=9, model="/nowhere")
    with pytest.raises(InvalidRequest, match="strength=2"):
        krea_local.img2img("a fox", image_url="x", strength=2, model="/nowhere")
    with pytest.raises(WeightsNotFound):
        krea_local.txt2img("a fox", model="/nowhere")
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        krea_local.txt2img("a fox", steps=3)  # type: ignore[call-arg]


def test_the_hosted_pages_bodies_work_as_keyword_arguments(
    krea: krea_local.Krea, tmp_path: Path
) -> None:
    from test_schema import IMG2IMG_BODY, TXT2IMG_BODY

    cheap = {"num_inference_steps": 1, "image_size": "square"}
    drawn = krea.txt2img(**{**TXT2IMG_BODY, **cheap})
    assert drawn.prompt == TXT2IMG_BODY["prompt"]
    drawn.images[0].save(tmp_path / "cat.png")
    # The page's own picture is on the network.
    body = {**IMG2IMG_BODY, "image_url": str(tmp_path / "cat.png"), "num_inference_steps": 10}
    redrawn = krea.img2img(**body)
    answer = redrawn.to_api(sync_mode=True)
    assert answer["images"][0]["width"] == 512
    assert answer["images"][0]["content_type"] == "image/jpeg"


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "auto"])
def test_dtypes_are_taken_as_words_and_as_torchs(tiny_folder: Path, dtype: object) -> None:
    assert krea_local.load(tiny_folder, device="cpu", dtype=dtype).dtype == torch.float32


def test_a_model_is_a_name_or_a_path() -> None:
    with pytest.raises(InvalidRequest, match="model=5: should be a name or a path"):
        krea_local.load(5)  # type: ignore[arg-type]


def test_auto_is_bfloat16_on_cuda_and_float32_on_the_cpu() -> None:
    assert api.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert api.choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert api.choose_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there")
def test_cuda_without_a_gpu_says_so() -> None:
    assert api.choose_device("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(DeviceUnavailable, match=r"no CUDA GPU is there.*krea-local info"):
            krea_local.load("tiny", device=device)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "gpu"}, InvalidRequest, "device='gpu': should be 'auto', 'cuda', 'cuda:N'"),
        ({"device": 3.5}, InvalidRequest, "device=3.5"),
        ({"device": "meta"}, DeviceUnavailable, "only 'cuda' and 'cpu'"),
        ({"dtype": "float16"}, InvalidRequest, "dtype='float16': should be .*overflows"),
        ({"dtype": torch.float64}, InvalidRequest, "dtype='torch.float64': should be"),
        ({"dtype": None}, InvalidRequest, "dtype='None'"),
        (
            {"offload": "all"},
            InvalidRequest,
            "offload='all': should be one of 'none', 'modulation', 'model'",
        ),
        ({"engine": "fast"}, InvalidRequest, "engine='fast': should be 'native' or 'diffusers'"),
        ({"compile": "no"}, InvalidRequest, "compile='no': should be True or False"),
        ({"engine": "diffusers", "compile": True}, InvalidRequest, "is for engine='native'"),
        ({"engine": "diffusers", "offload": "modulation"}, InvalidRequest, "with 'diffusers'"),
        ({"acceleration": "max"}, InvalidRequest, "acceleration='max': should be one of 'none'"),
        ({"batch_size": 2.0}, InvalidRequest, "batch_size=2.0: should be 1, 2, 3 or 4"),
        ({"safety_threshold": "0.5"}, InvalidRequest, "safety_threshold='0.5': should be"),
        ({"safety_checker": None}, InvalidRequest, "safety_checker=None: should be a folder"),
        ({"model": "x" * 300}, WeightsNotFound, "cannot look at|no model"),
        ({"batch_size": 5}, InvalidRequest, "batch_size=5: should be 1, 2, 3 or 4"),
    ],
)
def test_a_bad_option_of_load_is_told(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        krea_local.load(**{"model": "tiny", **arguments})  # type: ignore[arg-type]
