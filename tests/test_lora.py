"""LoRAs in every layout: the same change, added to the right layers, and gone without a trace."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import krea_local
from benchmarks.fidelity import EMULATED, emulated
from krea_local import (
    InvalidRequest,
    UnsupportedModel,
    WeightsInvalid,
    WeightsNotFound,
    cli,
    lora,
    lora_files,
    tensor_names,
)
from krea_local.layers import Linear, LowRank
from krea_local.lora import LoraFile, read_adapters
from krea_local.recipe import read_recipe
from krea_local.schema import Lora, Txt2ImgRequest
from krea_local.transformer import Config, FluxTransformer

if TYPE_CHECKING:
    from krea_local.pipeline import Krea

CONFIG = Config(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
D = CONFIG.hidden_size
RANK = 3
SMALL = {"width": 64, "height": 64}


@functools.cache
def transformer() -> FluxTransformer:
    torch.manual_seed(0)
    return FluxTransformer(CONFIG).requires_grad_(False)


def pair(outputs: int, inputs: int, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=random)
    return down, torch.randn(outputs, rank, generator=random)


def diffusers_shapes() -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of diffusers' linear layers."""
    state = transformer().state_dict()
    table = tensor_names.pieces(CONFIG.num_layers, CONFIG.num_single_layers)
    theirs = tensor_names.to_diffusers(state, table, D)
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in theirs.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }


def original_shapes() -> dict[str, tuple[int, int]]:
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in transformer().named_modules()
        if isinstance(module, nn.Linear)
    }


def differences(path: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """What a file changes in every layer's weight, in full."""
    adapters = read_adapters([LoraFile(path, scale)], transformer(), nn.Module(), nn.Module())
    model = transformer()
    return {
        name: low_rank.added_to(torch.zeros_like(model.get_submodule(name).weight))
        for name, low_rank in adapters.transformer.items()
    }


def write(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata or None
    )
    return path


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one
    )


@pytest.mark.parametrize(
    ("prefix", "down", "up", "flat"),
    [
        ("transformer.", "lora_A", "lora_B", False),  # diffusers, ai-toolkit
        ("transformer.", "lora.down", "lora.up", False),  # older diffusers
        ("", "lora_A.default", "lora_B.default", False),  # PEFT
        ("base_model.model.", "lora_A", "lora_B", False),
        ("lora_transformer_", "lora_down", "lora_up", True),  # OneTrainer
    ],
)
def test_diffusers_names_change_what_diffusers_weights_would(
    prefix: str, down: str, up: str, flat: bool, tmp_path: Path
) -> None:
    table = tensor_names.pieces(CONFIG.num_layers, CONFIG.num_single_layers)
    tensors, wanted = {}, {}
    for seed, (name, shape) in enumerate(diffusers_shapes().items()):
        pair_down, pair_up = pair(*shape, seed)
        layer = prefix + (name.replace(".", "_") if flat else name)
        tensors[f"{layer}.{down}.weight"], tensors[f"{layer}.{up}.weight"] = pair_down, pair_up
        wanted[f"{name}.weight"] = pair_up @ pair_down
    by_original: dict[str, Tensor] = {}
    state = transformer().state_dict()
    for piece in table:
        if piece.diffusers in wanted:
            whole = by_original.setdefault(piece.original, torch.zeros_like(state[piece.original]))
            own = piece.of_diffusers(wanted[piece.diffusers], D)
            piece.of_original(whole, D).copy_(own)
    found = differences(write(tmp_path / "lora.safetensors", tensors))
    assert same(found, {name.removesuffix(".weight"): t for name, t in by_original.items()})
    assert found.keys() == original_shapes().keys()


@pytest.mark.parametrize(
    ("prefix", "down", "up", "flat"),
    [
        ("lora_unet_", "lora_down", "lora_up", True),  # kohya
        ("diffusion_model.", "lora_A", "lora_B", False),  # ComfyUI
        ("base_model.model.", "lora_A", "lora_B", False),  # fal's trainer
        ("", "lora_A", "lora_B", False),  # Black Forest Labs
    ],
)
def test_original_names_change_the_fused_layers(
    prefix: str, down: str, up: str, flat: bool, tmp_path: Path
) -> None:
    tensors, wanted = {}, {}
    for seed, (name, shape) in enumerate(original_shapes().items()):
        pair_down, pair_up = pair(*shape, seed)
        layer = prefix + (name.replace(".", "_") if flat else name)
        tensors[f"{layer}.{down}.weight"], tensors[f"{layer}.{up}.weight"] = pair_down, pair_up
        wanted[name] = pair_up @ pair_down
    assert same(differences(write(tmp_path / "lora.safetensors", tensors)), wanted)


