from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import krea_local
from krea_local import GenerationFailed, InvalidRequest, WeightsInvalid, WeightsNotFound
from krea_local.safety import SafetyChecker

SIZE = {"width": 64, "height": 64}
IMAGES = [
    Image.new("RGB", (64, 48), "red"),
    Image.radial_gradient("L").convert("RGB"),
    Image.linear_gradient("L").resize((300, 20)).convert("RGB"),
]


def checker(folder: Path, threshold: float = 0.5) -> SafetyChecker:
    return SafetyChecker(folder, device=torch.device("cpu"), threshold=threshold)


def change_bias(folder: Path, *values: float) -> None:
    file = folder / "safety_checker" / "model.safetensors"
    state = load_file(file)
    state["classifier.bias"] = torch.tensor(values).bfloat16()
    save_file(state, file, {"format": "pt"})


def test_probabilities_equal_the_transformers_pipeline(tiny_folder: Path) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessorPil, pipeline

    folder = tiny_folder / "safety_checker"
    classify = pipeline(
        "image-classification",
        model=ViTForImageClassification.from_pretrained(folder, dtype=torch.float32),
        image_processor=ViTImageProcessorPil.from_pretrained(folder),
        device="cpu",
    )
    ours = checker(folder).probabilities(IMAGES)
    for image, probability in zip(IMAGES, ours, strict=True):
        (theirs,) = (one["score"] for one in classify(image) if one["label"] == "nsfw")
        assert probability == pytest.approx(theirs, abs=1e-6)
    assert len(set(ours)) == 3


def test_the_tensor_names_of_the_published_file_are_read(broken_folder: Path) -> None:
    # Falconsai/nsfw_image_detection was written by transformers 4, which named them otherwise.
    folder = broken_folder / "safety_checker"
    expected = checker(folder).probabilities(IMAGES)
    renames = {
        "vit.layers.": "vit.encoder.layer.",
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    }
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for new, old in renames.items():
            name = name.replace(new, old)
        state[name] = tensor
    assert any(name == "vit.encoder.layer.0.attention.attention.query.weight" for name in state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert checker(folder).probabilities(IMAGES) == expected


def test_a_flagged_image_becomes_black_and_its_flag_true(broken_folder: Path) -> None:
    change_bias(broken_folder, -4.0, 4.0)
    model = krea_local.load(broken_folder, device="cpu")
    drawn = model.txt2img("a fox", image_size=SIZE, num_inference_steps=1, num_images=2)
    assert drawn.has_nsfw_concepts == (True, True)
    assert all(image.size == (64, 64) for image in drawn.images)
    assert all(image.getextrema() == ((0, 0),) * 3 for image in drawn.images)
    unchecked = model.txt2img(
        "a fox", image_size=SIZE, num_inference_steps=1, enable_safety_checker=False
    )
    assert unchecked.has_nsfw_concepts == (False,)
    assert unchecked.images[0].getextrema() != ((0, 0),) * 3
    assert unchecked.timings["safety"] == 0


def test_only_the_flagged_images_of_a_call_become_black(krea: krea_local.Krea) -> None:
    arguments = {"image_size": SIZE, "num_inference_steps": 1, "seed": 1, "num_images": 3}
    plain = krea.txt2img("a fox", **arguments)
    tool = krea._checker()
    probabilities = tool.probabilities(plain.images)
    second = sorted(probabilities)[1]
    before, tool.threshold = tool.threshold, second
    try:
        screened = krea.txt2img("a fox", **arguments)
    finally:
        tool.threshold = before
    assert list(screened.has_nsfw_concepts) == [p > second for p in probabilities]
    assert sum(screened.has_nsfw_concepts) == 1
    for image, original, flag in zip(
        screened.images, plain.images, screened.has_nsfw_concepts, strict=True
    ):
        assert image.tobytes() == (bytes(64 * 64 * 3) if flag else original.tobytes())


def test_the_class_is_found_by_its_name_and_not_by_its_place(broken_folder: Path) -> None:
    folder = broken_folder / "safety_checker"
    straight = checker(folder).probabilities(IMAGES)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "nsfw", "1": "normal"}, "label2id": {"nsfw": 0, "normal": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    swapped = checker(folder).probabilities(IMAGES)
    assert [a + b for a, b in zip(straight, swapped, strict=True)] == pytest.approx([1, 1, 1])
    config |= {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsInvalid, match=r"classes \['cat', 'dog'\], no 'nsfw'"):
        checker(folder)


def test_the_threshold_can_be_set(broken_folder: Path) -> None:
    change_bias(broken_folder, 0.0, 0.0)  # about one half either way
    arguments = {"image_size": SIZE, "num_inference_steps": 1, "seed": 1}
    for threshold, flag in ((0.0, True), (0.85, False), (1.0, False)):
        model = krea_local.load(broken_folder, device="cpu", safety_threshold=threshold)
        assert model.txt2img("a fox", **arguments).has_nsfw_concepts == (flag,)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidRequest, match="safety_threshold=.*between 0 and 1"):
            krea_local.load(broken_folder, safety_threshold=wrong)


