"""How others run FLUX.1: recipes over diffusers' pipeline, each set up as its users do.

A peer is built over models that are in memory already, and undoes all it did when its context ends:
weights (kept by reference, never copied), attributes, compiled code, attention backends, compiler
settings. What to know when measuring them:

- Leaving a peer that compiled resets torch.compile for the process: all else compiles again.
- A float8 peer's peak memory holds the bf16 weights too (24 GB), which its users would have freed.
- No safety checker screens the pictures, and the prompt is encoded anew each time.

Knows nothing of timing.

Sources, as cited by each peer:
- devlog: docs.pytorch.org/devlogs/inductor/2026-05-11-torch-compile-and-diffusers
- attention: huggingface.co/docs/diffusers/optimization/attention_backends
- flux-fast: github.com/huggingface/flux-fast, README.md and utils/pipeline_utils.py
- offload: huggingface.co/docs/diffusers/optimization/memory
- cache-dit: github.com/vipshop/cache-dit, 1.5.3
- sglang: github.com/sgl-project/sglang/pull/19673, figures of an H200
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol
from unittest import mock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models import attention_dispatch
from PIL import Image
from torch import Tensor, nn

from krea_local.loading import Models

FIRST_BLOCKS = 8  # DBCacheConfig's own Fn_compute_blocks


class Draw(Protocol):
    """Prompt to pictures; picture i is that of seed + i."""

    def __call__(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        steps: int,
        seed: int,
        guidance_scale: float,
        num_images: int,
    ) -> list[Image.Image]: ...


BeforeDraw = Callable[[int], None]
"""Called with the number of steps before each drawing."""

Step = Callable[[FluxPipeline, ExitStack], BeforeDraw | None]
"""Changes the pipeline; what `_restored` does not put back, it puts back through the stack."""

Needs = Callable[[torch.device], str | None]


@dataclass(frozen=True)
class Peer:
    """One way to run FLUX.1.

    Attributes:
        engine: its name in results.
        lossless: pictures differ from eager's by rounding alone.
        what: its recipe in a line, with its source.
        needs: why it cannot run on a device, or None.
        build: sets it up over diffusers' own classes; undone when the context ends.
    """

    engine: str
    lossless: bool
    what: str
    needs: Needs
    build: Callable[[Models], AbstractContextManager[Draw]]


# What each recipe does.


def cudnn(pipe: FluxPipeline, undo: ExitStack) -> None:
    """cuDNN's attention kernel, through PyTorch."""
    _set_attention(pipe, "_native_cudnn", undo)


def fa3(pipe: FluxPipeline, undo: ExitStack) -> None:
    """FlashAttention 3 from the fa3-fwd wheel, through diffusers' own `_flash_3` backend."""
    _use_fa3(pipe, importlib.import_module("fa3_fwd_interface").flash_attn_func, undo)


def fa3_float8(pipe: FluxPipeline, undo: ExitStack) -> None:
    """FlashAttention 3 on queries, keys and values cast to float8 without a scale."""
    flash = importlib.import_module("fa3_fwd_interface").flash_attn_func

    def float8_flash(*, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        float8 = torch.float8_e4m3fn
        return flash(q=q.to(float8), k=k.to(float8), v=v.to(float8), **options)

    _use_fa3(pipe, float8_flash, undo)


def compile_regional(pipe: FluxPipeline, undo: ExitStack) -> None:
    """One compiled graph for each kind of block, used by all of them."""
    _prepare_compiler(undo)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)


def compile_whole(pipe: FluxPipeline, undo: ExitStack, mode: str | None = None) -> None:
    """The whole transformer as one graph, and the VAE's decoder."""
    _prepare_compiler(undo)
    pipe.transformer.compile(mode=mode, fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)


def max_autotune(pipe: FluxPipeline, undo: ExitStack) -> None:
    """As `compile_whole`, every kernel tuned, with CUDA graphs: flux-fast's `use_compile`."""
    compile_whole(pipe, undo, mode="max-autotune")


def max_autotune_blocks(pipe: FluxPipeline, undo: ExitStack) -> None:
    """Block by block (flux-fast's `--only_compile_transformer_blocks`): minutes less to compile."""
    _prepare_compiler(undo)
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit, dynamo.accumulated_recompile_limit = 96, 2048
    for block in [
        *pipe.transformer.transformer_blocks,
        *pipe.transformer.single_transformer_blocks,
    ]:
        block.compile(mode="max-autotune-no-cudagraphs")
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)


