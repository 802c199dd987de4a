"""The transformer as a velocity, at every level of acceleration; and diffusers', to compare with.

Holds what outlives a call: how each level runs here, the weights in 8 bits, and what the
steps of the last call had in common. Knows nothing of requests, text encoders or the VAE.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from krea_local import speed
from krea_local.layers import LowRank
from krea_local.memory import is_out_of_memory, pin, pin_tensors
from krea_local.sampling import Velocity, latent_ids, model_timestep
from krea_local.schema import Acceleration
from krea_local.skipping import StepCache
from krea_local.streaming import BlockStream
from krea_local.transformer import Conditioning, Execution, FluxTransformer

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from krea_local.cluster import Ulysses

logger = logging.getLogger(__name__)

ResidentBlocks = Callable[[Sequence[int]], int]


@dataclass(frozen=True)
class Task:
    """What one batch of images asks of the transformer.

    Attributes:
        prompt_embeds: [1, 512, 4096].
        pooled_prompt_embeds: [1, 768].
        guidance_scale: an input of the model.
        sigmas: float32 [T + 1] noise levels, on the CPU.
        batch: images.
        rows: of image tokens.
        columns: likewise.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    guidance_scale: float
    sigmas: Tensor
    batch: int
    rows: int
    columns: int


class Engine:
    """Our transformer.

    Args:
        transformer: the weights, on `device` or where `resident` takes them from.
        device: where steps run.
        resident: has modules on the device inside a block; None where they stay there.
        compile: have torch.compile make the fused operations.
        group: processes that share every image.

    Attributes:
        settings: how each level runs, filled when first asked for; a benchmark may put its own.
        notices: what is to be said of a level, where it cannot run as it should.
    """

    def __init__(
        self,
        transformer: FluxTransformer,
        *,
        device: torch.device,
        resident: Callable[..., AbstractContextManager[None]] | None = None,
        compile: bool = False,
        group: Ulysses | None = None,
    ) -> None:
        self.transformer = transformer
        self.device = device
        self.resident = resident
        self.compile = compile
        self.group = group
        if group is not None:
            group.check(transformer.config.num_attention_heads)
        self.settings: dict[Acceleration, speed.Settings] = {}
        self.notices: dict[Acceleration, tuple[str, ...]] = {}
        self._eight_bit: FluxTransformer | None = None
        self._resident_blocks: ResidentBlocks | None = None
        self._streams: dict[FluxTransformer, BlockStream] = {}
        self._outside: dict[FluxTransformer, list[nn.Module]] = {}
        self._conditioning: tuple[Tensor, tuple[object, ...], Conditioning] | None = None

    def prepare(self, level: Acceleration) -> speed.Settings:
        """How a level runs here: chosen, and its kernels compiled, when first asked for."""
        if level not in self.settings:
            place = speed.Place(self.device, self.transformer, self.compile)
            settings, notices = speed.settings_of(speed.LEVELS[level], place)
            execution = replace(settings.execution, group=self.group)
            self.settings[level] = replace(settings, execution=execution)
            self.notices[level] = tuple(f"acceleration={level!r}: {notice}" for notice in notices)
        return self.settings[level]

    def modules(self, level: Acceleration) -> list[nn.Module]:
        """What has to be on the device for the steps of a level, beside what `streaming` brings."""
        return self._modules(self.variant(self.prepare(level)))

    def streaming(self, level: Acceleration) -> AbstractContextManager[None]:
        """Inside, the blocks' weights come to the device as a level's steps need them."""
        if self._resident_blocks is None:
            return nullcontext()
        return self._alone(level).open()

    def leave_others(self, level: Acceleration) -> None:
        """Give the memory back that streamed blocks hold for levels of another precision."""
        if self._resident_blocks is not None:
            self._alone(level)

    def _alone(self, level: Acceleration) -> BlockStream:
        """The stream of a level; two precisions have no room beside each other."""
        stream = self._stream(self.variant(self.prepare(level)))
        for other in self._streams.values():
            if other is not stream:
                other.leave()
        return stream

    def block_bytes(self, level: Acceleration) -> list[int]:
        """What each block takes at a level, where blocks are streamed; else nothing."""
        if self._resident_blocks is None:
            return []
        return [home.nbytes for home in self._stream(self.variant(self.prepare(level))).homes]

    def stream_blocks(self, resident_blocks: ResidentBlocks) -> None:
        """From now on, have most blocks on the device only while they work.

        Args:
            resident_blocks: of a transformer whose blocks take so many bytes each, how many stay on
                the device. Its weights are in host memory, and no call is under way.
        """
        self._resident_blocks = resident_blocks
        self._outside = {}
        for stream in self._streams.values():
            stream.leave()
            stream.keep(resident_blocks([home.nbytes for home in stream.homes]))
        for model in (self.transformer, self._eight_bit):
            if model is not None:
                self._stream(model)

    def variant(self, settings: speed.Settings) -> FluxTransformer:
        """The transformer, or itself in 8 bits, which is made when first asked for."""
        self.transformer.use(settings.execution.kernels)
        if settings.eight_bit is None:
            return self.transformer
        if self._eight_bit is None or self._eight_bit.eight_bit != settings.eight_bit:
            self._drop_eight_bit()
            self._eight_bit = self.transformer.in_eight_bit(
                settings.eight_bit, settings.execution.kernels, self.device
            )
            if self._resident_blocks is not None:
                self._stream(self._eight_bit)
            pin([self._eight_bit], self.device)
        self._eight_bit.use(settings.execution.kernels)
        return self._eight_bit

    def _modules(self, model: FluxTransformer) -> list[nn.Module]:
        if model not in self._outside:
            inside = set()
            if self._resident_blocks is not None:
                inside = {id(one) for block in model.step_blocks() for one in block}
            self._outside[model] = [one for one in model.step_modules() if id(one) not in inside]
        return self._outside[model]

    def _stream(self, model: FluxTransformer) -> BlockStream:
        if model not in self._streams:
            assert self._resident_blocks is not None
            stream = BlockStream(model.step_blocks(), self.device)
            stream.keep(self._resident_blocks([home.nbytes for home in stream.homes]))
            pin_tensors(stream.homes, self.device)
            self._streams[model] = stream
        return self._streams[model]

    def velocity(self, level: Acceleration, task: Task) -> Velocity:
        """The velocity of one batch. Its modules are on the device."""
        settings = self.prepare(level)
        cache = None
        if settings.skipping is not None:
            cache = StepCache(settings.skipping, task.sigmas, self.group)
        conditioning = self._condition(settings, task)

        def velocity(latents: Tensor, step: int) -> Tensor:
            current = self.settings[level]
            try:
                return self._step(current, latents, conditioning, step, cache)
            except Exception as error:
                # Other processes would wait for this one's part of the step that failed.
                if is_out_of_memory(error) or self.group is not None:
                    raise
                return self._repeat(error, level, latents, conditioning, step, cache)

        return velocity

    def adapt(self, low_rank: Mapping[str, LowRank]) -> None:
        """Have LoRAs added to the transformer's layers, by name; between calls.

        The weights stay as they are. Those in 8 bits are made anew, with it in them.
        """
        self.transformer.adapt(low_rank)
        self.forget()

    def forget(self) -> None:
        """Drop what is kept from call to call: 80 MB, and the weights in 8 bits."""
        self._conditioning = None
        self._drop_eight_bit()

    def _drop_eight_bit(self) -> None:
        if self._eight_bit is not None:
            self._streams.pop(self._eight_bit, None)
            self._outside.pop(self._eight_bit, None)
        self._eight_bit = None

    def _repeat(
        self,
        error: Exception,
        level: Acceleration,
        latents: Tensor,
        conditioning: Conditioning,
        step: int,
        cache: StepCache | None,
    ) -> Tensor:
        """Repeat a step that failed, without 8-bit products or at last in plain torch, from now on.

        A kernel that cannot do a size costs speed then, not the picture. If the GPU itself has
        failed, so does every attempt.
        """
        current = self.settings[level]
        attempts = {
            "without 8-bit products": replace(current, eight_bit=None),
            "in plain torch": replace(current, execution=Execution(), eight_bit=None),
        }
        for how, settings in attempts.items():
            if settings == current:
                continue
            logger.info("step %d failed and is repeated %s", step, how, exc_info=error)
            try:
                result = self._step(settings, latents, conditioning, step, cache)
            except Exception as again:
                if is_out_of_memory(again):
                    self.settings[level] = settings  # so that a call with more memory goes on here
                    raise
                error = again
                continue
            self.settings[level] = settings
            if all(one.eight_bit is None for one in self.settings.values()):
                self._drop_eight_bit()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            notice = f"failed and runs {how} from now on, slower: {reason}"
            self.notices[level] = (f"acceleration={level!r} {notice}",)
            return result
        raise error

    def _step(
        self,
        settings: speed.Settings,
        latents: Tensor,
        conditioning: Conditioning,
        step: int,
        cache: StepCache | None,
    ) -> Tensor:
        model = self.variant(settings)
        velocity: Tensor
        # They are there already, unless a step failed and is repeated with other weights.
        with contextlib.ExitStack() as stack:
            execution = settings.execution
            if self.resident is not None:
                stack.enter_context(self.resident(*self._modules(model)))
            if self._resident_blocks is not None:
                stack.enter_context(self._stream(model).open())
                execution = replace(execution, streaming=self._stream(model))
            velocity = model(latents, conditioning, step, execution, cache)
        return velocity

    def _condition(self, settings: speed.Settings, task: Task) -> Conditioning:
        """What the steps have in common; kept for the next batch or call that asks the same."""
        key = (task.guidance_scale, *task.sigmas.tolist(), task.rows, task.columns)
        kept = self._conditioning
        if kept is None or kept[0] is not task.prompt_embeds or kept[1] != key:
            self._conditioning = None  # two need not be there at once
            model = self.variant(settings)
            conditioning = model.condition(
                task.prompt_embeds,
                task.pooled_prompt_embeds,
                timesteps=model_timestep(task.sigmas[:-1], model.dtype).to(self.device),
                guidance=torch.tensor([task.guidance_scale], device=self.device),
                group=self.group,
                **_positions(task, self.device),
            )
            self._conditioning = kept = task.prompt_embeds, key, conditioning
        return kept[2]


