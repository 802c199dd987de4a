"""The peers, rehearsed on the tiny model: each draws, and leaves everything as it was.

What a CPU lacks has a stand-in of the same signature: PyTorch's own attention for the CUDA kernels,
TorchDynamo without code generation for torch.compile. The set-up around them is the real one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models import attention_dispatch
from torch.nn.functional import scaled_dot_product_attention

import krea_local
from benchmarks import ceilings
from benchmarks.peers import PEERS, Draw, Peer
from krea_local.loading import Models
from krea_local.pipeline import Krea

PEER = {peer.engine.removeprefix("diffusers:"): peer for peer in PEERS}
CPU = torch.device("cpu")
WIDTH, HEIGHT, STEPS = 80, 64, 4
# Each step of each recipe, at least once; the others are fewer of the same steps.
QUICK = (
    *("eager", "cudnn", "fa3", "compile-regional+cudnn", "compile+fa3", "flux-fast+fa3"),
    *("cache-dit", "cache-dit-half", "flux-fast-blocks+cudnn+cache-dit-half"),
)
SLOW = pytest.mark.skipif("KREA_LOCAL_SLOW" not in os.environ, reason="set KREA_LOCAL_SLOW=1")


def krea_of_diffusers(folder: Path) -> Krea:
    """An engine whose models are all of diffusers' own classes."""
    return krea_local.load(folder, device="cpu", dtype="bfloat16", engine="diffusers")


@pytest.fixture(scope="module")
def krea(tiny_folder: Path) -> Krea:
    return krea_of_diffusers(tiny_folder)


@pytest.fixture(scope="module")
def models(krea: Krea) -> Models:
    return krea.models


def pictures(draw: Draw, *, steps: int = STEPS, num_images: int = 2) -> list[Any]:
    return draw(
        "a red fox",
        width=WIDTH,
        height=HEIGHT,
        steps=steps,
        seed=3,
        guidance_scale=4.5,
        num_images=num_images,
    )


def largest_difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.fixture(scope="module")
def eager(models: Models) -> list[Any]:
    with PEER["eager"].build(models) as draw:
        return pictures(draw)


CALLS: list[tuple[str, torch.dtype]] = []


@torch.library.custom_op("krea_local_tests::attend", mutates_args=())
def attend(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention in a kernel's place; an operator, as that is to torch.compile."""
    CALLS.append((name, q.dtype))
    heads_first = (tensor.to(torch.bfloat16).transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(*heads_first).transpose(1, 2).contiguous()


@attend.register_fake
def _(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.bfloat16, memory_format=torch.contiguous_format)


def cudnn_stand_in(query: Any, key: Any, value: Any) -> torch.Tensor:
    return attend("cudnn", query, key, value)


def fa3_stand_in(q: Any, k: Any, v: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attend("fa3", q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, torch.dtype]]]:
    """The stand-ins, and what was asked of them."""
    CALLS.clear()
    registry = attention_dispatch._AttentionBackendRegistry
    name = attention_dispatch.AttentionBackendName._NATIVE_CUDNN
    monkeypatch.setitem(registry._backends, name, cudnn_stand_in)
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value"})
    fa3 = ModuleType("fa3_fwd_interface")
    fa3.flash_attn_func = fa3_stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fa3)
    # The operator that diffusers wraps it in is registered for CUDA alone.
    operator = attention_dispatch._wrapped_flash_attn_3
    monkeypatch.setattr(attention_dispatch, "_wrapped_flash_attn_3", operator._init_fn)
    with torch.compiler.set_stance(force_backend="eager"):
        yield CALLS


def skip_without_packages(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cache-dit" in peer.engine:
        pytest.importorskip("cache_dit")
    if "flux-fast" in peer.engine:
        api = pytest.importorskip("torchao.quantization.quant_api")
        # PyTorch's CPU has the float8 product; torchao asks for a GPU all the same.
        monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)


