"""LoRAs: files of low-rank changes to a model's layers, read as what each layer is to add.

Known are the names of diffusers and PEFT, of kohya's scripts, of XLabs, and those of the original
checkpoint, as ComfyUI, Black Forest Labs and others write them. A tensor that fits no layer is an
error: a LoRA that is half left out draws something else. Knows nothing of where files come from.

Sources: diffusers, `lora_conversion_utils.py`; kohya-ss/sd-scripts, `networks/lora_flux.py`;
XLabs-AI/x-flux, `src/flux/modules/layers.py`; PEFT, `tuners/lora/config.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from krea_local import tensor_names
from krea_local.errors import UnsupportedModel, WeightsInvalid
from krea_local.files import check_safetensors, read_json
from krea_local.layers import LowRank
from krea_local.packed import PackedLinear

if TYPE_CHECKING:
    from krea_local.transformer import FluxTransformer

# What programs put before a layer's name, by the model that it is of.
PREFIXES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_", "text_encoders.clip_l.transformer."),
    "text_encoder_2": (
        "text_encoder_2.",
        "lora_te2_",
        "lora_te3_",
        "text_encoders.t5xxl.transformer.",
    ),
    "transformer": (
        "transformer.",
        "base_model.model.",
        "diffusion_model.",
        "model.diffusion_model.",
        "unet.",
        "lora_unet_",
        "lora_transformer_",
        "lycoris_",
        "",
    ),
}
LAST = r"(?:\.[^.]+)?\.weight"  # PEFT may name the adapter before it
KINDS = {
    "down": rf"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){LAST}$",
    "up": rf"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){LAST}$",
    "alpha": r"\.alpha$",
}
# XLabs's names of what its processors change, as the original checkpoint's layers.
XLABS = (
    (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.", r"\1.img_attn.\2.lora."),
    (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.", r"\1.txt_attn.\2.lora."),
    (r"(single_blocks\.\d+)\.processor\.qkv_lora\.", r"\1.qkv.lora."),
    (r"(single_blocks\.\d+)\.processor\.proj_lora\.", r"\1.linear2.lora."),
)
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\b(hada_w|lokr_w|b?oft_)|\.[ab][12]\.weight": "a LyCORIS network",
    r"\.diff(_b)?$|\.lora_[AB]\.bias$|_norm\.scale$|\.set_weight$": "more than low-rank changes",
    r"emb_params|^(clip_[lg]|t5xxl)$": "a textual inversion",
}
# Where diffusers writes PEFT's configuration, and where PEFT does: beside the file.
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file, and how strongly it counts.

    Attributes:
        path: of the safetensors file.
        scale: 1 as it was trained.
    """

    path: Path
    scale: float


@dataclass(frozen=True)
class Adapters:
    """What LoRAs add, by the name of the layer: in the transformer, in CLIP, in T5."""

    transformer: Mapping[str, LowRank] = field(default_factory=dict)
    text_encoder: Mapping[str, LowRank] = field(default_factory=dict)
    text_encoder_2: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """All of it."""
        groups = (self.transformer, self.text_encoder, self.text_encoder_2)
        return sum(one.nbytes for group in groups for one in group.values())

    def to(self, device: torch.device) -> Adapters:
        """The same on `device`."""
        return Adapters(
            *(
                {name: one.to(device) for name, one in group.items()}
                for group in (self.transformer, self.text_encoder, self.text_encoder_2)
            )
        )


@dataclass(frozen=True)
class _Place:
    """Where a name's outputs are: `rows` from `start` on of `layer`, being its own from `own` on.

    `rows` is 0 for all of the layer.
    """

    layer: str
    rows: int = 0
    start: int = 0
    own: int = 0


@dataclass
class _Pair:
    """The tensors of one layer, in one file: (name, tensor) each."""

    down: tuple[str, Tensor] | None = None
    up: tuple[str, Tensor] | None = None
    alpha: tuple[str, Tensor] | None = None