@pytest.mark.parametrize(
    "file", ["config.json", "preprocessor_config.json", "model.safetensors", ""]
)
def test_a_missing_checker_is_an_error_before_anything_is_drawn(
    broken_folder: Path, file: str
) -> None:
    import shutil

    folder = broken_folder / "safety_checker"
    if file:
        (folder / file).unlink()
    else:
        shutil.rmtree(folder)
    model = krea_local.load(broken_folder, device="cpu")
    seen: list[object] = []
    missing = rf"{file.removeprefix('model')}.*enable_safety_checker=False"
    with pytest.raises(WeightsNotFound, match=missing):
        model.txt2img("a fox", image_size=SIZE, num_inference_steps=1, on_step=seen.append)
    assert seen == []
    assert model.txt2img(
        "a fox", image_size=SIZE, num_inference_steps=1, enable_safety_checker=False
    ).images


def test_a_checker_that_gives_nan_lets_nothing_pass(broken_folder: Path) -> None:
    change_bias(broken_folder, float("nan"), 0.0)
    model = krea_local.load(broken_folder, device="cpu")
    with pytest.raises(GenerationFailed, match="safety checker produced NaN"):
        model.txt2img("a fox", image_size=SIZE, num_inference_steps=1)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(
    "values",
    [
        {"size": {"height": 10**6, "width": 10**6}},
        {"size": {"height": 48, "width": 48}},
        {"size": {}},
        {"image_std": [0, 0, 0]},
        {"image_mean": [0.5]},
    ],
)
def test_a_checker_that_cannot_look_fails_before_anything_is_drawn(
    broken_folder: Path, values: dict[str, object]
) -> None:
    file = broken_folder / "safety_checker" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    model = krea_local.load(broken_folder, device="cpu")
    seen: list[object] = []
    with pytest.raises((WeightsInvalid, GenerationFailed), match=r"safety.checker"):
        model.txt2img("a fox", image_size=SIZE, num_inference_steps=1, on_step=seen.append)
    assert seen == []


def test_a_damaged_checker_is_an_error(broken_folder: Path) -> None:
    file = broken_folder / "safety_checker" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsInvalid, match=r"model.safetensors' is truncated"):
        checker(broken_folder / "safety_checker")


def test_another_checker_can_be_named(tiny_folder: Path, broken_folder: Path) -> None:
    change_bias(broken_folder, -4.0, 4.0)
    model = krea_local.load(
        tiny_folder, device="cpu", safety_checker=broken_folder / "safety_checker"
    )
    drawn = model.txt2img("a fox", image_size=SIZE, num_inference_steps=1)
    assert drawn.has_nsfw_concepts == (True,)