def flux_fast(pipe: FluxPipeline, undo: ExitStack) -> None:
    """flux-fast's `optimize`, but for attention and compilation: one float8 scale a tensor."""
    quantization: Any = importlib.import_module("torchao.quantization")
    _prepare_compiler(undo)
    pipe.transformer.fuse_qkv_projections()
    pipe.vae.fuse_qkv_projections()
    pipe.vae.to(memory_format=torch.channels_last)
    quantization.quantize_(
        pipe.transformer, quantization.Float8DynamicActivationFloat8WeightConfig()
    )
    inductor: Any = torch._inductor.config
    inductor.conv_1x1_as_mm = True
    inductor.epilogue_fusion = False
    inductor.coordinate_descent_tuning = True
    inductor.coordinate_descent_check_all_directions = True


def cache_dit(pipe: FluxPipeline, undo: ExitStack) -> None:
    """DBCache as cache-dit sets it: a threshold decides, so on random weights it says nothing."""
    cache: Any = importlib.import_module("cache_dit")
    # The tiny model has fewer blocks than are always computed by default.
    blocks = len(pipe.transformer.transformer_blocks) + len(
        pipe.transformer.single_transformer_blocks
    )
    _enable_cache(
        pipe, cache.DBCacheConfig(Fn_compute_blocks=min(FIRST_BLOCKS, blocks - 1)), undo=undo
    )


def cache_dit_half(pipe: FluxPipeline, undo: ExitStack) -> BeforeDraw:
    """cache-dit's "medium" mask: 15 of 28 steps computed, whatever the weights.

    1111110110001100011000110001: of the other 13 steps only the first of 57 blocks runs (F1B0), and
    a first-order Taylor series (TaylorSeer) makes up for the rest.
    """
    cache: Any = importlib.import_module("cache_dit")
    enabled: list[int] = []

    def for_steps(steps: int) -> None:
        if enabled == [steps]:
            return
        mask = cache.steps_mask(total_steps=steps, mask_policy="medium")
        _enable_cache(
            pipe,
            cache.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=mask.index(0),  # as its documentation: the first computed run
                steps_computation_mask=mask,
                steps_computation_policy="static",
            ),
            cache.TaylorSeerCalibratorConfig(taylorseer_order=1),
            undo=undo,
        )
        enabled[:] = [steps]

    return for_steps


def model_offload(pipe: FluxPipeline, undo: ExitStack) -> None:
    """Encoders, transformer and VAE take turns."""
    pipe.enable_model_cpu_offload(device=_device())


def sequential_offload(pipe: FluxPipeline, undo: ExitStack) -> None:
    """Every layer comes when it is called."""
    pipe.enable_sequential_cpu_offload(device=_device())


def group_offload(pipe: FluxPipeline, undo: ExitStack, **groups: Any) -> None:
    """Groups of layers come while others work, from host memory that is locked beforehand."""
    device = _device()
    streams = device.type == "cuda"
    pipe.enable_group_offload(
        device, use_stream=streams, record_stream=streams, non_blocking=streams, **groups
    )


def group_offload_blocks(pipe: FluxPipeline, undo: ExitStack) -> None:
    """Block by block. T5 keeps its blocks further inside than diffusers looks, and comes whole."""
    group_offload(pipe, undo, offload_type="block_level", num_blocks_per_group=1)


def group_offload_leaves(pipe: FluxPipeline, undo: ExitStack) -> None:
    """Layer by layer."""
    group_offload(pipe, undo, offload_type="leaf_level")


# What they share.


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _set_attention(pipe: FluxPipeline, backend: str, undo: ExitStack) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    # diffusers sets it for the process too, and `reset_attention_backend` leaves that as it is.
    undo.callback(registry.set_active_backend, registry._active_backend)
    undo.callback(_quietly, pipe.transformer.reset_attention_backend)
    _quietly(pipe.transformer.set_attention_backend, backend)


def _use_fa3(pipe: FluxPipeline, flash: Callable[..., Any], undo: ExitStack) -> None:
    # diffusers looks for `flash_attn_interface`, upstream's name of the same functions.
    undo.enter_context(
        mock.patch.multiple(attention_dispatch, flash_attn_3_func=flash, _CAN_USE_FLASH_ATTN_3=True)
    )
    _set_attention(pipe, "_flash_3", undo)


