"""The miniature in the box: small, whole, and it draws what it is asked to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import krea_local
from benchmarks.miniature import evaluate, scenes
from benchmarks.miniature.judge import nearest, things
from krea_local.preview import preview_image
from krea_local.recipe import read_recipe
from krea_local.schema import PRESETS
from krea_local.weights import COMPONENTS, FOLDERS, MINI_FOLDER

QUICK = {"num_inference_steps": 8, "enable_safety_checker": False}


@pytest.fixture(scope="module")
def mini() -> krea_local.Krea:
    return krea_local.load("mini", progress=False)


def draw(mini: krea_local.Krea, prompt: str, **parameters: object) -> scenes.Pixels:
    parameters = QUICK | {"seed": 1, "image_size": "square"} | parameters
    return evaluate.pixels_of(mini.txt2img(prompt, **parameters).images[0])  # type: ignore[arg-type]


def corner(pixels: scenes.Pixels) -> str:
    """The name of the colour near the four corners; the outermost pixels are a little off."""
    near, far = slice(8, 24), slice(-24, -8)
    parts = [pixels[rows, columns] for rows in (near, far) for columns in (near, far)]
    return nearest(np.median(np.stack(parts).reshape(-1, 3), axis=0))


def test_it_is_small_and_in_the_format_of_the_12_b_model() -> None:
    files = [file for file in MINI_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}
    index = json.loads((MINI_FOLDER / "model_index.json").read_bytes())
    assert set(FOLDERS) <= set(index)
    assert all((MINI_FOLDER / name).is_dir() for name in COMPONENTS)
    config = json.loads((MINI_FOLDER / "transformer" / "config.json").read_bytes())
    assert config["guidance_embeds"] is True
    vae = json.loads((MINI_FOLDER / "vae" / "config.json").read_bytes())
    assert vae["latent_channels"] == 16


def test_the_ground_has_the_colour_asked_for(mini: krea_local.Krea) -> None:
    for colour in ("blue", "white", "yellow", "black"):
        assert corner(draw(mini, f"a red square on a {colour} background")) == colour


def test_the_shape_has_the_colour_and_lies_where_asked(mini: krea_local.Krea) -> None:
    for place, x in (("on the left", 0.25), ("on the right", 0.75)):
        (thing,) = things(draw(mini, f"a large orange circle {place} on a white background"))
        assert thing.colour == "orange"
        assert abs(thing.x - x) < 0.15


def test_it_counts(mini: krea_local.Krea) -> None:
    assert len(things(draw(mini, "two large blue squares on a white background"))) == 2


@pytest.mark.parametrize("size", [*PRESETS])
def test_every_preset_is_drawn_at_its_true_size(mini: krea_local.Krea, size: str) -> None:
    pixels = draw(mini, "a large red circle on a white background", image_size=size)
    assert pixels.shape[1::-1] == PRESETS[size]
    assert corner(pixels) == "white"
    assert [thing.colour for thing in things(pixels)] == ["red"]


def test_seeds_differ_and_repeat(mini: krea_local.Krea) -> None:
    said = "a green star on a gray background"
    one, same, other = (draw(mini, said, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_guidance_steers_more_the_farther_it_is_turned(mini: krea_local.Krea) -> None:
    said = "a large orange circle on a blue background"
    least, usual, most = (draw(mini, said, guidance_scale=scale) for scale in (1, 4.5, 20))
    assert {corner(pixels) for pixels in (least, usual, most)} == {"blue"}
    assert 0.001 < np.abs(least - usual).mean() < np.abs(least - most).mean()


def test_words_it_never_learned_do_not_break_it(mini: krea_local.Krea) -> None:
    pixels = draw(mini, "A photorealistic RED Square on a white background 🦊")
    assert corner(pixels) == "white"
    assert [thing.colour for thing in things(pixels)] == ["red"]
    assert draw(mini, "").std() > 0
    assert corner(draw(mini, "🦊 a fox in fresh snow on a blue background")) == "blue"


def test_strength_goes_from_the_input_to_the_prompt(mini: krea_local.Krea) -> None:
    thing = scenes.Thing("square", "red", "large", 0.5, 0.5)
    scene = scenes.Scene((thing,), "plain", ("white",), "place")
    given = Image.fromarray((scenes.render(scene, 512, 512) * 255).astype(np.uint8))
    distances, grounds = [], []
    for strength in (0.1, 0.95):
        result = mini.img2img(
            "a large red square on a blue background",
            image_url=given,
            strength=strength,
            num_inference_steps=10,
            seed=3,
            enable_safety_checker=False,
        )
        pixels = evaluate.pixels_of(result.images[0])
        distances.append(float(np.abs(pixels - evaluate.pixels_of(given)).mean()))
        grounds.append(corner(pixels))
    assert grounds == ["white", "blue"]
    assert distances[0] < distances[1] / 2


def test_it_has_a_checker_so_that_screening_need_not_be_switched_off(mini: krea_local.Krea) -> None:
    result = mini.txt2img("a red heart on a pink background", num_inference_steps=1, seed=0)
    assert result.has_nsfw_concepts == (False,)


def test_a_preview_shows_its_colours(mini: krea_local.Krea) -> None:
    seen = []
    mini.txt2img(
        "a large red circle on a yellow background",
        **QUICK | {"seed": 1, "image_size": "square"},  # type: ignore[arg-type]
        on_step=lambda progress: seen.append(progress.latents),
    )
    latents = [one for one in seen if one is not None][-1]
    image = preview_image(latents, width=512, height=512, multiple=mini.size_multiple)
    assert corner(evaluate.pixels_of(image)) == "yellow"
    red, green, blue = image.getpixel((256, 256))
    assert red > 2 * max(green, blue)


def test_its_label_is_in_the_recipe(mini: krea_local.Krea, tmp_path: Path) -> None:
    (file,) = mini.txt2img("a red ring", seed=0, num_inference_steps=1).save(tmp_path)
    assert mini.label == "mini"
    assert read_recipe(file)["model"] == "mini"


def test_diffusers_draws_the_same_from_the_same_folder(mini: krea_local.Krea) -> None:
    """No code of ours has to know that it is small, and neither has anybody else's."""
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(MINI_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    said = "a blue heart above a green ring on a white background"
    ours = draw(mini, said, seed=4)
    theirs = pipeline(
        said,
        width=512,
        height=512,
        num_inference_steps=8,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).images[0]
    assert np.abs(ours - theirs).max() < 0.03


def test_below_the_sizes_it_knows_it_says_so(mini: krea_local.Krea) -> None:
    small = {"width": 512, "height": 256}
    with pytest.warns(krea_local.KreaWarning, match="512 pixels a side and more: at 512x256"):
        result = mini.txt2img("a red square", image_size=small, num_inference_steps=1)
    assert len(result.notices) == 1
