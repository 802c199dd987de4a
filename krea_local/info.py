"""What is on this machine: versions, GPUs, weights, and what would fit where.

Knows nothing of requests or of how pictures are made.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

from krea_local import weights
from krea_local._version import __version__
from krea_local.errors import KreaError, OutOfMemory

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "triton",
    "fa3-fwd",
)


def gather() -> dict[str, Any]:
    """Facts of this machine, as JSON can hold them."""
    import torch

    return {
        "versions": versions(),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "model": _found(lambda: weights.find(fetch=False).label),
        "safety_checker": _found(
            lambda: weights.find_safety_checker(
                weights.find(fetch=False), weights.SAFETY_CHECKER_REPO
            )
        ),
    }


def versions() -> dict[str, str]:
    """Of krea_local, Python and the packages that pictures depend on."""
    found = {"krea_local": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(facts: dict[str, Any]) -> str:
    """The facts, for people."""
    lines = [f"{name:16} {version}" for name, version in facts["versions"].items()]
    lines.append(f"{'CUDA':16} {facts['cuda'] or 'this PyTorch is built without CUDA'}")
    if not facts["gpus"]:
        lines.append(f"{'GPU':16} none is seen; model 'mini' runs on the CPU")
    for gpu in facts["gpus"]:
        lines.append(
            f"{'GPU ' + str(gpu['index']):16} {gpu['name']}, {gpu['free_gib']:.1f} of "
            f"{gpu['total_gib']:.1f} GiB free, compute capability {gpu['capability']}"
        )
        for offload, fit in gpu["fits"].items():
            lines.append(f"{'':16}   offload={offload!r}: {fit}")
        lines.append(f"{'':16}   of these load takes {gpu['takes']}")
    for name in ("model", "safety_checker"):
        lines.append(f"{name:16} {facts[name]}")
    return "\n".join(lines)


def fits(free_gib: float) -> dict[str, str]:
    """For each `offload`, whether the 12 B model in bfloat16 fits at 1 megapixel, and why not."""
    from krea_local.memory import OFFLOADS
    from krea_local.plan import need

    needs = {offload: need(offload) for offload in OFFLOADS}
    return {
        offload: (
            f"fits: needs about {need:.1f} GiB at 1 megapixel"
            if need <= free_gib
            else f"does not fit: needs about {need:.1f} GiB at 1 megapixel, {free_gib:.1f} are free"
        )
        for offload, need in needs.items()
    }


def takes(free_gib: float) -> str:
    """The `offload` that `load` takes of itself for the 12 B model where so much is free."""
    from krea_local.plan import FLUX1, GIB, choose

    try:
        plan = choose(FLUX1, int(free_gib * GIB))
    except OutOfMemory as error:
        return f"none: {error}"
    if plan.offload != "blocks":
        return repr(plan.offload)
    return f"'blocks', {plan.resident} of {len(FLUX1.blocks)} stay there"


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = (count / 2**30 for count in torch.cuda.mem_get_info(index))
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total_gib": round(total, 2),
        "free_gib": round(free, 2),
        "fits": fits(free),
        "takes": takes(free),
    }


def _found(look: Callable[[], object]) -> str:
    try:
        return str(look())
    except KreaError as error:
        return f"none: {error}"
