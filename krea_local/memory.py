"""What lives on the GPU when: everything always, or each model only while it works.

Knows nothing of requests or of how pictures are made.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from krea_local.errors import InvalidRequest, OutOfMemory

Offload = Literal["none", "modulation", "model"]
"""`none`: all models stay on the GPU. `modulation`: all but the transformer's modulation, which an
image needs once. `model`: encoders, transformer without modulation, and VAE take turns there."""

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
GIB = 2**30
SMALLEST_PINNED = 2**20  # bytes; smaller ones are copied in no time, and share pages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Footprint:
    """GPU memory that the bfloat16 12 B model takes at 1 megapixel, one image, in GiB.

    Weights are counted, activations computed, not measured: transformer 23.80 GB, 6.50 of it
    modulation, T5 9.53, CLIP 0.25, VAE 0.17, safety checker 0.34; activations 0.46 GiB while
    denoising, 1.5 GiB decoding.
    """

    none: float = (23.80 + 9.53 + 0.25 + 0.17 + 0.34) * 1e9 / GIB + 1.5
    modulation: float = (23.80 - 6.50 + 9.53 + 0.25 + 0.17 + 0.34) * 1e9 / GIB + 1.5
    model: float = (23.80 - 6.50 + 0.34) * 1e9 / GIB + 0.46


def check_offload(offload: str) -> Offload:
    """`offload` as the literal it must be.

    Raises:
        InvalidRequest: not one of OFFLOADS.
    """
    for known in OFFLOADS:
        if offload == known:
            return known
    raise InvalidRequest(f"offload={offload!r}: should be one of {', '.join(map(repr, OFFLOADS))}")


@contextlib.contextmanager
def on_device(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Have `modules` on `device` inside the block, and back where they were after it.

    Weights are constant, so leaving is dropping the copies: nothing is written back, and leaving
    through an error or Ctrl-C is as good as any other way.
    """
    homes: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    copies: dict[int, torch.Tensor] = {}  # by the original's id: tied weights stay tied
    try:
        for module in (inner for outer in modules for inner in outer.modules()):
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is None or tensor.device == device:
                        continue
                    if id(tensor) not in copies:
                        copy = tensor.detach().to(device, non_blocking=True)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        copies[id(tensor)] = (
                            nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                        )
                    homes.append((store, name, tensor))
                    store[name] = copies[id(tensor)]
        yield
    finally:
        for store, name, tensor in homes:
            store[name] = tensor


def pin(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Lock the weights that lie in host memory there, so that they reach a GPU at full speed.

    In place, since torch's own pinned memory is rounded up to powers of two and would take a third
    more; so the weights must not be laid out anew afterwards. What cannot be locked (`ulimit -l`,
    little memory) stays as it is, and is copied more slowly.
    """
    if device.type != "cuda":
        return
    runtime: Any = torch.cuda.cudart()
    error = 0
    for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
        large = parameter.device.type == "cpu" and parameter.nbytes >= SMALLEST_PINNED
        if not large or parameter.is_pinned():
            continue
        address = parameter.data_ptr()
        failed = int(runtime.cudaHostRegister(address, parameter.nbytes, 0))
        if failed:
            error = failed
        else:
            unlock = weakref.finalize(parameter, runtime.cudaHostUnregister, address)
            unlock.atexit = False  # CUDA may be gone by then, and the memory goes anyway
    if error:
        logger.warning("some host memory cannot be locked: CUDA error %d", error)
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # CUDA reports an error once more, to whoever is next


@contextlib.contextmanager
def explained_out_of_memory(advice: str) -> Iterator[None]:
    """Turn the many errors of running out of memory into ours, which says what to do.

    Raises:
        OutOfMemory: the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Frames of the failed call hold its tensors for as long as somebody holds the error.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        detail = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        raise OutOfMemory(f"memory does not suffice ({detail}): {advice}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is torch's error for that, or what cuBLAS, cuDNN, the driver or the CPU say."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "alloc_failed", "not enough memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
