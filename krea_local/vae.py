"""Pixels into latent maps and back: FLUX's autoencoder, without maps that nobody needs any more.

The encoder is always whole. The decoder is, or works in horizontal strips, for large pictures.

Strips give the picture that the whole decoder gives, up to rounding: each is computed with the
rows around it that its convolutions reach, and every GroupNorm has the statistics of the whole
picture, gathered over all strips before the first of them is normalised. Only maps that are needed
as a whole are kept; strips of any other map are computed again each time they are needed.

Knows nothing of requests, of how latents are scaled, or of what lives on the GPU when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WHOLE_PIXELS = 2 * 2**20  # 3 GiB in bfloat16, at 1.5 GiB a megapixel
# The last stage has to keep 128 x 2048 x 2048 in bfloat16, 1 GiB: as much before it costs nothing.
KEPT_BYTES = 2**30
# 64 rows of 256 x 2048 in bfloat16, of which 4 are computed twice; two to three live at a time.
STRIP_BYTES = 64 * 2**20
# What either half may be made of, for its convolutions to reach one row up and down.
KNOWN_LAYERS = {
    *("Encoder", "DownEncoderBlock2D", "Downsample2D", "Decoder", "UpDecoderBlock2D", "Upsample2D"),
    *("ResnetBlock2D", "ModuleList", "Conv2d", "GroupNorm", "SiLU", "Dropout"),
}


def prepare(vae: AutoencoderKL, device: torch.device) -> None:
    """Lay out the weights as convolutions on `device` want them. Their values stay.

    On CUDA that is channels_last, wherever the weights lie now: else cuDNN rearranges the input
    and output of every convolution that it gives to the tensor cores. (Torch's own GroupNorm undoes
    some of that where a picture is decoded whole.) Elsewhere nothing changes.
    """
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] → latent map [B, 16, H/8, W/8], the mode of the posterior.

    Bit for bit what `vae.encode` gives. That holds five maps of 128 channels at the picture's size
    at once, this three: 0.75 GiB a megapixel in bfloat16 instead of 1.25. Strips would take less,
    but round otherwise, and steps of denoising would make that visible.
    """
    if not _is_known(vae, vae.encoder):
        encoded: Tensor = vae.encode(pixels).latent_dist.mode()
        return encoded
    encoder = vae.encoder
    current = encoder.conv_in(pixels)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            current = _whole_resnet(resnet, current)
        for downsampler in block.downsamplers or ():
            current = downsampler(current)
    current = encoder.conv_norm_out(encoder.mid_block(current))
    current = encoder.conv_out(encoder.conv_act(current))
    if vae.quant_conv is not None:
        current = vae.quant_conv(current)
    mode: Tensor = current.chunk(2, dim=1)[0]
    return mode


@torch.inference_mode()
def decode(
    vae: AutoencoderKL,
    latent_map: Tensor,
    *,
    in_strips: bool = False,
    whole_pixels: int = WHOLE_PIXELS,
    kept_bytes: int = KEPT_BYTES,
    strip_bytes: int = STRIP_BYTES,
) -> Tensor:
    """Latent map [B, 16, H/8, W/8] as the decoder takes it → pixels [B, 3, H, W] in about [-1, 1].

    Up to `whole_pixels` this is `vae.decode`, as it is for a decoder that is not built as FLUX's.
    Above, images are decoded one by one, and in strips those that are still too large: 2048 x 2048
    takes 1.25 GiB in bfloat16 instead of 6, for half as much arithmetic again.

    Args:
        vae: the autoencoder, of which only the decoder is used.
        latent_map: without the checkpoint's scale and shift.
        in_strips: whatever the size, and keep no more than the last stage has to: 0.5 GiB instead
            of 1.5 at 1024 x 1024 in bfloat16. The two limits below are not asked then.
        whole_pixels: B · H · W up to which nothing is split.
        kept_bytes: maps that would exceed it are computed once per use, as far as possible.
        strip_bytes: size of a strip of the widest map, at each resolution.
    """
    if latent_map.is_cuda:
        latent_map = latent_map.contiguous(memory_format=torch.channels_last)
    batch, _, rows, columns = latent_map.shape
    channels = vae.config["block_out_channels"]
    pixels_per_latent = 4 ** (len(channels) - 1)
    if in_strips:
        whole_pixels = 0
        kept_bytes = rows * columns * pixels_per_latent * channels[0] * latent_map.element_size()
    if batch * rows * columns * pixels_per_latent <= whole_pixels or not _is_known(
        vae, vae.decoder
    ):
        pixels: Tensor = vae.decode(latent_map, return_dict=False)[0]
        return pixels
    if batch == 1:
        return _decode_in_strips(vae, latent_map, kept_bytes, strip_bytes)
    one = partial(
        decode, vae, whole_pixels=whole_pixels, kept_bytes=kept_bytes, strip_bytes=strip_bytes
    )
    return torch.cat([one(image) for image in latent_map.chunk(batch)])


