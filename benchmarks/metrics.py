"""Figures of a picture: how far it is from another (PSNR, SSIM, LPIPS), or how good by itself.

CLIP score and ImageReward judge a picture with its prompt. No weights are fetched, and no pickles
read: what is not there is left out, with the reason. Knows nothing of levels or of drawing.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from krea_local.api import choose_device
from krea_local.components import load_pretrained
from krea_local.errors import WeightsInvalid, WeightsNotFound
from krea_local.files import check_safetensors
from krea_local.images import image_to_pixels
from krea_local.loading import load_tokenizer

TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "image_reward": "ImageReward",
}
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's weights, of which LPIPS is made


@dataclass(frozen=True)
class Metric:
    """One figure of a picture.

    Attributes:
        name: its key in the report and in TITLES.
        measure: (prompt, picture, the picture of `none`) → the figure.
        compares: it tells the two pictures apart, so `none` itself has no such figure; otherwise it
            judges one picture, and what counts is the change from `none`.
        more_is_better: whether the worst figure is the lowest.
        package: what computes it, where that is not this file.
    """

    name: str
    measure: Callable[[str, Image.Image, Image.Image], float]
    compares: bool
    more_is_better: bool
    package: str | None = None


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels; infinite for equal pictures."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    error = float(np.mean(difference**2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity, at most 1: the mean over pixels and the three channels.

    Source: Wang et al. 2004: Gaussian window of 11 x 11, sigma 1.5, K = 0.01 and 0.03, only where
    the window lies inside the picture. Oracle: scikit-image, without its sample covariance.
    """
    # [3, H, W], in doubles: variances are small differences of large numbers.
    one, other = (
        torch.from_numpy(np.array(each, np.float64)).permute(2, 0, 1).contiguous()
        for each in (image, reference)
    )
    mean_one, mean_other = _blur(one), _blur(other)
    covariance = _blur(one * other) - mean_one * mean_other
    variances = _blur(one * one) - mean_one**2 + _blur(other * other) - mean_other**2
    luminance, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_one * mean_other + luminance) * (2 * covariance + contrast)
    similarity /= (mean_one**2 + mean_other**2 + luminance) * (variances + contrast)
    return float(similarity.mean())


def _blur(planes: Tensor) -> Tensor:
    """[3, H, W] → [3, H - 10, W - 10]; seven times faster than F.conv2d on a CPU, in doubles."""
    window = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-5, 6)]
    for axis in (1, 2):
        length = planes.shape[axis] - 10
        shifted = (planes.narrow(axis, start, length) for start in range(11))
        blurred = torch.zeros_like(planes.narrow(axis, 0, length))
        for weight, part in zip(window, shifted, strict=True):
            blurred.add_(part, alpha=weight / sum(window))
        planes = blurred
    return planes


def find_metrics(options: argparse.Namespace) -> tuple[tuple[Metric, ...], dict[str, str]]:
    """The metrics that can run, and for each of the others in one line why not.

    Raises:
        WeightsError: weights that `options` names are not there, or damaged.
    """
    device = choose_device(options.metrics_device)
    metrics = [
        Metric("psnr", lambda _, image, none: psnr(image, none), True, True),
        Metric("ssim", lambda _, image, none: ssim(image, none), True, True),
    ]
    unmeasured = {}
    reason = why_no_lpips()
    if reason is None:
        lpips = lpips_of(device)
        metrics.append(Metric("lpips", lambda _, *pair: lpips(*pair), True, False, "lpips"))
    else:
        unmeasured["lpips"] = reason
    if options.clip:
        clip = clip_of(options.clip, device)
        metrics.append(Metric("clip_score", lambda p, image, _: clip(p, image), False, True))
    else:
        unmeasured["clip_score"] = "--clip FOLDER names no CLIP model"
    if options.image_reward:
        reward = image_reward_of(options.image_reward, device)
        metrics.append(Metric("image_reward", lambda p, image, _: reward(p, image), False, True))
    else:
        unmeasured["image_reward"] = "--image-reward PATH names no weights"
    return tuple(metrics), unmeasured