def read_adapters(
    files: Iterable[LoraFile],
    transformer: FluxTransformer,
    text_encoder: nn.Module,
    text_encoder_2: nn.Module,
) -> Adapters:
    """What the LoRAs of `files` add together to the layers of these models, on the CPU.

    Raises:
        WeightsNotFound: no such file.
        WeightsInvalid: truncated, or half of a pair is missing.
        UnsupportedModel: a LoRA for another model, or none; names the first tensor that does not
            fit.
    """
    models: dict[str, nn.Module] = {
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "transformer": transformer,
    }
    tables = {name: _plain_names(model) for name, model in models.items()}
    tables["transformer"] = _transformer_names(transformer)
    found: dict[str, dict[str, list[LowRank]]] = {name: {} for name in models}
    for file in files:
        if file.scale == 0:
            continue
        tensors, config = _tensors(file.path)
        seen: dict[tuple[str, str, int], str] = {}
        for (model, key), pair in _pairs(file.path, tensors, tables).items():
            parts = _low_rank(file, pair, models[model], tables[model][key], config)
            for layer, low_rank in parts:
                other = seen.setdefault((model, layer, low_rank.starts[0]), key)
                if other != key:
                    raise WeightsInvalid(f"{str(file.path)!r} has {layer} twice: {other} and {key}")
                found[model].setdefault(layer, []).append(low_rank)
    return Adapters(
        **{
            model: {layer: LowRank.join(parts) for layer, parts in layers.items()}
            for model, layers in found.items()
        }
    )


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors, and PEFT's configuration if it has one."""
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            config = json.loads((reader.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise WeightsInvalid(f"{str(path)!r} cannot be read: {error}") from error
    beside = path.with_name(PEFT_CONFIG)
    if not config and beside.is_file():
        config = {f"transformer.{name}": value for name, value in read_json(beside).items()}
    return tensors, config if isinstance(config, dict) else {}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _plain_names(model: nn.Module) -> dict[str, list[_Place]]:
    """The linear layers of a text encoder, by their names without dots."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    table = {_flat(name): [_Place(name)] for name in names}
    # CLIP's text model was a part of another class when most LoRAs were made.
    return table | {f"text_model_{name}": places for name, places in table.items()}


def _transformer_names(model: FluxTransformer) -> dict[str, list[_Place]]:
    """The transformer's linear layers, by original and diffusers' names without dots."""
    config, width = model.config, model.config.hidden_size
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    table = {_flat(name): [_Place(name)] for name in layers}
    for i in range(config.num_single_layers):
        place = _Place(f"single_blocks.{i}.linear1", rows=3 * width)
        table[f"single_blocks_{i}_qkv"] = [place]
    theirs: dict[str, list[_Place]] = {}
    for piece in tensor_names.pieces(config.num_layers, config.num_single_layers):
        layer, kind = piece.original.rsplit(".", 1)
        if layer in layers and kind == "weight":
            name = _flat(piece.diffusers.removesuffix(".weight"))
            rows, start, own = (
                part * width for part in (piece.rows, piece.start, piece.diffusers_start)
            )
            theirs.setdefault(name, []).append(_Place(layer, rows, start, own))
    return table | theirs


def _pairs(
    path: Path, tensors: Mapping[str, Tensor], tables: Mapping[str, Mapping[str, list[_Place]]]
) -> dict[tuple[str, str], _Pair]:
    """The file's tensors by (model, key of its table)."""
    found: dict[tuple[str, str], _Pair] = {}
    if any(name.startswith("transformer.") for name in tensors):
        # Some files hold the same LoRA a second time, as kohya's scripts name it.
        tensors = {n: t for n, t in tensors.items() if not n.startswith("lora_unet_")}
    for name, tensor in tensors.items():
        if _is_spare(name, tensor):
            continue
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, name):
                raise UnsupportedModel(
                    f"{str(path)!r} is {kind} (tensor {name}): only LoRAs of linear layers are read"
                )
        key, kind = _parse(name, tables)
        if key is None:
            raise UnsupportedModel(
                f"{str(path)!r}: tensor {name} fits no layer of FLUX.1: a LoRA for another model, "
                "or none"
            )
        pair = found.setdefault(key, _Pair())
        if getattr(pair, kind) is not None:
            raise WeightsInvalid(f"{str(path)!r} holds {getattr(pair, kind)[0]} and {name}")
        setattr(pair, kind, (name, tensor))
    if not found:
        raise WeightsInvalid(f"{str(path)!r} holds no tensors")
    return found


def _is_spare(name: str, tensor: Tensor) -> bool:
    """Whether a tensor, though no part of a LoRA, changes nothing."""
    known = any(re.search(pattern, name) for pattern in KINDS.values())
    return not known and not bool(tensor.any())


def _parse(
    name: str, tables: Mapping[str, Mapping[str, list[_Place]]]
) -> tuple[tuple[str, str] | None, str]:
    """The model and key of a tensor's layer, and which of the layer's it is."""
    for pattern, replacement in XLABS:
        name = re.sub(pattern, replacement, name)
    for kind, pattern in KINDS.items():
        layer = re.sub(pattern, "", name)
        if layer == name:
            continue
        for model, prefixes in PREFIXES.items():
            for prefix in prefixes:
                key = _flat(layer.removeprefix(prefix))
                if layer.startswith(prefix) and key in tables[model]:
                    return (model, key), kind
    return None, ""


def _low_rank(
    file: LoraFile,
    pair: _Pair,
    model: nn.Module,
    places: list[_Place],
    config: Mapping[str, Any],
) -> list[tuple[str, LowRank]]:
    """What a pair adds to each of its layers."""
    if pair.down is None or pair.up is None:
        there = next(one for one in (pair.down, pair.up, pair.alpha) if one is not None)
        raise WeightsInvalid(f"{str(file.path)!r} holds {there[0]}, but not its counterpart")
    (name, down), (up_name, up) = pair.down, pair.up
    layers = [_linear(model, place.layer) for place in places]
    rows = [place.rows or layer.out_features for place, layer in zip(places, layers, strict=True)]
    outputs, inputs = sum(rows), layers[0].in_features
    rank = down.shape[0] if down.ndim else 0
    for label, tensor, wanted in ((name, down, (rank, inputs)), (up_name, up, (outputs, rank))):
        if tuple(tensor.shape) != wanted or not rank:
            raise UnsupportedModel(
                f"{str(file.path)!r}: tensor {label} is {tuple(tensor.shape)}, where "
                f"{places[0].layer} takes ({', '.join(map(str, wanted))}): a LoRA for another model"
            )
        if not tensor.is_floating_point():
            raise WeightsInvalid(f"{str(file.path)!r}: tensor {label} is {tensor.dtype}, no float")
        if not bool(tensor.float().isfinite().all()):
            raise WeightsInvalid(f"{str(file.path)!r}: tensor {label} has NaN or infinity")
    scale = file.scale * _own_scale(file.path, pair, rank, config)
    dtype = layers[0].dtype if isinstance(layers[0], PackedLinear) else layers[0].weight.dtype
    down = (down.float() * scale).to(dtype)
    found = []
    for place, count in zip(places, rows, strict=True):
        part = up[place.own : place.own + count].to(dtype).contiguous()
        found.append((place.layer, LowRank.of(down, part, place.start)))
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _own_scale(path: Path, pair: _Pair, rank: int, config: Mapping[str, Any]) -> float:
    """What a layer's product counts by itself: alpha / rank, or 1 where no alpha is told."""
    assert pair.down is not None
    if pair.alpha is not None:
        alpha = float(pair.alpha[1]) if pair.alpha[1].numel() == 1 else math.nan
        if not math.isfinite(alpha):
            raise WeightsInvalid(f"{str(path)!r}: tensor {pair.alpha[0]} is no number")
        return alpha / rank
    name = pair.down[0]
    model = next((one for one in PREFIXES if name.startswith(f"{one}.")), "transformer")
    settings = {
        key.removeprefix(f"{model}."): value
        for key, value in config.items()
        if key.startswith(f"{model}.")
    }
    if settings.get("use_dora"):
        raise UnsupportedModel(f"{str(path)!r} is DoRA: only LoRAs of linear layers are read")
    layer = re.sub(KINDS["down"], "", name)
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise WeightsInvalid(f"{str(path)!r} says alpha_pattern={patterns!r}, which is no object")
    alpha = next(
        (value for key, value in patterns.items() if f".{layer}".endswith(f".{key}")),
        settings.get("lora_alpha", rank),
    )
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not math.isfinite(alpha):
        raise WeightsInvalid(f"{str(path)!r} says alpha={alpha!r}, which is no number")
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))