@dataclass
class _KeptMap:
    """A map [1, C, H, W] in bands of `step` rows, the last of them perhaps lower."""

    bands: list[Tensor | None]
    step: int
    channels: int
    height: int
    row_bytes: int

    @property
    def kept_bytes(self) -> int:
        return self.height * self.row_bytes

    def rows(self, first: int, last: int) -> Tensor:
        pieces = []
        for index in range(first // self.step, (last - 1) // self.step + 1):
            band, top = self.bands[index], index * self.step
            assert band is not None, "a map that is freed on the way is read from top to bottom"
            pieces.append(band[:, :, max(first - top, 0) : last - top])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def free_above(self, row: int) -> None:
        for index in range(row // self.step):
            self.bands[index] = None


@dataclass(frozen=True)
class _ComputedMap:
    """A map whose rows `function` computes, when they are asked for, from those of its sources.

    `function` pads its input with zeros, as convolutions do. That is right at the picture's
    borders; inside it, the outermost `halo` rows of a result are wrong, and cut off.
    """

    function: Callable[..., Tensor]
    sources: tuple[_KeptMap | _ComputedMap, ...]
    channels: int
    halo: int = 1
    scale: int = 1

    @property
    def height(self) -> int:
        return self.sources[0].height * self.scale

    @property
    def row_bytes(self) -> int:
        source = self.sources[0]
        return source.row_bytes // source.channels * self.channels * self.scale

    @property
    def kept_bytes(self) -> int:
        return sum(source.kept_bytes for source in self.sources)

    def rows(self, first: int, last: int) -> Tensor:
        top = max(first - self.halo, 0) // self.scale
        bottom = -(-min(last + self.halo, self.height) // self.scale)
        strip = self.function(*(source.rows(top, bottom) for source in self.sources))
        return strip[:, :, first - top * self.scale : last - top * self.scale]

    def free_above(self, row: int) -> None:
        for source in self.sources:
            source.free_above(max(row - self.halo, 0) // self.scale)


_Map = _KeptMap | _ComputedMap


def _decode_in_strips(vae: Any, latent_map: Tensor, kept_bytes: int, strip_bytes: int) -> Tensor:
    decoder = vae.decoder
    if vae.post_quant_conv is not None:
        latent_map = vae.post_quant_conv(latent_map)
    # Attention needs the whole picture, but at the latents' resolution that is small.
    current: _Map = _as_map([decoder.mid_block(decoder.conv_in(latent_map))])
    for block in decoder.up_blocks:
        widest = max(current.channels, block.resnets[0].out_channels)
        # Not evened out: bands of equal size take each other's place in the allocator.
        step = max(strip_bytes // (current.row_bytes // current.channels * widest), 1)
        if current.height * current.row_bytes <= kept_bytes:
            current = _keep(current, step)
        for resnet in block.resnets:
            current = _resnet(resnet, current, step, kept_bytes)
        for upsampler in block.upsamplers or ():
            current = _ComputedMap(upsampler, (current,), upsampler.out_channels, scale=2)
    normalise = _normaliser(decoder.conv_norm_out, current, step)

    def last_layers(strip: Tensor) -> Any:
        return decoder.conv_out(normalise(strip))

    pixels = _keep(_ComputedMap(last_layers, (current,), decoder.conv_out.out_channels), step)
    return pixels.rows(0, pixels.height)


def _whole_resnet(block: Any, source: Tensor) -> Tensor:
    """`ResnetBlock2D` without a time embedding, with no more than three maps at a time."""
    current = source
    for norm, convolution in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        current = functional.silu(norm(current), inplace=True)
        if current.is_cuda:  # GroupNorm undoes it, and the convolution would hold both
            current = current.contiguous(memory_format=torch.channels_last)
        current = convolution(current)
    shortcut = source if block.conv_shortcut is None else block.conv_shortcut(source)
    return current.add_(shortcut)


def _resnet(block: Any, source: _Map, step: int, kept_bytes: int) -> _KeptMap:
    """`ResnetBlock2D` without a time embedding. Frees `source`."""
    normalise_1 = _normaliser(block.norm1, source, step)

    def first_half(strip: Tensor) -> Any:
        return block.conv1(normalise_1(strip))

    hidden: _Map = _ComputedMap(first_half, (source,), block.out_channels)
    keep_hidden = source.kept_bytes + hidden.height * hidden.row_bytes <= kept_bytes
    if keep_hidden:
        hidden = _keep(hidden, step, free=False)
    normalise_2 = _normaliser(block.norm2, hidden, step)

    def second_half(hidden_strip: Tensor, strip: Tensor) -> Any:
        shortcut = strip if block.conv_shortcut is None else block.conv_shortcut(strip)
        return block.conv2(normalise_2(hidden_strip)).add_(shortcut)

    def both_halves(strip: Tensor) -> Any:
        return second_half(first_half(strip), strip)

    if keep_hidden:
        result = _ComputedMap(second_half, (hidden, source), block.out_channels)
    else:
        result = _ComputedMap(both_halves, (source,), block.out_channels, halo=2)
    return _keep(result, step)


def _normaliser(norm: nn.GroupNorm, source: _Map, step: int) -> Callable[[Tensor], Tensor]:
    """GroupNorm with the statistics of all of `source`, then SiLU, as a function of a strip."""
    moments, shares = [], []
    for first, last in _strips(source.height, step):
        # Deviations from the strip's own mean, since sums of squares cancel; in float32, since
        # torch rounds a variance to the dtype of its input.
        strip = source.rows(first, last).float()
        moments.append(torch.stack(torch.var_mean(strip, dim=(0, 2, 3), correction=0)))  # [2, C]
        shares.append((last - first) / source.height)
    # [strips, groups, channels of a group], as the weights are.
    variance, mean = torch.stack(moments, dim=1).view(2, len(shares), norm.num_groups, -1)
    share = mean.new_tensor(shares)[:, None, None] / mean.shape[2]
    group_mean = (mean * share).sum((0, 2), keepdim=True)
    group_variance = ((variance + (mean - group_mean) ** 2) * share).sum((0, 2), keepdim=True)
    scale = norm.weight.view_as(mean[:1]) * (group_variance + norm.eps).rsqrt()
    shift = norm.bias.view_as(mean[:1]) - group_mean * scale
    scale, shift = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    def normalise(strip: Tensor) -> Tensor:
        # Computed in float32 and rounded once to the strip's dtype, as torch's GroupNorm is.
        normalised = torch.addcmul(shift, strip, scale, out=torch.empty_like(strip))
        return functional.silu(normalised, inplace=True)

    return normalise


def _keep(source: _Map, step: int, *, free: bool = True) -> _KeptMap:
    """Compute all of `source`. With `free`, what it is computed from goes on the way."""
    bands = []
    for first, last in _strips(source.height, step):
        # A copy, since a view would hold on to the strip with its halo.
        bands.append(source.rows(first, last).clone())
        if free:
            source.free_above(last)
    return _as_map(bands)


def _as_map(bands: list[Tensor]) -> _KeptMap:
    _, channels, step, width = bands[0].shape
    height = sum(band.shape[2] for band in bands)
    return _KeptMap([*bands], step, channels, height, channels * width * bands[0].element_size())


def _strips(height: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, height, step):
        yield first, min(first + step, height)


def _is_known(vae: Any, half: Any) -> bool:
    """Whether we do all that this half of `vae` does: known layers, and nothing put around them."""
    blocks = half.down_blocks if half is vae.encoder else half.up_blocks
    layers = [half, half.conv_norm_out, half.conv_act, half.conv_out, *blocks.modules()]
    return (
        not vae.use_tiling
        and {type(layer).__name__ for layer in layers} <= KNOWN_LAYERS
        and not any("forward" in vars(layer) for layer in vae.modules())  # accelerate's hooks
    )
