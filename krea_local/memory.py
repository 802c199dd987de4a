"""What lives on the GPU when: everything always, or each model or block only while it works.

Knows nothing of requests or of how pictures are made.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from krea_local.errors import InvalidRequest, OutOfMemory

Offload = Literal["none", "modulation", "model", "blocks"]
"""`none`: all models stay on the GPU. `modulation`: all but the transformer's modulation, which an
image needs once. `model`: encoders, transformer without modulation, and VAE take turns there.
`blocks`: so do the blocks of T5 and transformer, copied there ahead of their use."""

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
GIB = 2**30
SMALLEST_PINNED = 2**20  # bytes; smaller ones are copied in no time, and share pages

logger = logging.getLogger(__name__)


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
    """Lock the weights of `modules` that lie in host memory; see `pin_tensors`."""
    pin_tensors((p for module in modules for p in module.parameters()), device)


def pin_tensors(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Lock those that lie in host memory there, so that they reach a GPU at full speed.

    In place, since torch's own pinned memory is rounded up to powers of two and would take a third
    more; so the weights must not be laid out anew afterwards. What cannot be locked (`ulimit -l`,
    little memory) stays as it is, and is copied more slowly.
    """
    if device.type != "cuda":
        return
    # Else CUDA would begin work on another GPU.
    current = torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext()
    with current:
        _pin_tensors(tensors, device)


def _pin_tensors(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    runtime: Any = torch.cuda.cudart()
    error = unlocked = 0
    for tensor in {id(t): t for t in tensors}.values():
        large = tensor.device.type == "cpu" and tensor.nbytes >= SMALLEST_PINNED
        if not large or tensor.is_pinned():
            continue
        address = tensor.data_ptr()
        failed = int(runtime.cudaHostRegister(address, tensor.nbytes, 0))
        if failed:
            error, unlocked = failed, unlocked + tensor.nbytes
        else:
            unlock = weakref.finalize(tensor, runtime.cudaHostUnregister, address)
            unlock.atexit = False  # CUDA may be gone by then, and the memory goes anyway
    if error:
        logger.warning(
            "%.1f GiB of host memory cannot be locked (CUDA error %d; `ulimit -l` and free memory "
            "set the limit): copies from there are slower, and the GPU waits for them",
            unlocked / GIB,
            error,
        )
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


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether it is that of the GPU, not of the host."""
    text = str(error).lower()
    signs = ("cuda", "cublas", "cudnn", "gpu")
    named = isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in signs)
    return named and is_out_of_memory(error) and not isinstance(error, MemoryError)


def available_host_memory() -> int | None:
    """Bytes that can be had without swapping; None where Linux does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is torch's error for that, or what cuBLAS, cuDNN, the driver or the CPU say."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "alloc_failed", "not enough memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