def traces(models: Models) -> dict[str, object]:
    """All that a peer may change."""
    found: dict[str, object] = {
        "pipeline": dict(vars(FluxPipeline)),
        "attention": attention_dispatch._AttentionBackendRegistry._active_backend,
        "flash": attention_dispatch.flash_attn_3_func,
        "dynamo": torch._dynamo.config.get_config_copy(),  # type: ignore[attr-defined]
        "inductor": torch._inductor.config.get_config_copy(),  # type: ignore[attr-defined]
    }
    for part in ("transformer", "vae"):
        model = getattr(models, part)
        for name, module in model.named_modules():
            found[f"{part}.{name}"] = {
                key: dict(value) if key in ("_modules", "_parameters") else value
                for key, value in vars(module).items()
            }
            found[f"{part}.{name} attention"] = vars(getattr(module, "processor", module)).get(
                "_attention_backend"
            )
        for name, tensor in model.state_dict().items():
            found[f"{part}.{name}"] = (tensor.data_ptr(), tensor.stride(), tensor.dtype)
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in PEER]
)
def test_a_peer_draws_with_its_own_attention_and_leaves_no_trace(
    name: str,
    models: Models,
    eager: list[Any],
    calls: list[tuple[str, torch.dtype]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without_packages(PEER[name], monkeypatch)
    before = traces(models)
    with PEER[name].build(models) as draw:
        drawn = pictures(draw)
    assert traces(models) == before
    assert [image.size for image in drawn] == [(WIDTH, HEIGHT)] * 2
    assert {kernel for kernel, _ in calls} == {k for k in ("cudnn", "fa3") if k in name}
    if PEER[name].lossless:
        assert drawn == eager  # the stand-ins do not even round differently
        blocks = len(models.transformer.transformer_blocks)
        blocks += len(models.transformer.single_transformer_blocks)
        assert len(calls) in (0, blocks * STEPS)
    with PEER["eager"].build(models) as draw:
        assert pictures(draw) == eager


@SLOW
def test_a_compiled_peer_differs_from_eager_by_rounding(models: Models, eager: list[Any]) -> None:
    before = traces(models)
    with PEER["compile-regional"].build(models) as draw:
        drawn = pictures(draw)
    assert traces(models) == before
    for image, expected in zip(drawn, eager, strict=True):
        assert largest_difference(image, expected) <= 8  # of 255; bfloat16 keeps 8 bits


def test_an_error_while_drawing_leaves_no_trace(models: Models, calls: object) -> None:
    before = traces(models)

    def fail() -> None:
        with PEER["compile-regional+cudnn"].build(models) as draw:
            assert traces(models) != before
            pictures(draw, steps=0)

    with pytest.raises(ZeroDivisionError):
        fail()
    assert traces(models) == before


def test_eager_draws_the_engines_own_picture(krea: Krea) -> None:
    with PEER["eager"].build(krea.models) as draw:
        drawn = pictures(draw, num_images=1)
    own = krea.txt2img(
        "a red fox",
        image_size={"width": WIDTH, "height": HEIGHT},
        num_inference_steps=STEPS,
        guidance_scale=4.5,
        seed=3,
        enable_safety_checker=False,
    )
    # diffusers maps pixels from [-1, 1] to [0, 1] in bfloat16.
    assert largest_difference(own.images[0], drawn[0]) <= 1


def test_flux_fast_computes_linears_and_attention_in_float8(
    models: Models, calls: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_packages(PEER["flux-fast+fa3"], monkeypatch)
    from torchao.quantization import Float8Tensor

    block = models.transformer.single_transformer_blocks[0]
    with PEER["flux-fast+fa3"].build(models) as draw:
        assert isinstance(block.attn.to_qkv.weight, Float8Tensor)
        assert isinstance(block.proj_mlp.weight, Float8Tensor)
        assert models.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        with torch.compiler.set_stance("force_eager"):
            pictures(draw)
    assert set(calls) == {("fa3", torch.float8_e4m3fn)}
    assert not hasattr(block.attn, "to_qkv")
    assert type(block.proj_mlp.weight) is torch.nn.Parameter
    assert models.vae.decoder.conv_in.weight.is_contiguous()


def test_the_fixed_mask_computes_15_of_28_steps_whatever_the_number_of_steps_before(
    models: Models,
) -> None:
    pytest.importorskip("cache_dit")
    first = models.transformer.transformer_blocks[0]
    last = models.transformer.single_transformer_blocks[-1]
    ran = {first: 0, last: 0}

    def count(module: Any, *_: object) -> None:
        ran[module] += 1

    hooks = [module.register_forward_hook(count) for module in ran]
    try:
        with PEER["cache-dit-half"].build(models) as draw:
            for steps, computed in ((28, 15), (4, 3), (28, 15)):
                ran |= {first: 0, last: 0}
                pictures(draw, steps=steps)
                assert list(ran.values()) == [steps, computed]
    finally:
        for hook in hooks:
            hook.remove()


def test_a_peer_says_why_it_cannot_run_here() -> None:
    for name, peer in PEER.items():
        reason = peer.needs(CPU)
        if any(word in name for word in ("cudnn", "fa3", "flux-fast")):
            assert reason is not None
            assert "NVIDIA GPU" in reason
    assert PEER["eager"].needs(CPU) is None


def test_ceilings_are_rates_or_the_reason_why_there_are_none() -> None:
    products = ceilings.gemm_rates(CPU, 0.001, scale=32)
    assert next(iter(products["bf16"])) == "144x288x96"
    attention = ceilings.attention_rates(CPU, 0.001, scale=32)
    assert set(attention["default_is"].values()) == {"flash_attention"}
    copies = ceilings.copy_rates(CPU, scale=512)
    figures: dict[str, Any] = {**products, **attention, "copy": copies}
    assert json.loads(json.dumps(figures)) == figures
    for group in ("bf16", "fp8_tensorwise", "default", "flash"):
        assert all(rate > 0 for rate in figures[group].values())
    for group in ("cudnn", "fa3", "fa3_fp8"):
        assert all(": " in reason for reason in figures[group].values())
    assert copies["device_to_device"] > 0
    assert copies["h2d_two_streams"] == "a copy to the GPU needs a GPU"