def test_xlabs_names(tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    layers = {
        "double_blocks.1.processor.qkv_lora1": ("double_blocks.1.img_attn.qkv", 3 * D, D),
        "double_blocks.1.processor.qkv_lora2": ("double_blocks.1.txt_attn.qkv", 3 * D, D),
        "double_blocks.1.processor.proj_lora1": ("double_blocks.1.img_attn.proj", D, D),
        "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", D, D),
        "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", 3 * D, D),
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", D, 5 * D),
    }
    for seed, (name, (layer, outputs, inputs)) in enumerate(layers.items()):
        down, up = pair(outputs, inputs, seed)
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = down, up
        wanted[layer] = torch.zeros_like(transformer().get_submodule(layer).weight)
        wanted[layer][:outputs] = up @ down
    assert same(differences(write(tmp_path / "lora.safetensors", tensors)), wanted)


def of_one_layer(**more: Tensor) -> dict[str, Tensor]:
    down, up = pair(D, D, 1)
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up} | {
        f"{name}.{key}": tensor for key, tensor in more.items()
    }


def test_strength_is_alpha_over_rank_times_the_scale(tmp_path: Path) -> None:
    layer = "double_blocks.0.img_attn.proj"
    plain = differences(write(tmp_path / "plain.safetensors", of_one_layer()))[layer]
    halved = of_one_layer(alpha=torch.tensor(1.5))
    found = differences(write(tmp_path / "alpha.safetensors", halved), scale=3.0)[layer]
    assert torch.allclose(found, 3 * 1.5 / RANK * plain, atol=1e-5)
    name = "transformer_blocks.0.attn.to_out.0"
    for config, share in (
        ({"r": RANK, "lora_alpha": 6}, 6 / RANK),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {name: 1}}, 1 / RANK),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
    ):
        said = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        file = write(tmp_path / "peft.safetensors", of_one_layer(), lora_adapter_metadata=said)
        assert torch.allclose(differences(file)[layer], share * plain, atol=1e-5)


def test_several_add_up(tmp_path: Path) -> None:
    one = write(tmp_path / "one.safetensors", of_one_layer())
    down, up = pair(3 * D, D, 5, rank=2)
    both = of_one_layer() | {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": down,
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": up,
    }
    other = write(tmp_path / "other.safetensors", both)
    adapters = read_adapters(
        [LoraFile(one, 0.5), LoraFile(other, 2.0)], transformer(), nn.Module(), nn.Module()
    ).transformer
    apart = differences(one, 0.5), differences(other, 2.0)
    layer = "double_blocks.0.img_attn.proj"
    total = adapters[layer].added_to(torch.zeros(D, D))
    assert torch.allclose(total, apart[0][layer] + apart[1][layer], atol=1e-5)
    assert len(adapters[layer].ups) == 1  # one product, of both ranks
    assert adapters[layer].down.shape == (2 * RANK, D)


def test_a_layer_adds_what_its_changed_weight_would() -> None:
    torch.manual_seed(1)
    layer = Linear(12, 20).requires_grad_(False)
    low_rank = LowRank.join(
        [LowRank.of(*pair(8, 12, 1), start=0), LowRank.of(*pair(6, 12, 2), start=10)]
    )
    x = torch.randn(9, 12)
    wanted = nn.functional.linear(x, low_rank.added_to(layer.weight), layer.bias)
    plain = layer(x)
    layer.low_rank = low_rank
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    out = torch.empty(9, 20)
    assert layer.project(x, out=out) is out
    assert torch.allclose(out, wanted, atol=1e-5)
    gelu = layer.project_gelu(x, torch.empty(9, 20))
    assert torch.allclose(gelu, nn.functional.gelu(wanted, approximate="tanh"), atol=1e-5)
    layer.low_rank = None
    assert torch.equal(layer(x), plain)


