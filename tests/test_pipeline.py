from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Oracle
from PIL import Image

import krea_local
from krea_local import (
    Cancelled,
    GenerationFailed,
    InvalidImage,
    InvalidRequest,
    KreaWarning,
    Progress,
)
from krea_local.pipeline import Krea
from krea_local.schema import Img2ImgRequest, Txt2ImgRequest

SMALL = {"width": 64, "height": 64}

# (width, height, steps, guidance, seeds)
CASES = [
    (64, 64, 8, 4.5, [3]),
    (128, 96, 5, 1.0, [0, 1]),
    (96, 160, 3, 20.0, [7, 8, 9, 10]),
    (512, 512, 2, 3.5, [42]),
    (1024, 768, 1, 4.5, [2**32 - 1]),
]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture with structure, 96 x 64."""
    image = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    path = tmp_path / "picture.png"
    image.save(path)
    return path


def _txt2img(**arguments: object) -> Txt2ImgRequest:
    return Txt2ImgRequest.parse({"prompt": "a red fox in fresh snow", **arguments})


@pytest.mark.parametrize(("width", "height", "steps", "guidance", "seeds"), CASES)
def test_latents_equal_diffusers_bit_for_bit_in_bfloat16_with_its_transformer(
    krea_diffusers_bfloat16: Krea,
    oracle_bfloat16: Oracle,
    width: int,
    height: int,
    steps: int,
    guidance: float,
    seeds: list[int],
) -> None:
    request = _txt2img(num_inference_steps=steps, guidance_scale=guidance)
    with torch.inference_mode():
        ours = krea_diffusers_bfloat16.latents(request, seeds=seeds, width=width, height=height)
    theirs = oracle_bfloat16.txt2img(
        request.prompt,
        seeds=seeds,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("width", "height", "steps", "guidance", "seeds"), CASES)
def test_pixels_equal_diffusers_in_float32(
    krea: Krea,
    oracle: Oracle,
    width: int,
    height: int,
    steps: int,
    guidance: float,
    seeds: list[int],
) -> None:
    request = _txt2img(num_inference_steps=steps, guidance_scale=guidance)
    with torch.inference_mode():
        latents = krea.latents(request, seeds=seeds, width=width, height=height)
        ours = krea.decode(latents, width=width, height=height)
    theirs = oracle.txt2img(
        request.prompt,
        seeds=seeds,
        output_type="pt",
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    # Our transformer fuses matrices and sums in another order: some units of the last place a step.
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [[5], [5, 6, 7]])
def test_img2img_latents_equal_diffusers_given_the_same_encoded_image(
    krea_diffusers_bfloat16: Krea,
    oracle_bfloat16: Oracle,
    picture: Path,
    strength: float,
    seeds: list[int],
) -> None:
    request = Img2ImgRequest.parse(
        {
            "prompt": "a fox at dusk",
            "image_url": picture,
            "strength": strength,
            "num_inference_steps": 10,
        }
    )
    with torch.inference_mode():
        krea = krea_diffusers_bfloat16
        clean = krea.encode_image(Image.open(picture).convert("RGB"))
        ours = krea.latents(request, seeds=seeds, width=96, height=64, clean=clean)
    theirs = oracle_bfloat16.img2img(
        request.prompt,
        clean=clean,
        seeds=seeds,
        width=96,
        height=64,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=4.5,
    )
    assert torch.equal(ours, theirs)


def test_prompt_embeddings_equal_diffusers(krea: Krea, oracle: Oracle) -> None:
    from diffusers import FluxPipeline

    models = krea.models
    pipe = FluxPipeline(
        None,  # the scheduler
        models.vae,
        models.text_encoder,
        models.tokenizer,
        models.text_encoder_2,
        models.tokenizer_2,
        oracle.krea.models.transformer,
    )
    for prompt in ("", "a red fox", "Übergröße 狐 🦊\n\ttabs"):
        with torch.inference_mode():
            ours = krea.encode_prompt(prompt)
            theirs = pipe.encode_prompt(prompt, None)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[0].shape[1] == 512  # fewer would change the picture: T5's attention has no mask


def test_a_repeated_prompt_is_encoded_once_and_the_cache_stays_small(krea: Krea) -> None:
    encoder = krea.models.text_encoder_2
    calls: list[int] = []
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(3):
            krea.txt2img("once only", image_size=SMALL, num_inference_steps=1, seed=1)
        assert len(calls) == 1
        for i in range(20):
            krea.encode_prompt(f"prompt {i}")
        assert len(krea._prompts) <= 8
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_image_i_of_a_call_is_the_single_image_of_seed_plus_i(
    krea: Krea, krea_bfloat16: Krea, dtype: str
) -> None:
    model = krea if dtype == "float32" else krea_bfloat16
    arguments = {"image_size": {"width": 128, "height": 96}, "num_inference_steps": 3}
    three = model.txt2img("a fox", seed=0, num_images=3, **arguments)
    assert three.seed == 0
    for i, image in enumerate(three.images):
        alone = model.txt2img("a fox", seed=i, **arguments)
        assert alone.images[0].tobytes() == image.tobytes()
    assert three.images[0].tobytes() != three.images[1].tobytes()


def test_a_larger_batch_draws_the_same_pictures_within_rounding(tiny_folder: Path) -> None:
    batched = krea_local.load(tiny_folder, device="cpu", dtype="float32", batch_size=4)
    arguments = {"image_size": SMALL, "num_inference_steps": 4, "seed": 5}
    four = batched.txt2img("a fox", num_images=4, **arguments)
    alone = batched.txt2img("a fox", **{**arguments, "seed": 7})
    difference = torch.frombuffer(bytearray(four.images[2].tobytes()), dtype=torch.uint8).int()
    difference -= torch.frombuffer(bytearray(alone.images[0].tobytes()), dtype=torch.uint8).int()
    assert int(difference.abs().max()) <= 1  # of 255: one step of the last rounding


def test_strength_one_ignores_the_input_and_equals_txt2img(krea: Krea, picture: Path) -> None:
    size = {"width": 96, "height": 64}
    arguments = {"num_inference_steps": 10, "seed": 4, "num_images": 2}
    drawn = krea.txt2img("a fox", image_size=size, **arguments)
    redrawn = krea.img2img("a fox", image_url=picture, strength=1, **arguments)
    assert [i.tobytes() for i in redrawn.images] == [i.tobytes() for i in drawn.images]


def test_less_strength_stays_nearer_to_the_input(krea: Krea, picture: Path) -> None:
    with torch.inference_mode():
        clean = krea.encode_image(Image.open(picture))

        def distance(strength: float) -> float:
            request = Img2ImgRequest.parse(
                {"prompt": "a fox", "image_url": picture, "strength": strength}
            )
            latents = krea.latents(request, seeds=[1], width=96, height=64, clean=clean)
            return float((latents - krea_local.sampling.pack(clean)).norm())

        distances = [distance(strength) for strength in (0.05, 0.3, 0.6, 0.95)]
    assert distances == sorted(distances)


def test_the_prompt_guidance_and_seed_matter(krea: Krea) -> None:
    base = {"image_size": SMALL, "num_inference_steps": 4, "seed": 1}

    def draw(prompt: str = "a fox", **changes: object) -> bytes:
        return krea.txt2img(prompt, **{**base, **changes}).images[0].tobytes()

    pictures = {draw(), draw("a wizard"), draw(guidance_scale=20.0), draw(seed=2)}
    assert len(pictures) == 4
    assert draw() in pictures


def test_the_same_seed_twice_is_bit_equal_and_a_random_seed_is_reported(krea: Krea) -> None:
    first = krea.txt2img("a fox", image_size=SMALL, num_inference_steps=2)
    assert 0 <= first.seed < 2**32
    again = krea.txt2img("a fox", image_size=SMALL, num_inference_steps=2, seed=first.seed)
    assert again.images[0].tobytes() == first.images[0].tobytes()
    other = krea.txt2img("a fox", image_size=SMALL, num_inference_steps=2)
    assert other.seed != first.seed


def test_the_input_image_is_encoded_without_chance(krea: Krea, picture: Path) -> None:
    image = Image.open(picture)
    with torch.inference_mode():
        first, second = krea.encode_image(image), krea.encode_image(image)
    assert torch.equal(first, second)


def test_timings_name_every_stage_and_add_up(krea: Krea, picture: Path) -> None:
    drawn = krea.txt2img("a fox", image_size=SMALL, num_inference_steps=2).timings
    assert list(drawn) == ["text", "denoise", "decode", "safety", "total"]
    redrawn = krea.img2img("a fox", image_url=picture, num_inference_steps=10).timings
    assert list(redrawn) == ["text", "encode", "denoise", "decode", "safety", "total"]
    for timings in (drawn, redrawn):
        stages = sum(seconds for name, seconds in timings.items() if name != "total")
        assert 0 < stages <= timings["total"]


def test_on_step_sees_every_piece_of_work(krea: Krea, picture: Path) -> None:
    seen: list[Progress] = []
    krea.img2img(
        "a fox",
        image_url=picture,
        strength=0.25,
        num_inference_steps=10,
        num_images=2,
        on_step=seen.append,
    )
    assert [(p.stage, p.image, p.step) for p in seen] == [
        ("text", 0, 0),
        ("encode", 0, 0),
        *[("denoise", image, step) for image in (0, 1) for step in (1, 2, 3)],
        ("decode", 0, 0),
        ("decode", 1, 0),
        ("safety", 0, 0),
    ]
    assert [p.fraction for p in seen] == pytest.approx([(i + 1) / 11 for i in range(11)])
    assert all(p.num_steps == 3 and p.num_images == 2 for p in seen)
    assert all((p.latents is not None) == (p.stage == "denoise") for p in seen)
    assert seen[2].latents is not None
    assert seen[2].latents.shape == (1, 24, 64)


def test_cancelling_from_another_thread_leaves_the_next_picture_right(krea: Krea) -> None:
    arguments = {"image_size": SMALL, "num_inference_steps": 10, "seed": 3}
    expected = krea.txt2img("a fox", **arguments).images[0].tobytes()
    steps: list[int] = []
    at_step_two = threading.Event()
    cancelled = threading.Event()

    def on_step(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 2:
            at_step_two.set()
            assert cancelled.wait(10)

    def cancel() -> None:
        assert at_step_two.wait(10)
        assert krea.cancel()
        cancelled.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Cancelled):
        krea.txt2img("a fox", on_step=on_step, **arguments)
    thread.join()
    assert max(steps) == 2
    assert krea.txt2img("a fox", **arguments).images[0].tobytes() == expected


@pytest.mark.parametrize("stage", ["text", "encode", "denoise", "decode", "safety"])
@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_stopping_at_any_stage_leaves_the_next_picture_right(
    krea: Krea, picture: Path, stage: str, error: type[BaseException]
) -> None:
    arguments = {"image_url": picture, "num_inference_steps": 10, "strength": 0.3, "seed": 3}
    expected = krea.img2img("a fox", **arguments).images[0].tobytes()

    def on_step(progress: Progress) -> None:
        if progress.stage == stage:
            raise error("stop")

    with pytest.raises(error):
        krea.img2img("a fox", on_step=on_step, **arguments)
    assert krea.img2img("a fox", **arguments).images[0].tobytes() == expected


def test_cancel_without_a_call_says_so_and_stops_nothing(krea: Krea) -> None:
    assert not krea.cancel()
    assert krea.txt2img("a fox", image_size=SMALL, num_inference_steps=1).images


def test_calls_from_two_threads_wait_for_one_another(krea: Krea) -> None:
    arguments = {"image_size": SMALL, "num_inference_steps": 4}
    expected = [
        krea.txt2img("a fox", seed=seed, **arguments).images[0].tobytes() for seed in (1, 2)
    ]
    found: dict[int, bytes] = {}
    order: list[int] = []

    def draw(seed: int) -> None:
        def on_step(progress: Progress) -> None:
            order.append(seed)
            time.sleep(0.005)  # let the other in, if it can

        result = krea.txt2img("a fox", seed=seed, on_step=on_step, **arguments)
        found[seed] = result.images[0].tobytes()

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[1], found[2]] == expected
    assert order in (sorted(order), sorted(order, reverse=True))  # one after the other


def test_damaged_weights_are_an_error_and_not_a_black_picture(broken_folder: Path) -> None:
    model = krea_local.load(broken_folder, device="cpu", dtype="float32")
    with torch.no_grad():
        model.models.transformer.final_layer.linear.bias[0] = float("nan")
    with pytest.raises(GenerationFailed, match=r"NaN or infinity at seed 5"):
        model.txt2img("a fox", image_size=SMALL, num_inference_steps=1, seed=5)


def test_a_damaged_vae_is_an_error_and_not_a_black_picture(broken_folder: Path) -> None:
    model = krea_local.load(broken_folder, device="cpu", dtype="float32")
    with torch.no_grad():
        model.models.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(GenerationFailed, match="NaN or infinity"):
        model.txt2img("a fox", image_size=SMALL, num_inference_steps=1)


def test_nothing_that_is_public_records_gradients(krea: Krea) -> None:
    request = _txt2img(num_inference_steps=1)
    krea._prompts.clear()
    embeds, pooled, _ = krea.encode_prompt("recorded?")
    latents = krea.latents(request, seeds=[1], width=64, height=64)
    pixels = krea.decode(latents, width=64, height=64)
    clean = krea.encode_image(Image.new("RGB", (64, 64)))
    assert not any(t.requires_grad for t in (embeds, pooled, latents, pixels, clean))


def test_drawing_from_within_on_step_is_refused_instead_of_hanging(krea: Krea) -> None:
    def on_step(progress: Progress) -> None:
        krea.txt2img("another", image_size=SMALL)

    with pytest.raises(InvalidRequest, match="on_step cannot draw"):
        krea.txt2img("a fox", image_size=SMALL, num_inference_steps=1, on_step=on_step)
    assert krea.txt2img("a fox", image_size=SMALL, num_inference_steps=1).images


def test_rounding_a_size_is_said(krea: Krea) -> None:
    with pytest.warns(
        KreaWarning, match=r"100x70 was rounded to 96x64: .* multiples of 16"
    ) as seen:
        result = krea.txt2img(
            "a fox", image_size={"width": 100, "height": 70}, num_inference_steps=1
        )
    assert seen[0].filename == __file__
    assert result.images[0].size == (96, 64)
    assert result.notices == (str(seen[0].message),)


def test_an_exact_size_is_drawn_without_a_word(krea: Krea) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = krea.txt2img("a fox", image_size=SMALL, num_inference_steps=1)
    assert result.notices == ()


def test_a_long_prompt_works_and_says_where_it_was_cut(krea: Krea) -> None:
    prompt = " ".join(["fox"] * 511)
    with pytest.warns(KreaWarning, match=rf"cut after {len(prompt)} characters, at '… fox fox"):
        cut = krea.txt2img(prompt + " wizard", image_size=SMALL, num_inference_steps=2, seed=1)
    with torch.inference_mode():
        assert krea.encode_prompt(prompt)[2] is None
        assert torch.equal(krea.encode_prompt(prompt + " wizard")[0], krea.encode_prompt(prompt)[0])
    assert cut.prompt.endswith("wizard")


def test_an_empty_prompt_draws(krea: Krea) -> None:
    assert krea.txt2img("", image_size=SMALL, num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("acceleration", ["regular", "high"])
@pytest.mark.parametrize(
    ("engine", "notice"), [("native", "runs in float32"), ("diffusers", "run as 'none' by engine")]
)
def test_what_a_device_cannot_accelerate_is_drawn_all_the_same_with_one_notice(
    tiny_folder: Path, acceleration: str, engine: str, notice: str
) -> None:
    krea = krea_local.load(tiny_folder, device="cpu", dtype="float32", engine=engine)
    arguments = {"image_size": SMALL, "num_inference_steps": 2, "seed": 1}
    with pytest.warns(KreaWarning, match=f"{acceleration}.*{notice}") as seen:
        result = krea.txt2img("a fox", acceleration=acceleration, **arguments)
    assert len(seen) == 1
    plain = krea.txt2img("a fox", **arguments)
    assert result.images[0].tobytes() == plain.images[0].tobytes()


def test_the_model_knows_defaults_that_the_call_leaves_open(tiny_folder: Path) -> None:
    import shutil

    dev = tiny_folder.parent / "FLUX.1-dev"
    shutil.copytree(tiny_folder, dev, dirs_exist_ok=True)
    model = krea_local.load(dev, device="cpu", dtype="float32", acceleration="high")
    arguments = {"image_size": SMALL, "num_inference_steps": 2, "seed": 1}
    with pytest.warns(KreaWarning, match="'high'"):
        open_call = model.txt2img("a fox", **arguments)
    explicit = model.txt2img("a fox", guidance_scale=3.5, acceleration="none", **arguments)
    assert open_call.images[0].info["krea_local"]["guidance_scale"] == 3.5
    assert open_call.images[0].tobytes() == explicit.images[0].tobytes()
    by_request = model.run(Txt2ImgRequest.parse({"prompt": "a fox", **arguments}))
    assert by_request.notices == open_call.notices
    assert by_request.images[0].tobytes() == explicit.images[0].tobytes()


def test_img2img_keeps_the_aspect_and_says_when_it_resizes(krea: Krea) -> None:
    with pytest.warns(KreaWarning, match="101x67 was resized to 96x64"):
        result = krea.img2img(
            "a fox", image_url=Image.new("RGB", (101, 67), "teal"), num_inference_steps=10
        )
    assert result.images[0].size == (96, 64)
    with pytest.raises(InvalidImage, match="too long and narrow"):
        krea.img2img("a fox", image_url=Image.new("RGB", (20000, 1)))


def test_img2img_leaves_the_models_as_they_were(krea_bfloat16: Krea, picture: Path) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    models = krea_bfloat16.models
    parts = (models.transformer, models.vae, models.text_encoder, models.text_encoder_2)
    before = _AttentionBackendRegistry._active_backend
    krea_bfloat16.img2img("a fox", image_url=picture, num_inference_steps=10)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert not any(module.training for part in parts for module in part.modules())
    assert _AttentionBackendRegistry._active_backend == before


def test_the_pipeline_does_not_assume_an_eightfold_vae(krea: Krea) -> None:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 6,
            up_block_types=("UpDecoderBlock2D",) * 6,
            block_out_channels=(8,) * 6,
            latent_channels=16,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()
    deep = Krea(
        dataclasses.replace(krea.models, vae=vae),
        device=krea.device,
        label="deep",
        guidance_scale=4.5,
        load_safety_checker=krea._load_safety_checker,
    )
    assert deep.size_multiple == 64
    assert deep.txt2img("a fox", num_inference_steps=1).images[0].size == (1024, 768)
    picture = Image.new("RGB", (128, 192), "teal")
    redrawn = deep.img2img("a fox", image_url=picture, num_inference_steps=10)
    assert redrawn.images[0].size == (128, 192)
