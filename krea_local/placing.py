"""Where the models' weights are: on the device always, or only while they work, as the plan says.

Goes over to smaller plans where memory runs out, or where LoRAs need some of it. Knows nothing of
requests or of how pictures are made.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from krea_local import text
from krea_local.engine import DiffusersEngine, Engine
from krea_local.errors import OutOfMemory
from krea_local.memory import (
    GIB,
    Offload,
    available_host_memory,
    on_device,
    pin,
    pin_tensors,
)
from krea_local.packed import packed_layers, with_checked_widening
from krea_local.plan import Plan
from krea_local.schema import Acceleration
from krea_local.streaming import BlockStream

if TYPE_CHECKING:
    from krea_local.loading import Models

logger = logging.getLogger(__name__)

TAKE_TURNS = ("model", "blocks")


class Placing:
    """The models of one `Krea`, and whoever works with them.

    Args:
        models: on `device`, or on the CPU where `offload` says so.
        device: where they work.
        offload: what stays there, where no `plan` says so.
        plan: what stays there; None: `offload` alone counts, and no other is gone over to.

    Attributes:
        lock: held while the models work.
        engine: that of their transformer, from `begin` on.
    """

    engine: Engine | DiffusersEngine

    def __init__(
        self, models: Models, device: torch.device, offload: Offload, plan: Plan | None
    ) -> None:
        self.models = models
        self.device = device
        self.offload: Offload = plan.offload if plan else offload
        self.plan = plan
        self.lock = threading.RLock()
        self._t5: BlockStream | None = None
        self._widen_t5 = bool(packed_layers(models.text_encoder_2))  # by kernels yet to be chosen

    def begin(self, engine: Engine | DiffusersEngine) -> None:
        """Work with this engine, which takes `resident`."""
        self.engine = engine
        if self.offload == "blocks":
            self._stream_blocks()

    def prepare(self, acceleration: Acceleration) -> None:
        """Choose what T5's packed layers are widened by, if it has such: once."""
        if self._widen_t5:
            self._choose_widening(acceleration)

    @contextlib.contextmanager
    def resident(self, *modules: nn.Module) -> Iterator[None]:
        """Have `modules` on the device, and to oneself."""
        with self.lock, self.current_device():
            if self.offload in TAKE_TURNS:
                with on_device(list(modules), self.device):
                    yield
            else:
                yield

    @contextlib.contextmanager
    def transformer(self, acceleration: Acceleration) -> Iterator[None]:
        """Have what the steps of a call need on the device, and to oneself."""
        with self.lock, self.current_device():
            self.make_way(acceleration)
            modules = self.engine.modules(acceleration)
            with self.resident(*modules), self.engine.streaming(acceleration):
                yield

    @contextlib.contextmanager
    def encoders(self, acceleration: Acceleration) -> Iterator[None]:
        """Have the text encoders on the device, and to oneself."""
        models = self.models
        self.prepare(acceleration)
        if self._t5 is None:
            with self.resident(models.text_encoder, models.text_encoder_2):
                yield
        else:
            outside = text.outside_blocks(models.text_encoder_2)
            with self.resident(models.text_encoder, *outside), self._t5.open():
                yield
            if self.plan is not None and self.device.type == "cuda":
                torch.cuda.empty_cache()  # places for T5's blocks are too small for others

    def current_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the thread's current GPU, wherever the tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def make_way(self, acceleration: Acceleration) -> None:
        """Have no more stay on the device than what the plan keeps there at this level."""
        if self._t5 is not None and self.plan is not None:
            assert isinstance(self.engine, Engine)
            with self.current_device():
                self.engine.leave_others(acceleration)
                blocks = self.engine.block_bytes(acceleration)
            self._t5.keep(self.plan.for_blocks(blocks).t5_resident)

    def make_room(self, adapters: int) -> str | None:
        """Have so many bytes of LoRAs in the plan, and less of the model where they do not fit.

        Returns:
            What is to be said of that, if much changes.

        Raises:
            OutOfMemory: the host has no memory for what has to leave the device.
        """
        if self.plan is None or adapters == self.plan.adapters:
            return None
        plan, budget = replace(self.plan, adapters=adapters), self.plan.budget
        if plan.offload == "blocks":
            plan = plan.for_blocks(plan.sizes.blocks)
            if budget is not None and plan.peak > budget:
                plan = replace(plan, resident=0, strips=True)
            available, more = available_host_memory(), plan.host - self.plan.host
            if available is not None and more > available:
                raise OutOfMemory(
                    f"a LoRA in weights of 8 bits takes copies of them, {more / GIB:.1f} GiB of "
                    f"host memory, which has {available / GIB:.1f} available: free some, or draw "
                    "with acceleration='none'"
                )
            self.plan = plan
            self._stream_blocks()
            return None
        while budget is not None and plan.peak > budget and (smaller := plan.smaller()) is not None:
            plan = replace(smaller, budget=budget)
        if plan.offload == self.plan.offload:
            self.plan = plan
            return None
        if not self.host_has_room(plan):
            raise OutOfMemory(
                f"the LoRAs take {adapters / GIB:.2f} GiB, which leave too little of the GPU to "
                "the model, and host memory has no room for it: free some of either"
            )
        self.settle(plan)
        return said_of(plan, "the LoRAs need memory")

    def smaller(self, level: Acceleration) -> Plan | None:
        """The next plan with which this level takes less, if host memory has room for it."""
        plan = self.plan
        assert plan is not None
        assert isinstance(self.engine, Engine)
        if not self.host_has_room(replace(plan, offload="blocks")):
            return None
        blocks = self.engine.block_bytes(level) or plan.sizes.blocks
        peak = plan.for_blocks(blocks).peak
        smaller = plan.smaller()
        while smaller is not None and smaller.for_blocks(blocks).peak >= peak:
            smaller = smaller.smaller()
        return smaller

    def settle(self, plan: Plan) -> None:
        """Go over to a plan that takes less."""
        models, cpu = self.models, torch.device("cpu")
        assert isinstance(self.engine, Engine)
        parts = (self.engine.transformer, models.vae, models.text_encoder, models.text_encoder_2)
        if plan.offload == "modulation":
            for layer in self.engine.transformer.modulations():
                layer.to(cpu)
        elif self.offload != "blocks":
            self.engine.forget()
            self.offload = "model"  # right for whatever is moved already, should this fail
            for part in parts:
                part.to(cpu)
        self.plan, self.offload = plan, plan.offload
        if plan.offload == "blocks":
            self._stream_blocks()
        pin(parts, self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def settle_again(self, plan: Plan) -> None:
        """After a call that no plan could help: as many blocks stay as did, or might have."""
        if self.offload == "blocks":
            budget = plan.budget or plan.peak
            blocks = replace(plan, offload="blocks", resident=0, budget=budget)
            self.plan = blocks.for_blocks(plan.sizes.blocks)
            self._stream_blocks()

    def host_has_room(self, plan: Plan) -> bool:
        """Whether host memory holds what this plan moves there."""
        available = available_host_memory()
        moves = plan.offload == "blocks" and self.offload != "blocks" and self.device.type != "cpu"
        return not moves or available is None or available >= plan.host

    def _stream_blocks(self) -> None:
        """Have T5 and the transformer visit the device block by block, as the plan says."""
        assert isinstance(self.engine, Engine)
        if self._t5 is None:
            self._t5 = text.stream_t5(self.models.text_encoder_2, self.device)
            pin_tensors(self._t5.homes, self.device)
        self.engine.stream_blocks(self._resident_blocks)

    def _resident_blocks(self, sizes: Sequence[int]) -> int:
        return self.plan.for_blocks(sizes).resident if self.plan else 0

    def _choose_widening(self, acceleration: Acceleration) -> None:
        """Have T5's packed layers widened by the transformer's kernels, where they are right."""
        layers = packed_layers(self.models.text_encoder_2)
        with self.current_device():
            kernels = self.engine.prepare(acceleration).execution.kernels
            kernels, notice = with_checked_widening(kernels, layers, self.device)
        if notice is not None:
            logger.warning("T5: %s", notice)
        for layer in layers:
            layer.kernels = kernels
        self._widen_t5 = False


def said_of(plan: Plan, why: str) -> str:
    """What users are told when `plan` is gone over to."""
    return (
        f"{why}: from now on less of the model stays on the GPU, at most {plan.peak / GIB:.1f} "
        f"GiB with offload={plan.offload!r}, and pictures take longer"
    )
