"""The miniature's scenes, its judge and its training."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from benchmarks.miniature import (
    autoencoder,
    captions,
    evaluate,
    flow,
    latents,
    learning,
    models,
    muon,
    reading,
    scenes,
    state,
    train,
)
from benchmarks.miniature.curve import Curve
from benchmarks.miniature.judge import judge, nearest, shape_of, things
from krea_local.schema import PRESETS

# --- scenes and captions


def as_jpeg(pixels: scenes.Pixels) -> scenes.Pixels:
    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(file, "JPEG", quality=90)
    return evaluate.pixels_of(Image.open(file))


@pytest.mark.parametrize("size", [*PRESETS.values(), (768, 768)])
def test_the_judge_finds_rendered_scenes_right(size: tuple[int, int]) -> None:
    random = Random(str(size))
    for count in (1, 2, 3):
        for _ in range(7):
            scene = scenes.sample(random, count)
            verdict = judge(as_jpeg(scenes.render(scene, *size)), scene)
            assert verdict.all, (captions.caption(scene, random), verdict)


def changed(scene: scenes.Scene, **of_the_first: object) -> scenes.Scene:
    from dataclasses import replace

    first = replace(scene.things[0], **of_the_first)  # type: ignore[arg-type]
    return replace(scene, things=(first, *scene.things[1:]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_judge_finds_what_is_wrong(count: int) -> None:
    from dataclasses import replace

    random = Random(count)
    thing = scenes.Thing("star", "yellow", "", 0.5, 0.5)
    for _ in range(5):
        scene = scenes.sample(random, count)
        while scene.ground != "plain" or len({one.kind for one in scene.things}) < count:
            scene = scenes.sample(random, count)
        pixels = as_jpeg(scenes.render(scene, 512, 512))
        own = scene.things[0]
        other_shape = "ring" if own.shape != "ring" else "heart"
        other_colour = "red" if own.colour != "red" else "blue"
        other_ground = "gray" if scene.ground_colours != ("gray",) else "white"
        other_size = "small" if own.size != "small" else "large"
        verdict = judge(pixels, changed(scene, shape=other_shape))
        assert not verdict.shapes[0]
        assert verdict.colours[0]
        verdict = judge(pixels, changed(scene, colour=other_colour))
        assert not verdict.colours[0]
        assert verdict.shapes[0]
        if count < 3:  # three are all of one size
            verdict = judge(pixels, changed(scene, size=other_size))
            assert not verdict.sizes[0]
            assert verdict.shapes[0]
        assert not judge(pixels, replace(scene, ground_colours=(other_ground,))).ground
        assert not judge(pixels, replace(scene, things=(*scene.things, thing))).count
        if count > 1:
            turned = replace(scene, things=scene.things[::-1])
            across = {"row": "column", "column": "row"}[scene.arrangement]
            assert judge(pixels, scene).place
            assert not judge(pixels, turned).place
            assert not judge(pixels, replace(scene, arrangement=across)).place
        else:
            elsewhere = next(place for place, at in scenes.PLACES.items() if at != (own.x, own.y))
            assert not judge(pixels, replace(scene, place=elsewhere)).place


def lumpy(radius: float, lumps: int, depth: float) -> np.ndarray:
    y, x = np.mgrid[0:400, 0:400] - 200.0
    return np.hypot(x, y) < radius * (1 + depth * np.cos(lumps * np.arctan2(y, x)))


@pytest.mark.parametrize("radius", [40, 70, 120])
def test_a_lumpy_circle_is_no_circle(radius: int) -> None:
    assert shape_of(lumpy(radius, 5, 0.0)) == "circle"
    for lumps in (2, 3, 5, 6, 7):
        assert shape_of(lumpy(radius, lumps, 0.08)) is None
    square = scenes.mask("square", 400, 200, 200, radius) > 0.5
    assert shape_of(square) == "square"
    square[:, :200] = False
    assert shape_of(square) is None


def test_a_picture_of_nothing_has_no_things() -> None:
    for ground in scenes.GROUNDS:
        scene = scenes.Scene((), ground, ("blue", "white")[: 1 if ground == "plain" else 2], "row")
        assert things(as_jpeg(scenes.draw_ground(scene, 512, 512))) == []


def test_a_speck_counts_and_a_thing_of_two_colours_has_none() -> None:
    random = Random(3)
    scene = scenes.sample(random, 1)
    while scene.ground != "plain" or scene.things[0].shape != "circle" or scene.things[0].x != 0.5:
        scene = scenes.sample(random, 1)
    pixels = scenes.render(scene, 512, 512)
    assert judge(pixels, scene).all
    half = pixels.copy()
    ((_, x, y, radius),) = scene.placed(512, 512)
    left = half[y - radius : y + radius, x - radius : x]
    left[np.abs(left - scenes.colour_of(scene.things[0].colour)).sum(2) < 0.01] = 0.5
    assert not judge(half, scene).colours[0]
    pixels[440:460, 30:50] = scenes.colour_of(scene.things[0].colour)
    assert not judge(pixels, scene).count


def test_the_kind_of_the_ground_matters() -> None:
    for width, height in ((512, 512), (768, 1024)):
        pictures = {
            kind: scenes.Scene((), kind, ("blue", "white"), "row")
            for kind in ("gradient", "stripes")
        }
        pictures["plain"] = scenes.Scene((), "plain", ("blue",), "row")
        for drawn, scene in pictures.items():
            pixels = as_jpeg(scenes.draw_ground(scene, width, height))
            for asked, other in pictures.items():
                thing = scenes.Thing("star", "red", "", 0.5, 0.5)
                asks = scenes.Scene((thing,), asked, other.ground_colours, "place")
                assert judge(pixels, asks).ground == (asked == drawn)


def test_colours_are_nearest_to_themselves() -> None:
    assert [nearest(scenes.colour_of(name)) for name in scenes.COLOURS] == list(scenes.COLOURS)


def test_scenes_to_train_on_have_no_combination_that_is_held_out() -> None:
    random = Random(0)
    for _ in range(200):
        scene = scenes.trained(random)
        assert not {(thing.shape, thing.colour) for thing in scene.things} & scenes.HELD_OUT
        assert scenes.held_out(random).is_held_out
    assert {shape for shape, _ in scenes.HELD_OUT} == set(scenes.SHAPES)


def test_things_keep_apart_and_inside() -> None:
    random = Random(1)
    for _ in range(300):
        scene = scenes.sample(random)
        for width, height in PRESETS.values():
            placed = scene.placed(width, height)
            for index, (_, x, y, radius) in enumerate(placed):
                assert x % scenes.GRID == y % scenes.GRID == 0
                assert 1.1 * radius < x < width - 1.1 * radius
                assert 1.1 * radius < y < height - 1.1 * radius
                for _, other_x, other_y, other_radius in placed[:index]:
                    apart = math.hypot(x - other_x, y - other_y)
                    assert apart > 1.07 * (radius + other_radius) + 10


def test_captions_name_everything_in_words_that_the_tokenizers_know() -> None:
    random, known = Random(2), set(captions.words())
    for _ in range(300):
        scene = scenes.sample(random)
        said = captions.caption(scene, random, strange=0)
        assert set(said.replace(",", " ").split()) <= known
        for thing in scene.things:
            assert thing.shape in said
        for colour in scene.ground_colours:
            assert colour in said or captions.SYNONYMS.get(colour, "?") in said


# --- training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> flow.Model:
    torch.manual_seed(0)
    made = flow.Model(tmp_path_factory.mktemp("tokenizers"))
    for name, weight in made.named_parameters():  # what starts as zeros would hide differences
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
        assert weight.isfinite().all(), name
    return made.eval()


@torch.no_grad()
def test_one_padding_stands_for_all(model: flow.Model) -> None:
    said = [
        "a red circle on a blue background",
        "two green stars on a striped red and white ground",
    ]
    embeds, pooled, weights = model.encoders(said)
    padded = [
        model.encoders.t5_tokenizer(text, padding="max_length", max_length=512).input_ids
        for text in said
    ]
    all_embeds = model.encoders.t5(torch.tensor(padded))[0]
    noise, sigma, guidance = torch.randn(2, 12, 64), torch.tensor([0.5, 0.9]), torch.ones(2)
    short, long = (
        flow.velocity(model.transformer, noise, sigma, text, 3, 4, guidance)
        for text in ((embeds, pooled, weights), (all_embeds, pooled, torch.zeros(512)))
    )
    assert short.abs().mean() > 0.1
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_distillation_begins_with_what_the_teacher_knows(model: flow.Model) -> None:
    student = copy.deepcopy(model.transformer)
    flow.begin_alike(student)
    noise = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    sigma, text = torch.tensor([0.7]), model.encoders(["a red ring"])

    def drawn(transformer: FluxTransformer2DModel, scale: float) -> Tensor:
        with torch.no_grad():
            return flow.velocity(transformer, noise, sigma, text, 3, 4, torch.tensor([scale]))

    for scale in (1.0, 4.5, 20.0):
        torch.testing.assert_close(drawn(student, scale), drawn(model.transformer, 1.0))
    student.time_text_embed.guidance_embedder.linear_2.weight.data.normal_()
    near, far = (drawn(student, scale) - drawn(student, 4.5) for scale in (4.6, 20.0))
    assert near.square().mean() < far.square().mean() / 10


@torch.no_grad()
def test_case_means_nothing_once_it_is_spread(model: flow.Model) -> None:
    model.encoders.spread_cases()
    said = "a red circle on a blue background"
    for other in (said.upper(), said.title()):
        for one, two in zip(model.encoders([said]), model.encoders([other]), strict=True):
            assert torch.equal(one, two)
    assert not torch.equal(model.encoders([said])[0], model.encoders(["a blue" + said[5:]])[0])


@torch.no_grad()
def test_even_latents_say_the_same_inside_the_picture() -> None:
    torch.manual_seed(0)
    vae = models.autoencoder().eval()
    picture = scenes.render(scenes.sample(Random(0)), 256, 256)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1
    before = vae.decoder.conv_in(vae.encoder(pixels)[:, :16])
    latents.make_even(vae, pictures=4)
    even = vae.encoder(pixels)[:, :16]
    after = vae.decoder.conv_in(even)
    torch.testing.assert_close(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1])
    assert not torch.allclose(before, after)  # padding with zeros means something else now
    assert 0.3 < float(even.square().mean().sqrt()) < 3


def test_an_autoencoder_grows_around_another() -> None:
    inner = models.autoencoder(models.CHANNELS[2:])
    vae = models.grown(inner)
    assert torch.equal(vae.decoder.conv_in.weight, inner.decoder.conv_in.weight)
    assert torch.equal(vae.encoder.conv_out.weight, inner.encoder.conv_out.weight)
    deepest = (vae.encoder.down_blocks[5], inner.encoder.down_blocks[3])
    assert torch.equal(*(block.resnets[0].conv1.weight for block in deepest))
    assert vae.encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_makes_updates_orthogonal(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((8, 32), (32, 8), (16, 16)):
        made = muon.orthogonal(torch.randn(3, *shape).to(dtype))
        assert 0.6 < float(torch.linalg.svdvals(made.float()).mean()) < 1.3
    target, weight = torch.randn(16, 16), torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = muon.Muon([weight], lr=0.05, dtype=dtype)
    for _ in range(300):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float((weight - target).detach().square().mean()) < 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few steps of all stages: in one go, and interrupted again and again."""
    tmp_path = tmp_path_factory.mktemp("training")
    small = {
        (autoencoder, "INNER_STEPS"): 2,
        (autoencoder, "STEPS"): 2,
        (autoencoder, "POLISH_STEPS"): 2,
        (autoencoder, "WHOLE_SIZES"): ((512, 512),),
        (autoencoder, "SAVE_EVERY"): 1,
        (latents, "SIZES"): {(512, 512): (4, 2), (576, 512): (2, 2)},
        (latents, "CHUNK"): 2,
        (flow, "STEPS"): 3,
        (flow, "MORE_STEPS"): 2,
        (flow, "DISTILL_STEPS"): 2,
        (learning, "SAVE_EVERY"): 1,
        (reading, "STEPS"): 2,
        (reading, "CAPTIONS"): 4,
        (flow, "TOKENS"): 144,
    }

    def run(folder: Path) -> None:
        with mock.patch.object(latents, "make_even", wraps=lambda vae: None):
            train.main([str(folder), "--threads", "1"])

    saved = state.save

    def stops_at(count: int) -> object:
        def save(*arguments: object) -> None:
            nonlocal count
            saved(*arguments)  # type: ignore[arg-type]
            count -= 1
            if count == 0:
                raise KeyboardInterrupt

        return save

    patches = [mock.patch.object(*where, value) for where, value in small.items()]
    for patch in patches:
        patch.start()
    try:
        run(tmp_path / "whole")
        for _ in range(30):
            with mock.patch.object(state, "save", stops_at(3)):
                try:
                    run(tmp_path / "parts")
                except KeyboardInterrupt:
                    continue
            break
    finally:
        for patch in patches:
            patch.stop()
    return tmp_path / "whole", tmp_path / "parts"


