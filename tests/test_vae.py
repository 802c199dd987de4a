"""Strips give the whole decoder's picture, in a fraction of its memory; the encoder, every bit."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_model import CONFIGS
from krea_local import vae as vae_module
from krea_local.plan import ENCODING, KEPT, STRIPS
from krea_local.vae import decode, encode, prepare

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from krea_local.pipeline import Krea

GIB = 2**30
# float32 sums in another order: each way is off by as much from the decoder in float64, which
# amplifies a relative error of 6e-8 a hundredfold on its way to pixels of up to 5.
ROUNDING = 4e-5


def autoencoder(*channels: int, layers: int = 1, **config: Any) -> AutoencoderKL:
    """FLUX's autoencoder, with other channels and random weights."""
    from diffusers import AutoencoderKL

    own = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    return AutoencoderKL(**{**CONFIGS["vae"], **own, **config}).eval().requires_grad_(False)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(vae: AutoencoderKL, latent_map: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(latent_map, return_dict=False)[0]


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        results = operation(*arguments, **(keywords or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.count(result.untyped_storage())
        return results

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            del self.alive[key]
            self.bytes -= size

        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, freed)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)


# Strips of one row, of a few, and of more than the picture; with nothing kept that need not be,
# with all, and with a part.
LIMITS = [
    {"kept_bytes": kept_bytes, "strip_bytes": strip_bytes}
    for kept_bytes, strip_bytes in [(0, 1), (0, 5000), (30_000, 9000), (2**30, 7000), (0, 2**30)]
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 6, 5), (2, 16, 7, 8)], ids=str)
def test_strips_equal_the_whole_decoder_of_the_tiny_model(
    krea: Krea, shape: tuple[int, ...], limits: dict[str, int]
) -> None:
    vae, latent_map = krea.models.vae, noise(*shape)
    strips = decode(vae, latent_map, whole_pixels=0, **limits)
    torch.testing.assert_close(strips, whole(vae, latent_map), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("limits", LIMITS[1:4], ids=str)
@pytest.mark.parametrize(
    ("channels", "config"),
    [
        ((8, 16, 24), {"layers": 2, "use_post_quant_conv": True}),
        ((16, 8), {"mid_block_add_attention": False, "latent_channels": 4, "out_channels": 1}),
        ((8,), {"layers": 3}),
    ],
    ids=str,
)
def test_strips_equal_the_whole_decoder_whatever_its_sizes(
    channels: tuple[int, ...], config: dict[str, Any], limits: dict[str, int]
) -> None:
    vae = autoencoder(*channels, **config)
    latent_map = noise(1, vae.config["latent_channels"], 13, 6)
    strips = decode(vae, latent_map, whole_pixels=0, **limits)
    torch.testing.assert_close(strips, whole(vae, latent_map), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strips_are_as_near_to_the_exact_picture_as_the_whole_decoder(dtype: torch.dtype) -> None:
    vae = autoencoder(8, 16, 32, 32, layers=2).to(dtype)
    latent_map = noise(1, 16, 18, 12).to(dtype)
    errors = [
        decode(vae, latent_map, whole_pixels=0, kept_bytes=0, strip_bytes=20_000),
        whole(vae, latent_map),
    ]
    exact = whole(vae.double(), latent_map.double())
    in_strips, at_once = (rms(pixels - exact) for pixels in errors)
    assert 0 < in_strips < 1.25 * at_once  # the mean over 41,472 values of the same rounding


def test_no_row_at_a_strips_border_stands_out(krea: Krea) -> None:
    vae, latent_map = krea.models.vae, noise(8, 16, 24, 12)
    # 16 rows of the last stage, 8 x 96; the borders of the stages before come down to some of its.
    strip_bytes = 16 * 8 * 96 * 4
    strips = decode(vae, latent_map, whole_pixels=0, kept_bytes=0, strip_bytes=strip_bytes)
    error = (strips - whole(vae, latent_map)).square().mean(dim=(0, 1, 3))  # [H]
    # By place in the strip; without the first and last, whose outer borders pad as they ought to.
    error = error[16:-16].view(-1, 16).mean(dim=0).sqrt()
    # Neighbouring rows share their rounding, so that 8 pictures leave 5 % to chance.
    assert error[[0, 1, -2, -1]].max() < 1.2 * error[2:-2].mean()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # Steps of 3e-5 at 300, over a deviation of 1.7, times weights of up to 2.
        (torch.float32, {"rtol": 0, "atol": 2e-4}),
        # Rounded before and after SiLU, each by 2^-9.
        (torch.bfloat16, {"rtol": 2**-7, "atol": 1e-3}),
    ],
    ids=str,
)
def test_statistics_are_the_whole_pictures_where_its_parts_differ(
    dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    # Flat above and busy below, and far from zero, where sums of squares in float32 would cancel.
    picture = (noise(1, 8, 40, 8) * torch.linspace(0.1, 3, 40)[:, None] + 300).to(dtype)
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 8).requires_grad_(False).to(dtype)
    norm.weight.normal_()
    norm.bias.normal_()
    normalised = vae_module._normaliser(norm, vae_module._as_map([picture]), 7)(picture)
    assert normalised.dtype == dtype
    exact = torch.nn.functional.silu(norm.double()(picture.double()))
    torch.testing.assert_close(normalised.double(), exact, **tolerance)