class DiffusersEngine:
    """diffusers' transformer, the oracle; attributes as `Engine`'s."""

    def __init__(self, transformer: FluxTransformer2DModel, *, device: torch.device) -> None:
        self.transformer = transformer
        self.device = device
        self.settings: dict[Acceleration, speed.Settings] = {}
        self.notices: dict[Acceleration, tuple[str, ...]] = {
            level: (f"acceleration={level!r} is run as 'none' by engine='diffusers'",)
            for level in speed.LEVELS
            if level != "none"
        }

    def prepare(self, level: Acceleration) -> speed.Settings:
        """Every level is the same."""
        return self.settings.setdefault(level, speed.Settings())

    def modules(self, level: Acceleration) -> list[nn.Module]:
        """As `Engine.modules`."""
        return [self.transformer]

    def streaming(self, level: Acceleration) -> AbstractContextManager[None]:
        """As `Engine.streaming`: nothing is."""
        return nullcontext()

    def velocity(self, level: Acceleration, task: Task) -> Velocity:
        """As `Engine.velocity`."""
        batch = task.batch
        # Copies, not views: a batch of stride 0 takes another matmul path, which rounds otherwise.
        prompt_embeds = task.prompt_embeds.repeat(batch, 1, 1)
        pooled_prompt_embeds = task.pooled_prompt_embeds.repeat(batch, 1)
        guidance = torch.full((batch,), task.guidance_scale, device=self.device)
        timesteps = model_timestep(task.sigmas, self.transformer.dtype).to(self.device)
        positions = _positions(task, self.device)

        def velocity(latents: Tensor, step: int) -> Tensor:
            predicted: Tensor = self.transformer(
                hidden_states=latents,
                timestep=timesteps[step].expand(batch),
                guidance=guidance,
                pooled_projections=pooled_prompt_embeds,
                encoder_hidden_states=prompt_embeds,
                return_dict=False,
                **positions,
            )[0]
            return predicted

        return velocity


def _positions(task: Task, device: torch.device) -> dict[str, Tensor]:
    """Rotary positions of text and image."""
    return {
        "txt_ids": torch.zeros(task.prompt_embeds.shape[1], 3, device=device),
        "img_ids": latent_ids(rows=task.rows, columns=task.columns).to(device),
    }