def why_no_lpips() -> str | None:
    """What LPIPS lacks, or None. Its trunk is torchvision's AlexNet, which it would fetch."""
    if find_spec("lpips") is None:
        return "the package lpips is not installed"
    try:
        importlib.import_module("lpips")
    except Exception as error:  # torchvision built for another torch fails in many ways
        return f"the package lpips cannot be imported: {_first_line(error)}"
    file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not file.is_file():
        return (
            f"no {str(file)!r}: AlexNet's weights are not fetched unasked; "
            "torchvision.models.alexnet(weights='DEFAULT') fetches them"
        )
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lpips_of(device: torch.device) -> Callable[[Image.Image, Image.Image], float]:
    """LPIPS 0.1 over AlexNet, at the pictures' full size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in an outdated way
        model = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.inference_mode()
    def lpips(image: Image.Image, reference: Image.Image) -> float:
        return float(model(*(image_to_pixels(each).to(device) for each in (image, reference))))

    return lpips


def clip_of(folder: Path, device: torch.device) -> Callable[[str, Image.Image], float]:
    """CLIP score: 100 times the cosine between prompt and picture."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    tokenizer = load_tokenizer(CLIPTokenizer, folder, "vocab.json")
    if not (folder / "preprocessor_config.json").is_file():
        raise WeightsNotFound(f"no preprocessor_config.json in {str(folder)!r}")
    processor = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    model = load_pretrained(CLIPModel, folder, dtype=torch.float32, device=device)
    tokens = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def clip(prompt: str, image: Image.Image) -> float:
        text = tokenizer(prompt, truncation=True, max_length=tokens, return_tensors="pt")
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        found = model(**text.to(device), pixel_values=pixels.to(device))
        return 100 * float(F.cosine_similarity(found.text_embeds, found.image_embeds))

    return clip


def image_reward_of(path: Path, device: torch.device) -> Callable[[str, Image.Image], float]:
    """ImageReward: how much people would like the picture, about N(0, 1) over pictures.

    The package image-reward 1.5 needs transformers 4, and krea_local 5; so its network is made here
    of transformers' BLIP. Sizes are read off the weights, which are published as a pickle, and have
    to be rewritten as safetensors before (benchmarks/README.md shows how).

    Source: THUDM/ImageReward, `ImageReward.score`; compared with it on random weights.
    """
    from safetensors.torch import load_file
    from transformers import BertTokenizer, CLIPImageProcessorPil

    file = path / "ImageReward.safetensors" if path.is_dir() else path
    tokenizer = load_tokenizer(BertTokenizer, file.parent, "vocab.txt")
    try:
        check_safetensors(file)
        vision, text, layers = _image_reward_parts(load_file(file))
    except FileNotFoundError as error:
        raise WeightsNotFound(f"no file {str(file)!r}") from error
    except (KeyError, RuntimeError) as error:  # a tensor is missing, or of another shape
        raise WeightsInvalid(f"{str(file)!r} cannot be read: {_first_line(error)}") from error
    vision, text = vision.to(device).eval(), text.to(device).eval()
    side = vision.config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )

    @torch.inference_mode()
    def image_reward(prompt: str, image: Image.Image) -> float:
        tokens = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(device)
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"].to(device)
        seen = vision(pixel_values=pixels).last_hidden_state
        both = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        )
        reward = both.last_hidden_state[:, 0]
        for weight, bias in layers:  # with nothing between them, as published
            reward = F.linear(reward, weight.to(device), bias.to(device))
        return (float(reward) - 0.16717362830052426) / 1.0333394966054072

    return image_reward


def _image_reward_parts(
    state: Mapping[str, Tensor],
) -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
    """transformers' vision model and text model, and the last linear layers."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    eyes, words = "blip.visual_encoder.", "blip.text_encoder."
    seen = {_as_in_transformers(k[len(eyes) :]): state[k] for k in state if k.startswith(eyes)}
    read = {k[len(words) :]: state[k] for k in state if k.startswith(words)}
    read.pop("embeddings.position_ids", None)
    width, _, patch, _ = seen["embeddings.patch_embedding.weight"].shape
    places = seen["embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len([k for k in seen if k.endswith("mlp.fc1.weight")]),
            num_attention_heads=width // 64,
            image_size=math.isqrt(places) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    vocabulary, width = read["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=vision.config.hidden_size,
            intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=len([k for k in read if k.endswith("intermediate.dense.weight")]),
            num_attention_heads=width // 64,
            max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
            is_decoder=True,  # with cross-attention; its mask is not causal unless asked for
        ),
        add_pooling_layer=False,
    )
    vision.load_state_dict(seen)
    text.load_state_dict(read)
    numbers = sorted(int(k.split(".")[2]) for k in state if re.match(r"mlp\.layers\.\d+\.bias", k))
    names = [f"mlp.layers.{number}" for number in numbers]
    return vision, text, [(state[f"{n}.weight"], state[f"{n}.bias"]) for n in names]


def _as_in_transformers(name: str) -> str:
    """A tensor of BLIP's own vision transformer, as transformers calls it."""
    for ours, theirs in (
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".attn.projection."),
        (r"\.attn\.", ".self_attn."),
    ):
        name = re.sub(ours, theirs, name)
    return name