def test_training_goes_on_where_it_stopped(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("vae", "vae.polished", "text", "flow", "distilled"):
        ours, theirs = (state.read(folder / f"{stage}.safetensors")[0] for folder in folders)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)
    files = list((folders[0] / "checkpoint").rglob("*"))
    assert len([file for file in files if file.suffix == ".safetensors"]) == 5
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 10_000_000
    from krea_local import load

    krea = load(folders[1] / "checkpoint", progress=False)
    assert krea.size_multiple == 64
    assert krea.txt2img("a red ring", num_inference_steps=1, seed=0).has_nsfw_concepts == (False,)


def test_what_t5_has_to_tell_is_where_things_lie() -> None:
    one, two = (
        scenes.Thing("ring", "red", "small", 0.25, 0.5),
        scenes.Thing("star", "blue", "", 0.75, 0.5),
    )
    ground = ("stripes", ("white", "pink"))
    ninths, whole = reading.facts(scenes.Scene((one, two), *ground, "row"))
    shapes, colours = scenes.SHAPES, tuple(scenes.COLOURS)
    nothing = [len(shapes), reading.UNKNOWN, reading.UNKNOWN]
    assert ninths[3] == [shapes.index("ring"), colours.index("red"), 0]
    assert ninths[5] == [shapes.index("star"), colours.index("blue"), 1]
    assert all(ninths[i] == nothing for i in (0, 1, 2, 4, 6, 7, 8))
    assert whole == [1, 1, 2, colours.index("white"), colours.index("pink")]