def test_a_lora_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    once = write(tmp_path / "once.safetensors", of_one_layer())
    down, up = (tensor.clone() for tensor in of_one_layer().values())
    kohya = "lora_unet_double_blocks_0_img_attn_proj"
    again = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
    both = write(tmp_path / "both.safetensors", of_one_layer() | again)
    assert same(differences(both), differences(once))
    layer = "double_blocks.0.img_attn.proj"
    other = "transformer_blocks.0.attn.to_out.0"
    again |= {f"{other}.lora_A.weight": down + 1, f"{other}.lora_B.weight": up + 1}
    with pytest.raises(WeightsInvalid, match=f"has {layer} twice"):
        differences(write(tmp_path / "twice.safetensors", again))


def test_what_changes_nothing_may_be_there(tmp_path: Path) -> None:
    zeros = {"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.zeros(D)}
    tensors = {"position_embedding": torch.zeros(3)} | zeros | of_one_layer()
    plain = differences(write(tmp_path / "plain.safetensors", of_one_layer()))
    assert same(differences(write(tmp_path / "lora.safetensors", tensors)), plain)


def test_pefts_own_folder_has_its_strength_beside_the_file(tmp_path: Path) -> None:
    plain = differences(write(tmp_path / "plain.safetensors", of_one_layer()))
    name = "base_model.model.transformer_blocks.0.attn.to_out.0"
    down, up = of_one_layer().values()
    halves = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    folder = tmp_path / "peft"
    folder.mkdir()
    file = write(folder / "adapter_model.safetensors", halves)
    (folder / lora.PEFT_CONFIG).write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    assert lora_files.find_lora(folder) == file
    found = differences(file)
    assert same(found, {layer: 2 * change for layer, change in plain.items()})


FAULTS: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "other model": (
        {
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8),
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2),
        },
        UnsupportedModel,
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight fits no layer of FLUX.1",
    ),
    "other width": (
        {
            "transformer.x_embedder.lora_A.weight": torch.ones(2, 64),
            "transformer.x_embedder.lora_B.weight": torch.ones(6144, 2),
        },
        UnsupportedModel,
        r"x_embedder.lora_B.weight is \(6144, 2\), where img_in takes \(32, 2\)",
    ),
    "half": (
        {"transformer.x_embedder.lora_A.weight": torch.ones(2, 64)},
        WeightsInvalid,
        "x_embedder.lora_A.weight, but not its counterpart",
    ),
    "integers": (
        {
            "transformer.x_embedder.lora_A.weight": torch.ones(2, 64, dtype=torch.int8),
            "transformer.x_embedder.lora_B.weight": torch.ones(32, 2),
        },
        WeightsInvalid,
        "is torch.int8, no float",
    ),
    "NaN": (
        {
            "transformer.x_embedder.lora_A.weight": torch.full((2, 64), torch.nan),
            "transformer.x_embedder.lora_B.weight": torch.ones(32, 2),
        },
        WeightsInvalid,
        "x_embedder.lora_A.weight has NaN",
    ),
    "DoRA": (of_one_layer(dora_scale=torch.ones(1)), UnsupportedModel, "is DoRA"),
    "LoKr": (
        {"lora_unet_double_blocks_0_img_attn_proj.lokr_w1": torch.ones(2, 2)},
        UnsupportedModel,
        "is a LyCORIS network",
    ),
    "control": (
        {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)},
        UnsupportedModel,
        "more than low-rank changes",
    ),
    "empty": ({}, WeightsInvalid, "holds no tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    tensors, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        differences(write(tmp_path / "lora.safetensors", tensors))


# The tiny model's own


@pytest.fixture(scope="module")
def loras(krea: Krea, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`all`: of every layer of the transformer; `text`: of both text encoders, too."""
    folder = tmp_path_factory.mktemp("loras")
    random = torch.Generator().manual_seed(3)

    def pairs(model: nn.Module, prefix: str) -> dict[str, Tensor]:
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                outputs, inputs = module.weight.shape
                shapes = {"A": (4, inputs), "B": (outputs, 4)}
                for half, shape in shapes.items():
                    tensor = 0.3 * torch.randn(shape, generator=random)
                    found[f"{prefix}{name}.lora_{half}.weight"] = tensor
        return found

    models = krea.models
    tensors = pairs(models.transformer, "diffusion_model.")
    text = pairs(models.text_encoder, "text_encoder.text_model.")
    text |= pairs(models.text_encoder_2, "text_encoder_2.")
    return {
        "all": write(folder / "all.safetensors", tensors),
        "text": write(folder / "text.safetensors", text),
    }


def drawn(krea: Krea, **arguments: object) -> bytes:
    result = krea.txt2img(
        "a fox",
        seed=1,
        num_inference_steps=2,
        image_size=SMALL,
        enable_safety_checker=False,
        **arguments,  # type: ignore[arg-type]
    )
    return result.images[0].tobytes()


def test_loras_change_the_picture_and_go_without_a_trace(
    krea: Krea, loras: dict[str, Path]
) -> None:
    before = drawn(krea)
    changed = drawn(krea, loras=[{"path": loras["all"], "scale": 1}])
    assert changed != before
    assert drawn(krea, loras=loras["all"]) == changed
    assert drawn(krea, loras=[Lora(path=str(loras["all"]), scale=0.5)]) not in (before, changed)
    assert drawn(krea, loras=[{"path": loras["all"], "scale": 0}]) == before
    encoded = drawn(krea, loras=[loras["text"]])
    assert encoded not in (before, changed)
    assert drawn(krea, loras=[loras["all"], loras["text"]]) not in (before, changed, encoded)
    assert drawn(krea) == before


def test_it_is_as_if_the_weights_were_changed(
    tiny_folder: Path, krea: Krea, loras: dict[str, Path]
) -> None:
    merged = krea_local.load(tiny_folder, device="cpu", dtype="float32")
    models = merged.models
    adapters = read_adapters(
        [LoraFile(loras["all"], 1.0), LoraFile(loras["text"], 1.0)],
        models.transformer,
        models.text_encoder,
        models.text_encoder_2,
    )
    for model, group in (
        (models.transformer, adapters.transformer),
        (models.text_encoder, adapters.text_encoder),
        (models.text_encoder_2, adapters.text_encoder_2),
    ):
        assert group
        for name, low_rank in group.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(low_rank.added_to(layer.weight))
    request = Txt2ImgRequest(prompt="a fox", num_inference_steps=2)
    arguments = {"seeds": [1], "width": 64, "height": 64}
    drawn(krea, loras=[loras["all"], loras["text"]])  # and they stay until the next call
    found, wanted = (one.latents(request, **arguments) for one in (krea, merged))
    drawn(krea)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, krea.latents(request, **arguments), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{"offload": "blocks"}, {"offload": "model"}])
def test_every_plan_draws_the_same(
    tiny_folder: Path, krea: Krea, loras: dict[str, Path], options: dict[str, str]
) -> None:
    other = krea_local.load(tiny_folder, device="cpu", dtype="float32", **options)
    both = [loras["all"], loras["text"]]
    assert drawn(other, loras=both) == drawn(krea, loras=both)
    assert drawn(other) == drawn(krea)


@pytest.mark.parametrize("eight_bit", EMULATED)
def test_levels_in_8_bits_hold_them_too(
    tiny_folder: Path, loras: dict[str, Path], eight_bit: str
) -> None:
    krea = krea_local.load(tiny_folder, device="cpu", dtype="bfloat16")
    plain = drawn(krea)
    with emulated(eight_bit):
        quantized = drawn(krea, acceleration="regular")
        changed = drawn(krea, acceleration="regular", loras=[loras["all"]])
        assert len({plain, quantized, changed}) == 3
        assert drawn(krea, acceleration="regular") == quantized
        assert drawn(krea, loras=[loras["all"]]) != changed
    assert drawn(krea) == plain


@pytest.mark.parametrize("eight_bit", EMULATED.values())
def test_8_bit_layers_quantise_the_sum(eight_bit: torch.dtype) -> None:
    from krea_local.kernels import PLAIN
    from krea_local.layers import EightBitLinear

    torch.manual_seed(2)
    layer = Linear(32, 48).requires_grad_(False)
    low_rank = LowRank.of(*pair(48, 32, 1))
    changed = Linear(32, 48).requires_grad_(False)
    changed.weight.copy_(low_rank.added_to(layer.weight))
    layer.low_rank = low_rank
    cpu = torch.device("cpu")
    found, wanted = (EightBitLinear.of(one, eight_bit, PLAIN, cpu) for one in (layer, changed))
    assert found.weight.dtype == eight_bit
    assert torch.equal(found.weight.view(torch.uint8), wanted.weight.view(torch.uint8))
    assert torch.equal(found.scale, wanted.scale)
    bare = EightBitLinear.of(Linear(32, 48).requires_grad_(False), eight_bit, PLAIN, cpu)
    assert not torch.equal(found.scale, bare.scale)


def test_plans_make_room(tiny_folder: Path, krea: Krea, loras: dict[str, Path]) -> None:
    other = krea_local.load(tiny_folder, device="cpu", dtype="float32", memory="40GB")
    assert other.plan is not None
    peak = other.plan.peak
    want = drawn(krea, loras=loras["all"])
    assert drawn(other, loras=loras["all"]) == want
    assert (
        other.plan.adapters
        == lora.read_adapters(
            [LoraFile(loras["all"], 1.0)], other.models.transformer, nn.Module(), nn.Module()
        ).nbytes
    )
    assert other.plan.peak == peak + other.plan.adapters
    assert "LoRAs" in str(other.plan)
    tight = krea_local.load(tiny_folder, device="cpu", dtype="float32", memory=f"{peak}B")
    assert tight.plan is not None
    assert tight.plan.offload == "none"
    with pytest.warns(krea_local.KreaWarning, match="the LoRAs need memory"):
        assert drawn(tight, loras=loras["all"]) == want
    assert tight.offload != "none"
    assert tight.plan.peak <= peak


def test_a_failure_leaves_the_model_usable(krea: Krea, loras: dict[str, Path]) -> None:
    before = drawn(krea)
    broken = loras["all"].with_name("broken.safetensors")
    broken.write_bytes(loras["all"].read_bytes()[:-10])
    with pytest.raises(WeightsInvalid, match="truncated"):
        drawn(krea, loras=[loras["text"], broken])
    assert drawn(krea) == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt])
def test_nothing_is_left_of_loras_that_could_not_be_added(
    error: BaseException, krea: Krea, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = drawn(krea)
    changed = drawn(krea, loras=[loras["text"]])

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(lora.Adapters, "to", fail)
        with pytest.raises((krea_local.OutOfMemory, KeyboardInterrupt)):
            drawn(krea, loras=[loras["text"], loras["all"]])
    assert drawn(krea) == before
    assert drawn(krea, loras=[loras["text"]]) == changed
    with monkeypatch.context() as patch:
        patch.setattr(krea.engine, "adapt", fail)
        with pytest.raises((krea_local.OutOfMemory, KeyboardInterrupt)):
            drawn(krea)
    assert drawn(krea) == before


def test_without_room_on_the_host_the_model_stays_where_it_is(
    tiny_folder: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = krea_local.load(tiny_folder, device="cpu", dtype="float32", memory="40GB").plan
    assert plan is not None
    krea = krea_local.load(tiny_folder, device="cpu", dtype="float32", memory=f"{plan.peak}B")
    before = drawn(krea)
    with monkeypatch.context() as patch:
        patch.setattr(krea._placing, "host_has_room", lambda plan: False)
        with pytest.raises(krea_local.OutOfMemory, match="the LoRAs take 0.00 GiB, which leave"):
            drawn(krea, loras=loras["all"])
    assert krea.offload == "none"
    assert drawn(krea) == before
    with pytest.warns(krea_local.KreaWarning, match="the LoRAs need memory: from now on less"):
        drawn(krea, loras=loras["all"])


def test_diffusers_engine_says_no(krea_diffusers: Krea, loras: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="loras: are for engine='native'"):
        drawn(krea_diffusers, loras=loras["all"])


def test_diffusers_own_reader_agrees(
    tiny_folder: Path, krea: Krea, loras: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from diffusers import FluxPipeline

    other = krea_local.load(tiny_folder, device="cpu", dtype="float32", engine="diffusers")
    config = krea.engine.transformer.config  # type: ignore[union-attr]
    state = krea.models.transformer.state_dict()
    table = tensor_names.pieces(config.num_layers, config.num_single_layers)
    theirs = tensor_names.to_diffusers(state, table, config.hidden_size)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for name, tensor in theirs.items():
        if tensor.ndim == 2 and ("attn" in name or "ff" in name or "proj_" in name):
            layer = f"transformer.{name.removesuffix('.weight')}"
            outputs, inputs = tensor.shape
            tensors[f"{layer}.lora_A.weight"] = 0.3 * torch.randn(4, inputs, generator=random)
            tensors[f"{layer}.lora_B.weight"] = 0.3 * torch.randn(outputs, 4, generator=random)
    file = write(tmp_path / "lora.safetensors", tensors)
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    other.models.transformer.load_lora_adapter(converted, prefix="transformer")
    request = Txt2ImgRequest(prompt="a fox", num_inference_steps=2)
    arguments = {"seeds": [1], "width": 64, "height": 64}
    drawn(krea, loras=[file])
    found, wanted = (one.latents(request, **arguments) for one in (krea, other))
    drawn(krea)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


# Where files are


def test_a_folder_a_file_and_what_is_neither(loras: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    copy = folder / "any.safetensors"
    copy.write_bytes(loras["all"].read_bytes())
    assert lora_files.find_lora(folder) == copy
    assert lora_files.find_lora(copy) == copy
    (folder / "other.safetensors").write_bytes(loras["all"].read_bytes())
    with pytest.raises(WeightsNotFound, match="holds 2 .safetensors: name one of any.safetensors"):
        lora_files.find_lora(folder)
    usual = folder / lora_files.USUAL_NAME
    usual.write_bytes(loras["all"].read_bytes())
    assert lora_files.find_lora(folder) == usual
    with pytest.raises(WeightsNotFound, match="no .safetensors in the folder"):
        lora_files.find_lora(tmp_path)
    with pytest.raises(WeightsNotFound, match="no LoRA '/nowhere/x.safetensors': give a"):
        lora_files.find_lora("/nowhere/x.safetensors")
    pickle = tmp_path / "lora.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(WeightsInvalid, match="is a pickle"):
        lora_files.find_lora(pickle)


@pytest.fixture
def server(loras: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    data = loras["all"].read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/missing"):
                self.send_error(404)
                return
            body = data[:-5] if self.path.startswith("/short") else data
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_a_url_is_fetched_once(
    server: tuple[str, list[str]],
    loras: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url, asked = server
    found = lora_files.find_lora(f"{url}/my%20style.safetensors?key=secret")
    assert found.read_bytes() == loras["all"].read_bytes()
    assert lora_files.find_lora(f"{url}/my%20style.safetensors?key=secret") == found
    assert len(asked) == 1
    assert found.parent == tmp_path / "krea_local" / "loras"
    assert found.name.startswith("my_style-")
    with pytest.raises(WeightsNotFound, match="missing.safetensors answered 404") as told:
        lora_files.find_lora(f"{url}/missing.safetensors?key=secret")
    assert "secret" not in str(told.value)
    with pytest.raises(WeightsInvalid, match=r"short.safetensors' is truncated"):
        lora_files.find_lora(f"{url}/short.safetensors")
    with pytest.raises(WeightsInvalid, match="is a pickle"):
        lora_files.find_lora(f"{url}/x.pt")
    assert [path.name for path in found.parent.iterdir()] == [found.name]


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("owner/name", ("owner/name", "one.safetensors", None)),
        ("owner/FLUX.1-style", ("owner/FLUX.1-style", "one.safetensors", None)),
        ("owner/name/two.safetensors", ("owner/name", "two.safetensors", None)),
        ("https://huggingface.co/owner/name", ("owner/name", "one.safetensors", None)),
        (
            "https://huggingface.co/owner/name/blob/main/a/b.safetensors?download=true",
            ("owner/name", "a/b.safetensors", "main"),
        ),
    ],
)
def test_the_hub_is_asked_for_the_file_that_is_meant(
    text: str,
    asked: tuple[str, str, str | None],
    loras: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import huggingface_hub

    seen = []

    def fetch(repo: str, name: str, *, revision: str | None) -> str:
        seen.append((repo, name, revision))
        return str(loras["all"])

    def listed(repo: str, *, revision: str | None) -> list[str]:
        return ["README.md", "one.safetensors", "samples/x.safetensors"]

    def cached(repo: str, **_: object) -> str:
        (tmp_path / "one.safetensors").touch()
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    lora_files._listed.cache_clear()
    assert lora_files.find_lora(text) == loras["all"]
    assert seen == [asked]
    # Offline, what is in the cache counts.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    lora_files._listed.cache_clear()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: 1 / 0)
    assert lora_files.find_lora(text) == loras["all"]
    assert seen == [asked] * 2
    lora_files._listed.cache_clear()


def test_offline_the_hub_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsNotFound, match="owner/name"):
        lora_files.find_lora("owner/name")


# What is asked for


def test_requests_over_the_network_name_no_local_files() -> None:
    parse = functools.partial(Txt2ImgRequest.parse, wire=True)
    request = parse({"prompt": "x", "loras": [{"path": "owner/name", "scale": "0.5"}]})
    assert request.loras == (Lora(path="https://huggingface.co/owner/name", scale=0.5),)
    found = parse({"prompt": "x", "loras": [{"path": "owner/name/a/b.safetensors"}]}).loras
    assert found[0].path == "https://huggingface.co/owner/name/resolve/main/a/b.safetensors"
    url = "https://example.com/a.safetensors"
    assert parse({"prompt": "x", "loras": [{"path": url}]}).loras == (Lora(path=url),)
    for path in ("/etc/passwd", "../x.safetensors", "~/x", "file:///x", "x.safetensors", "a/../b"):
        with pytest.raises(InvalidRequest, match="must be a hub id or an http"):
            parse({"prompt": "x", "loras": [{"path": path}]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"path": "x", "scale": 4.1}], r"loras.0.scale=4.1: should be less than or equal to 4"),
        ([{"path": "x", "scale": -1}], r"loras.0.scale=-1"),
        ([{"path": ""}], r"loras.0.path='': should be a file, a hub id or a URL"),
        ([{"scale": 1}], r"loras.0.path: is required"),
        ([{"path": "x", "weight": 1}], r"loras.0.weight: no such parameter; known: path, scale"),
        (["x"] * 9, r"loras=.*at most 8 items"),
        ([3], r"loras.0=3"),
        (3, r"loras=3"),
    ],
)
def test_bad_loras_are_named(value: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Txt2ImgRequest.parse({"prompt": "x", "loras": value})


def test_command_line_recipe_and_repetition(
    tiny_folder: Path,
    loras: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    common = ["--model", str(tiny_folder), "--no-enable-safety-checker", "--quiet"]
    flags = ["--num-inference-steps", "1", "--image-size", "64x64", "--seed", "3"]
    lora_flag = ["--lora", f"{loras['all']}:0.5"]
    drew = ["txt2img", "a fox", *flags, *common, *lora_flag, "--output", str(first)]
    assert cli.main(drew) == cli.OK
    recipe = read_recipe(first)
    sha256 = hashlib.sha256(loras["all"].read_bytes()).hexdigest()
    assert recipe["loras"] == [{"path": "all.safetensors", "scale": 0.5, "sha256": sha256}]
    repeat = ["txt2img", "--from", str(first), *common, "--output", str(again)]
    assert cli.main(repeat) == cli.USAGE
    assert "give them: --lora all.safetensors:0.5" in capsys.readouterr().err
    assert cli.main([*repeat, *lora_flag]) == cli.OK
    assert again.read_bytes() == first.read_bytes()
    capsys.readouterr()
    loud = [one for one in repeat if one != "--quiet"]
    assert cli.main([*loud, "--lora", f"{loras['text']}"]) == cli.OK
    assert "these are not the LoRAs that" in capsys.readouterr().err


def test_a_lora_that_is_not_there_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(cli, "_load")
    assert cli.main(["txt2img", "a fox", "--lora", "/nowhere.safetensors"]) == cli.WEIGHTS
    assert "no LoRA '/nowhere.safetensors'" in capsys.readouterr().err
