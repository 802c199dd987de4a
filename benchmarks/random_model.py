"""FLUX.1 [dev] at its true 12 B shapes with random weights, made on the device in seconds.

`random-12b` is in the model's precision; `random-12b:float8`, `random-12b:Q4_K` and their like keep
the transformer's large weights packed, as those of such files are with `load(..., packed=True)`.
Speed and memory do not depend on the weights' values, as long as they are not zeros (zeros run 13 %
faster on an H200), so a benchmark needs no licence and no download.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import krea_local
from krea_local import weights
from krea_local.api import choose_device, choose_dtype, choose_plan
from krea_local.errors import InvalidRequest
from krea_local.kernels import ggml
from krea_local.kernels.rows import CODES
from krea_local.loading import EngineName, Models, load_tokenizer
from krea_local.memory import check_offload, pin
from krea_local.packed import PackedLinear, Packing, scratch_bytes, weight_bytes
from krea_local.pipeline import Krea
from krea_local.plan import FLUX1, Sizes
from krea_local.safety import SafetyChecker
from krea_local.sampling import Shift
from krea_local.schema import Acceleration
from krea_local.tensor_names import pieces, to_diffusers
from krea_local.transformer import Config, FluxTransformer

RANDOM = "random-12b"
SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}
"""Where each kind of ggml's blocks has scales in half precision."""
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 1,  # the tiny tokenizer's, which stands in for CLIP's
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
    },
}


def build(name: str, changes: Mapping[str, Any] | None = None) -> Any:
    """One component at its true shapes, but for `changes`, on torch's default device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = {**CONFIGS[name], **(changes or {})}
    if name == "transformer":
        return FluxTransformer2DModel(**config)
    if name == "vae":
        return AutoencoderKL(**config)
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    return T5EncoderModel(T5Config(**config))


def random_models(
    device: torch.device,
    dtype: torch.dtype,
    *,
    engine: EngineName = "native",
    offload: str = "none",
    kind: str = "",
) -> Models:
    """All components with weights N(0, 0.02); norms and biases as a fresh model has them.

    With `kind`, packed ones of the transformer have random codes.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPTokenizer, T5TokenizerFast

    cpu = torch.device("cpu")
    home = cpu if offload in ("model", "blocks") else device
    with init_empty_weights():  # which, unlike the meta device, makes buffers
        parts = {name: build(name) for name in CONFIGS if name != "transformer"}
    # Made on the device, wherever they go then: a CPU would need minutes.
    parts = {name: filled(model, device, dtype).to(home) for name, model in parts.items()}
    transformer = empty_transformer(kind, dtype)
    parts["transformer"] = filled(transformer, device, dtype).to(home)
    if engine == "diffusers":
        parts["transformer"] = as_diffusers(parts["transformer"])
    elif offload == "modulation":
        for layer in transformer.modulations():
            layer.to(cpu)
    tiny = weights.find("tiny").folder
    return Models(
        **parts,
        tokenizer=load_tokenizer(CLIPTokenizer, tiny / "tokenizer", "vocab.json"),
        tokenizer_2=load_tokenizer(T5TokenizerFast, tiny / "tokenizer_2", "spiece.model"),
        shift=Shift(),
    )


def empty_transformer(kind: str, dtype: torch.dtype) -> FluxTransformer:
    """Ours, on the meta device; its large layers packed, if `kind` is one of a packing."""
    with torch.device("meta"):
        model = FluxTransformer(Config.of(CONFIGS["transformer"]))
    if kind:
        packings = {
            name: packing(kind, tuple(model.get_parameter(f"{name}.weight").shape))
            for name in set().union(*model.layer_names())
        }
        model.pack(packings, dtype)
    return model