def _prepare_compiler(undo: ExitStack) -> None:
    """Keep the compiler's settings; on the way out put them back and forget what was compiled."""
    undo.enter_context(warnings.catch_warnings())
    for message in (
        r"`torch\.jit\.script_method` is deprecated",  # by inductor's own modules
        r"Dynamo detected a call to a `functools\.lru_cache`-wrapped",  # diffusers' version checks
    ):
        warnings.filterwarnings("ignore", message=message)
    undo.callback(torch.compiler.reset)
    importlib.import_module("torch._inductor.compile_fx")
    for config in (torch._dynamo.config, torch._inductor.config):
        undo.enter_context(_kept(config))


@contextlib.contextmanager
def _kept(config: Any) -> Iterator[None]:
    before = config.get_config_copy()
    try:
        yield
    finally:
        for name, value in config.get_config_copy().items():
            if value != before[name]:
                setattr(config, name, before[name])


def _enable_cache(pipe: FluxPipeline, *configs: Any, undo: ExitStack) -> None:
    cache: Any = importlib.import_module("cache_dit")
    if getattr(pipe, "_is_cached", False):
        _quietly(cache.disable_cache, pipe)
    _quietly(cache.enable_cache, pipe, *configs)
    undo.callback(_quietly, cache.disable_cache, pipe)