def test_small_pictures_are_decoded_whole_and_batches_of_large_ones_one_by_one(krea: Krea) -> None:
    vae, latent_map = krea.models.vae, noise(2, 16, 4, 6)
    pixels = 32 * 48
    assert torch.equal(decode(vae, latent_map), whole(vae, latent_map))
    assert torch.equal(decode(vae, latent_map, whole_pixels=2 * pixels), whole(vae, latent_map))
    one_by_one = torch.cat([whole(vae, latent_map[:1]), whole(vae, latent_map[1:])])
    assert torch.equal(decode(vae, latent_map, whole_pixels=2 * pixels - 1), one_by_one)
    assert torch.equal(decode(vae, latent_map, whole_pixels=pixels), one_by_one)


def test_decoders_built_otherwise_are_left_to_diffusers() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    attentive = autoencoder(8, 8, up_block_types=("AttnUpDecoderBlock2D",) * 2)
    other_activation = autoencoder(8, 8, act_fn="gelu")
    hooked = autoencoder(8, 8)
    add_hook_to_module(hooked.decoder.up_blocks[0].resnets[0].conv1, ModelHook())
    tiled = autoencoder(8, 8, sample_size=8)
    tiled.enable_tiling()
    latent_map = noise(1, 16, 10, 10)
    for vae in (attentive, other_activation, hooked, tiled):
        assert not vae_module._is_known(vae, vae.decoder)
        assert torch.equal(decode(vae, latent_map, whole_pixels=0), whole(vae, latent_map))
    plain = autoencoder(8, 8)
    assert vae_module._is_known(plain, plain.decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"layers": 2},
        {"use_quant_conv": True, "latent_channels": 4},
        {"down_block_types": ("AttnDownEncoderBlock2D",) * 3},  # left to diffusers
        {"mid_block_add_attention": False},
    ],
    ids=str,
)
def test_encoding_is_diffusers_bit_for_bit(config: dict[str, Any], dtype: torch.dtype) -> None:
    vae = autoencoder(8, 16, 24, **config).to(dtype)
    pixels = noise(2, 3, 40, 28).to(dtype)
    with torch.inference_mode():
        wanted = vae.encode(pixels).latent_dist.mode()
    assert torch.equal(encode(vae, pixels), wanted)


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1440, 1440), (512, 768)])
def test_the_plan_counts_what_encoding_takes(width: int, height: int) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**CONFIGS["vae"], mid_block_add_attention=False).to(torch.bfloat16)
        pixels = torch.empty(1, 3, height, width, dtype=torch.bfloat16)
    with Allocations() as made:
        assert encode(vae, pixels).shape == (1, 16, height // 8, width // 8)
    assert made.peak == pytest.approx(ENCODING * width * height, rel=0.01)


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1440, 1440), (1408, 1488)])
def test_the_plan_counts_what_strips_take(width: int, height: int) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**CONFIGS["vae"], mid_block_add_attention=False).to(torch.bfloat16)
        latent_map = torch.empty(1, 16, height // 8, width // 8, dtype=torch.bfloat16)
    with Allocations() as made:
        assert decode(vae, latent_map, in_strips=True).shape == (1, 3, height, width)
    assert made.peak == pytest.approx(KEPT * width * height + STRIPS, rel=0.01)


def test_small_pictures_in_strips_are_the_same_but_for_rounding(krea: Krea) -> None:
    vae, latent_map = krea.models.vae, noise(2, 16, 9, 8)
    in_strips = decode(vae, latent_map, in_strips=True, strip_bytes=5000)
    torch.testing.assert_close(in_strips, whole(vae, latent_map), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("width", "height"), [(2048, 2048), (1440, 2912), (4096, 1024), (1456, 1456)]
)
def test_strips_take_a_fraction_of_the_memory_at_the_true_shapes(width: int, height: int) -> None:
    # Without attention, which on the meta device would count a matrix that no GPU makes; at the
    # latents' resolution its maps are 1/16 of the last stage's.
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**CONFIGS["vae"], mid_block_add_attention=False).to(torch.bfloat16)
        latent_map = torch.empty(1, 16, height // 8, width // 8, dtype=torch.bfloat16)
    with Allocations() as at_once:
        assert whole(vae, latent_map).shape == (1, 3, height, width)
    with Allocations() as in_strips:
        assert decode(vae, latent_map).shape == (1, 3, height, width)
    assert at_once.peak == pytest.approx(1.5 * width * height / 2**20 * GIB, rel=0.02)
    assert in_strips.peak < 1.26 * GIB  # KEPT_BYTES, and up to four strips


def test_preparing_for_cuda_keeps_values_and_every_convolution_gets_channels_last() -> None:
    vae, latent_map = autoencoder(8, 16), noise(1, 16, 9, 8)
    expected = decode(vae, latent_map, whole_pixels=0, strip_bytes=4000)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    prepare(vae, torch.device("cpu"))
    assert vae.decoder.conv_in.weight.is_contiguous()
    prepare(vae, torch.device("cuda"))
    weights = vae.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    kernels = [weight for weight in weights.values() if weight.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)

    layouts = set()
    for layer in vae.decoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, inputs: layouts.add(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    latent_map = latent_map.contiguous(memory_format=torch.channels_last)
    for kept_bytes in (0, 2**30):
        pixels = decode(vae, latent_map, whole_pixels=0, kept_bytes=kept_bytes, strip_bytes=4000)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=ROUNDING)
    assert layouts == {True}


@pytest.mark.gpu
def test_strips_equal_the_whole_decoder_on_the_gpu_in_less_memory() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKL(**CONFIGS["vae"]).to(torch.bfloat16).eval().requires_grad_(False)
    prepare(vae, torch.device("cuda"))
    latent_map = noise(1, 16, 184, 184).to("cuda", torch.bfloat16)
    pixels, peaks = [], []
    for whole_pixels in (2**30, 0):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pixels.append(decode(vae, latent_map, whole_pixels=whole_pixels).float())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    at_once, in_strips = pixels
    # On the CPU, with fewer channels, either way is 2 % off the exact picture of random weights.
    assert rms(in_strips - at_once) < 0.05 * rms(at_once)
    assert peaks[1] < 0.6 * peaks[0]