def packing(kind: str, shape: tuple[int, ...]) -> Packing:
    """How a file of that kind keeps a weight [N, K]."""
    rows, columns = shape
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    if kind == "float8":
        parts = {CODES: (torch.float8_e4m3fn, shape), "scale": (torch.float32, (rows,))}
    elif kind in ggml.KINDS:
        numbers, nbytes, _ = ggml.KINDS[kind]
        parts = {CODES: (torch.uint8, (rows, columns // numbers * nbytes))}
    else:
        known = ", ".join(["float8", *ggml.KINDS])
        raise InvalidRequest(f"random-12b:{kind}: should be one of {known}")
    dtypes = {name: dtype for name, (dtype, _) in parts.items()}
    return Packing(kind, dtypes, {name: part for name, (_, part) in parts.items()}, (rows, columns))


def as_diffusers(transformer: FluxTransformer, dtype: torch.dtype | None = None) -> Any:
    """The same weights in diffusers' class: most in the same memory, unless in another dtype."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            **dataclasses.asdict(transformer.config), guidance_embeds=True
        )
    config = transformer.config
    table = pieces(config.num_layers, config.num_single_layers)
    state = to_diffusers(transformer.state_dict(), table, config.hidden_size)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def filled(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """`model`, which is on the meta device, on `device` with random weights."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for key, tensor in model.state_dict().items():
        layer = model.get_submodule(key.rpartition(".")[0])
        if isinstance(layer, PackedLinear) and not key.endswith("bias"):
            state[key] = random_part(layer.packing, key.rpartition(".")[2], device, generator)
            continue
        filled = torch.empty(tensor.shape, device=device, dtype=dtype)
        if tensor.ndim > 1:
            filled.normal_(0, 0.02, generator=generator)
        else:
            # Of queries and keys too, whose norms are called "scale": zeros would run faster.
            filled.fill_(1.0 if key.endswith(("weight", "scale")) else 0.0)
        state[key] = filled
    model.load_state_dict(state, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # T5's embeddings are one tensor under two names
    return model.to(device).eval().requires_grad_(False)


def random_part(
    packing: Packing, name: str, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """One part of a packed weight, such that its numbers are of the size of N(0, 0.02)."""
    shape, dtype = packing.shapes[name], packing.dtypes[name]
    if name == "scale":
        return torch.full(shape, 0.02 / 100, device=device)
    if dtype == torch.float8_e4m3fn:
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.normal_(0, 100, generator=generator).clamp_(-448, 448).to(dtype)
    codes = torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator)
    # Any codes are numbers, but as scales they may be infinite: a half's exponent is made small,
    # 2^-11, or 2^-14 where it is multiplied by another scale.
    numbers, nbytes, _ = ggml.KINDS[packing.kind]
    for place in SCALES[packing.kind]:
        exponents = codes.unflatten(1, (-1, nbytes))[:, :, place + 1]
        exponents.bitwise_and_(0x83).bitwise_or_(0x10 if numbers == 32 else 0x04)
    return codes


def sizes_of(kind: str) -> Sizes:
    """Of the 12 B model in bfloat16, with its transformer packed."""
    model = empty_transformer(kind, torch.bfloat16)
    return dataclasses.replace(
        FLUX1,
        blocks=tuple(weight_bytes(block, 2) for block in model.step_blocks()),
        modulation=weight_bytes(model.modulations(), 2),
        scratch=scratch_bytes([model], 2),
        eight_bit=model.is_kept_in_float8,
    )


def krea_of(
    model: str,
    device: str,
    dtype: str,
    offload: str,
    batch_size: int,
    *,
    engine: EngineName = "native",
    acceleration: Acceleration = "none",
    memory: str | None = None,
) -> Krea:
    """A Krea for a benchmark: "random-12b" or a packed one, or anything that `load` takes.

    "tiny:float8", "tiny:Q8_0" are the small models' likes, to rehearse with.

    With `memory`, which is `load`'s, `offload` is not asked.
    """
    name, _, kind = model.partition(":")
    if name in ("tiny", "mini") and kind:
        with tempfile.TemporaryDirectory() as folder:
            suffix = {"float8": ".safetensors", "Q8_0": ".gguf"}[kind]
            file = krea_local.convert(Path(folder) / f"{name}{suffix}", name, progress=False)
            return krea_local.load(
                name,
                transformer=file,
                packed=True,
                device=device,
                dtype=dtype,
                offload=offload,
                batch_size=batch_size,
                acceleration=acceleration,
                progress=False,
            )
    if name != RANDOM:
        return krea_local.load(
            model,
            device=device,
            dtype=dtype,
            offload=offload if memory is None else None,
            memory=memory,
            batch_size=batch_size,
            engine=engine,
            acceleration=acceleration,
            progress=False,
        )
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    plan = None
    if memory is not None:
        assert number == torch.bfloat16, "FLUX1's sizes are those in bfloat16"
        packed = sizes_of(kind) if kind else None
        plan = choose_plan(
            FLUX1, memory, place, number, batch_size, acceleration, packed=packed, always=True
        )
        offload = plan.offload
    checker = weights.find("tiny").folder / "safety_checker"
    krea = Krea(
        random_models(place, number, engine=engine, offload=offload, kind=kind),
        device=place,
        label=RANDOM,
        guidance_scale=4.5,
        offload=check_offload(offload),
        plan=plan,
        acceleration=acceleration,
        load_safety_checker=lambda: SafetyChecker(checker, device=place),
        batch_size=batch_size,
        progress=False,
    )
    parts = (krea.models.transformer, krea.models.vae, krea.models.text_encoder)
    pin((*parts, krea.models.text_encoder_2), place)
    return krea