def _quietly(function: Callable[..., Any], *arguments: Any) -> None:
    """Call without the library's log of what it was asked to do."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        function(*arguments)
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _restored(*models: nn.Module) -> Iterator[None]:
    """Put back every weight, submodule and attribute; costs no memory until they are replaced."""
    attributes = []
    for module in (module for model in models for module in model.modules()):
        tables = {
            name: dict(value)
            for name, value in vars(module).items()
            if type(value) in (dict, OrderedDict)  # _parameters, _modules, hooks
        }
        attributes.append((module, dict(vars(module)), tables))
    tensors = [
        (tensor, tensor.data)  # `to(memory_format=...)` replaces the data of the same parameter
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
    ]
    try:
        yield
    finally:
        for module, saved, tables in attributes:
            vars(module).clear()
            vars(module).update(saved)
            for name, table in tables.items():
                saved[name].clear()
                saved[name].update(table)
        for tensor, data in tensors:
            tensor.data = data


def _pipeline(models: Models) -> FluxPipeline:
    assert isinstance(models.transformer, FluxTransformer2DModel), "a peer needs diffusers' classes"
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=models.shift.base,
            max_shift=models.shift.max,
            base_image_seq_len=models.shift.base_seq_len,
            max_image_seq_len=models.shift.max_seq_len,
        ),
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        text_encoder_2=models.text_encoder_2,
        tokenizer_2=models.tokenizer_2,
        transformer=models.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def _build(steps: tuple[Step, ...], models: Models) -> Iterator[Draw]:
    pipe = _pipeline(models)
    try:
        changed = (models.transformer, models.vae, models.text_encoder, models.text_encoder_2)
        with _restored(*changed), ExitStack() as undo:
            before = [prepare for step in steps if (prepare := step(pipe, undo))]
            yield partial(_draw, pipe, before)
    finally:
        gc.collect()  # compiled code and CUDA graphs are held by cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _draw(
    pipe: FluxPipeline,
    before: list[BeforeDraw],
    prompt: str,
    *,
    width: int,
    height: int,
    steps: int,
    seed: int,
    guidance_scale: float,
    num_images: int,
) -> list[Image.Image]:
    for prepare in before:
        prepare(steps)
    images: list[Image.Image] = pipe(
        prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=num_images,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(num_images)],
    ).images
    return images


# What each needs.


def _gpu(what: str, at_least: tuple[int, int], below: tuple[int, int] = (99, 0)) -> Needs:
    def missing(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{what} needs an NVIDIA GPU"
        found = torch.cuda.get_device_capability(device)
        if at_least <= found < below:
            return None
        return f"{what} does not run on compute capability {found[0]}.{found[1]}"

    return missing


def _package(module: str) -> Needs:
    def missing(device: torch.device) -> str | None:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # absent, or built for another torch
            return f"{module} cannot be imported: {error}"
        return None

    return missing


def _compiler(device: torch.device) -> str | None:
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs the package triton"
    if "CXX" not in os.environ and not any(map(shutil.which, ("g++", "gcc", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


_FA3 = (_gpu("FlashAttention 3", (9, 0), (10, 0)), _package("fa3_fwd_interface"))
_NEEDS: dict[Step, tuple[Needs, ...]] = {
    cudnn: (_gpu("cuDNN's attention", (8, 0)),),
    fa3: _FA3,
    fa3_float8: _FA3,
    compile_regional: (_compiler,),
    compile_whole: (_compiler,),
    max_autotune: (_compiler,),
    max_autotune_blocks: (_compiler,),
    flux_fast: (_gpu("float8", (8, 9)), _package("torchao.quantization")),
    cache_dit: (_package("cache_dit"),),
    cache_dit_half: (_package("cache_dit"),),
    model_offload: (),
    sequential_offload: (_gpu("sequential offload", (0, 0)),),
    group_offload_blocks: (),
    group_offload_leaves: (),
}
_LOSSY = {flux_fast, fa3_float8, cache_dit, cache_dit_half}


def _peer(engine: str, what: str, steps: tuple[Step, ...]) -> Peer:
    def needs(device: torch.device) -> str | None:
        reasons = (need(device) for step in steps for need in _NEEDS[step])
        return next((reason for reason in reasons if reason), None)

    lossless = _LOSSY.isdisjoint(steps)
    return Peer(f"diffusers:{engine}", lossless, what, needs, partial(_build, steps))


PEERS: tuple[Peer, ...] = (
    _peer("eager", "FluxPipeline as it is", ()),
    _peer("cudnn", "set_attention_backend('_native_cudnn') [attention]", (cudnn,)),
    _peer("fa3", "set_attention_backend('_flash_3') with fa3-fwd's kernel [attention]", (fa3,)),
    _peer(
        "compile-regional", "compile_repeated_blocks(fullgraph=True) [devlog]", (compile_regional,)
    ),
    _peer("compile-regional+cudnn", "as its name [devlog, attention]", (cudnn, compile_regional)),
    _peer(
        "compile", "transformer [devlog] and vae.decode [flux-fast], fullgraph", (compile_whole,)
    ),
    _peer("compile+cudnn", "as its name [devlog, attention]", (cudnn, compile_whole)),
    _peer("compile+fa3", "as its name [sglang: 3.73 s]", (fa3, compile_whole)),
    _peer(
        "flux-fast",
        "float8, fused QKV, channels_last VAE, max-autotune [flux-fast --disable_fa3]",
        (flux_fast, max_autotune),
    ),
    _peer(
        "flux-fast+cudnn",
        "flux-fast with cuDNN's attention, for where FlashAttention 3 is missing",
        (flux_fast, cudnn, max_autotune),
    ),
    _peer(
        "flux-fast+fa3",
        "flux-fast as published: attention in unscaled float8 too [flux-fast]",
        (flux_fast, fa3_float8, max_autotune),
    ),
    _peer(
        "flux-fast-blocks",
        "flux-fast, compiled by blocks [flux-fast --only_compile_transformer_blocks]",
        (flux_fast, max_autotune_blocks),
    ),
    _peer("cache-dit", "enable_cache(pipe): F8B0, threshold 0.08, 8 warm-up steps", (cache_dit,)),
    _peer("cache-dit-half", "15 of 28 steps by a fixed mask, F1B0, TaylorSeer", (cache_dit_half,)),
    _peer(
        "compile-regional+cudnn+cache-dit-half",
        "sglang's fastest on one H200 (2.38 s), with a fixed mask, and cuDNN for FlashAttention 3",
        (cudnn, cache_dit_half, compile_regional),
    ),
    _peer(
        "flux-fast-blocks+cudnn+cache-dit-half",
        "float8 and half of the steps [flux-fast --enable_cache_dit], with a fixed mask and cuDNN",
        (flux_fast, cudnn, cache_dit_half, max_autotune_blocks),
    ),
)

# The weights come to them in host memory.
OFFLOADING: tuple[Peer, ...] = (
    _peer("model-offload", "enable_model_cpu_offload() [offload]", (model_offload,)),
    _peer("sequential-offload", "enable_sequential_cpu_offload() [offload]", (sequential_offload,)),
    _peer(
        "group-offload-blocks",
        "enable_group_offload: block_level, streams, record_stream [offload]",
        (group_offload_blocks,),
    ),
    _peer(
        "group-offload-leaves",
        "enable_group_offload: leaf_level, streams, record_stream [offload]",
        (group_offload_leaves,),
    ),
)
