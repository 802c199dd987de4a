"""What `acceleration` means: levels, each an ordered list of named steps.

A step changes one thing of how the transformer runs; its docstring says what, what it needs and
whether pixels change. The engine walks the list of a level, and so does the waterfall of
`python -m benchmarks.compare`, which measures what each step brings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from krea_local import attention, kernels
from krea_local.layers import check_product
from krea_local.packed import packed_layers, with_checked_widening
from krea_local.schema import Acceleration
from krea_local.skipping import Skipping
from krea_local.transformer import Execution, FluxTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a call runs the transformer.

    Attributes:
        execution: operations and attention.
        eight_bit: what the large layers multiply, float8_e4m3fn or int8; None for the model's own
            numbers.
        skipping: which denoising steps may be skipped; None for none.
    """

    execution: Execution = field(default_factory=Execution)
    eight_bit: torch.dtype | None = None
    skipping: Skipping | None = None


@dataclass(frozen=True)
class Place:
    """Where it is to run."""

    device: torch.device
    transformer: FluxTransformer
    compile: bool = False


Notice = str | None
Change = Callable[[Settings, Place], tuple[Settings, Notice]]


@dataclass(frozen=True)
class Step:
    """One step of a level.

    Attributes:
        change: settings before, and where → settings after, and a notice if it could not be done
            as it should.
        lossless: whether only rounding changes.
        measured: what it brought, and on which GPU.
    """

    change: Change
    lossless: bool
    measured: str = "not yet measured on a GPU"

    @property
    def name(self) -> str:
        """As benchmarks print it."""
        return self.change.__name__

    @property
    def what(self) -> str:
        """The first line of the step's docstring."""
        return (self.change.__doc__ or "").strip().splitlines()[0]


def fuse_pointwise(settings: Settings, place: Place) -> tuple[Settings, Notice]:
    """Norm, modulation, residual, rotary and GELU in Triton kernels, a pass over memory each.

    So is the widening of weights that stay packed as their file has them.
    Needs CUDA and Triton, or with `load(..., compile=True)` what torch.compile needs; each kernel
    is first compared with plain torch on this very device.
    """
    config = place.transformer.config
    chosen, notice = kernels.choose(
        place.device,
        place.transformer.dtype,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        eight_bit=eight_bit_of(place.device),
        compiled=place.compile,
    )
    layers = packed_layers(place.transformer)
    chosen, other = with_checked_widening(chosen, layers, place.device)
    notice = "; ".join(filter(None, (notice, other))) or None
    return replace(settings, execution=replace(settings.execution, kernels=chosen)), notice


def fastest_attention(settings: Settings, place: Place) -> tuple[Settings, Notice]:
    """FlashAttention 3 or cuDNN on Hopper, cuDNN on Blackwell, torch's flash attention elsewhere.

    FlashAttention 3 needs the package fa3-fwd.
    """
    chosen, notice = attention.choose(
        place.device,
        place.transformer.dtype,
        head_dim=place.transformer.config.attention_head_dim,
    )
    return replace(settings, execution=replace(settings.execution, attention=chosen)), notice


def gelu_in_epilogue(settings: Settings, place: Place) -> tuple[Settings, Notice]:
    """GELU of the double blocks inside cuBLASLt's matrix product: a pass over memory less.

    Needs CUDA; has no effect on layers in 8 bits.
    """
    on = place.device.type == "cuda"
    return replace(settings, execution=replace(settings.execution, gelu_epilogue=on)), None


def eight_bit_linears(settings: Settings, place: Place) -> tuple[Settings, Notice]:
    """The blocks' matrix products in float8_e4m3 or in int8, both factors scaled by row.

    float8_e4m3 where the GPU has it, from compute capability 8.9 (Ada) on, by torch; int8 on 8.0
    to 8.8 (Ampere), by our kernel, or by torch where that is missing. Two products are tried first.
    Embedders, modulation, output layer and attention stay in bfloat16.
    """
    cuda = place.device.type == "cuda"
    dtype = str(place.transformer.dtype).removeprefix("torch.")
    eight_bit = eight_bit_of(place.device)
    if eight_bit is None:
        where = torch.cuda.get_device_name(place.device) if cuda else f"device='{place.device}'"
        reason = f"{where} has no 8-bit products (RTX 30, A100 and newer have)"
    elif cuda and place.transformer.dtype != torch.bfloat16:
        reason = "8-bit products need dtype='bfloat16'"
    else:
        try:
            check_product(
                eight_bit, settings.execution.kernels, place.device, place.transformer.dtype
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # this torch, or its CUDA, cannot do it on this GPU
            logger.info("8-bit products are not used", exc_info=True)
            detail = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            reason = f"8-bit products do not work here: {detail}"
        else:
            return replace(settings, eight_bit=eight_bit), None
    return settings, f"runs in {dtype}, at its speed: {reason}"


def skip_steps(settings: Settings, place: Place) -> tuple[Settings, Notice]:
    """Denoising steps that would add little are extrapolated from those before.

    Runs anywhere.
    """
    return replace(settings, skipping=Skipping()), None


LOSSLESS = (
    Step(fuse_pointwise, lossless=True),
    Step(fastest_attention, lossless=True),
    Step(gelu_in_epilogue, lossless=True),
)
LEVELS: dict[Acceleration, tuple[Step, ...]] = {
    "none": LOSSLESS,
    "regular": (*LOSSLESS, Step(eight_bit_linears, lossless=False)),
    "high": (
        *LOSSLESS,
        Step(eight_bit_linears, lossless=False),
        Step(skip_steps, lossless=False),
    ),
}


def settings_of(steps: tuple[Step, ...], place: Place) -> tuple[Settings, tuple[str, ...]]:
    """Walk the steps: the settings they make at `place`, and what could not be done there."""
    settings, notices = Settings(), []
    for step in steps:
        settings, notice = step.change(settings, place)
        if notice is not None:
            notices.append(notice)
    return settings, tuple(notices)


def eight_bit_of(device: torch.device) -> torch.dtype | None:
    """The numbers of 8 bits that the device multiplies faster than others; None for none."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return torch.float8_e4m3fn
    return torch.int8 if capability >= (8, 0) else None