def test_a_curve_is_lines_of_json(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl")
    curve.add("flow", 20, 1.5, loss=0.25)
    curve.add("flow", 40, 1.5, loss=0.125)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[1]["loss"] == 0.125


def test_evaluate_draws_judges_and_writes(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(folders[0] / "checkpoint")
    monkeypatch.setattr(evaluate, "STEPS", 2)
    monkeypatch.setattr(evaluate, "SIZE", "square")
    monkeypatch.setattr(evaluate, "THRESHOLDS", (0.0, 9.0))
    common = [model, "--count", "15", "--dtype", "bfloat16", "--output", str(tmp_path / "a.json")]
    monkeypatch.setattr(evaluate, "MANY_STEPS", 12)
    monkeypatch.setattr(evaluate, "IMG2IMG_STEPS", 10)
    parts = ["held-out", "strength", "thresholds"]
    sheet_file, plot_file = str(tmp_path / "a.png"), str(tmp_path / "curves.png")
    assert evaluate.main([*common, "--parts", parts[0], "--sheet", sheet_file]) == 0
    # What a file has of the same checkpoint stays in it.
    assert evaluate.main([*common, "--parts", *parts[1:], "--plot", plot_file]) == 0
    made = json.loads((tmp_path / "a.json").read_text())
    assert list(made["parts"]) == parts
    assert made["dtype"] == "bfloat16"
    first = made["parts"]["held-out"][0]
    assert (first["prompts"], first["pictures"]) == ("held out", 15)
    never, always = made["parts"]["thresholds"]
    assert (never["psnr"], never["computed"]) == (99.0, 12)
    assert always["computed"] < 9
    assert always["psnr"] < 99
    assert [row["strength"] for row in made["parts"]["strength"]] == [0.3, 0.6, 0.95]
    assert "| held out | 15 |" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 800
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width == 2 * 440  # strength and thresholds
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([model, "--parts", "presets", "--plot", str(tmp_path / "none.png")])
    assert "--plot" in capsys.readouterr().err


def test_prompts_are_the_same_every_time_and_held_out() -> None:
    made = evaluate.prompts(9)
    assert made == evaluate.prompts(9)
    assert [len(prompt.scene.things) for prompt in made] == [1, 2, 3] * 3
    assert all(prompt.scene.is_held_out for prompt in made)
    assert not any(prompt.scene.is_held_out for prompt in evaluate.prompts(9, trained=True))
