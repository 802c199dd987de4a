"""The way from a request to pictures: prompt, latents, denoising, decoding, screening.

`Krea` holds the models and the one lock; everything that belongs to a call lives in that call, so
nothing is left behind when it fails or is cancelled. Knows nothing of where weights come from.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor

from krea_local import speed, text, vae
from krea_local._version import __version__
from krea_local.adapting import Adapting
from krea_local.engine import DiffusersEngine, Engine, Task
from krea_local.errors import (
    Cancelled,
    GenerationFailed,
    InvalidImage,
    InvalidRequest,
    KreaWarning,
    WeightsNotFound,
)
from krea_local.images import (
    InputImage,
    image_to_pixels,
    open_image,
    pixels_to_images,
    resize,
)
from krea_local.lora import LoraFile
from krea_local.lora_files import find_lora
from krea_local.memory import (
    Offload,
    explained_out_of_memory,
    is_out_of_gpu_memory,
)
from krea_local.placing import Placing, said_of
from krea_local.plan import Plan, need
from krea_local.progress import Bar, Call, OnStep, Stage
from krea_local.recipe import with_recipe
from krea_local.result import Result
from krea_local.sampling import (
    add_noise,
    denoise,
    draw_noise,
    flow_sigmas,
    pack,
    steps_to_run,
    unpack,
)
from krea_local.schema import (
    MAX_INPUT_PIXELS,
    Acceleration,
    ImageSize,
    ImageSizePreset,
    ImageSource,
    Img2ImgRequest,
    Loras,
    OutputFormat,
    Txt2ImgRequest,
    documented,
    fit_input_size,
)
from krea_local.transformer import FluxTransformer

if TYPE_CHECKING:
    from krea_local.cluster import Ulysses
    from krea_local.loading import Models
    from krea_local.safety import SafetyChecker
    from krea_local.schema import Lora

logger = logging.getLogger(__name__)

TXT2IMG_STAGES: tuple[Stage, ...] = ("text", "denoise", "decode", "safety")
IMG2IMG_STAGES: tuple[Stage, ...] = ("text", "encode", "denoise", "decode", "safety")
CACHED_PROMPTS = 8  # 4 MB each
FREE_IT = "make the image smaller, or free the GPU"
LET_IT_CHOOSE = (
    "load with memory='auto', not offload=…, and the fastest way that fits is taken (the least is "
    f"about {need('blocks'):.1f} GiB for the 12 B model at 1 megapixel), {FREE_IT}"
)


@dataclass(frozen=True)
class Prepared:
    """What a call draws with, which is fetched before it has the models.

    Attributes:
        loras: their files.
        input_image: for image-to-image.
        size: (width, height) of the pictures.
        notices: what is to be said of these.
    """

    loras: tuple[LoraFile, ...]
    input_image: InputImage | None
    size: tuple[int, int]
    notices: tuple[str, ...]


class Krea:
    """FLUX.1 [dev] models held ready for many calls. Made by `krea_local.load`.

    Calls from several threads wait for one another: one GPU, one picture at a time.

    Args:
        models: the parts, in one dtype, on `device`, or on the CPU where `offload` says so.
        device: where the pictures are made.
        label: what recipes call the model.
        least_side: in pixels, below which it draws worse and says so.
        guidance_scale: default of calls that name none.
        acceleration: default of calls that name none.
        offload: what stays on the device, where no `plan` says so.
        plan: what stays on the device; where memory runs out in a call, it is repeated with a
            smaller one. None: `offload` alone counts, and such a call fails.
        load_safety_checker: called once, before the first picture that is to be screened.
        batch_size: images of one call that are denoised together. 1 makes image i exactly the one
            that a call with its seed makes; more is faster where small images leave the GPU idle,
            but kernels for other batch sizes round differently, and at "high" the images skip the
            same steps: details then differ.
        progress: show a bar on standard error, where that is a terminal.
        compile: have torch.compile make the fused operations instead of our Triton kernels.
        group: processes that draw every picture together; see `cluster`.

    Attributes:
        engine: runs the transformer; `engine.settings` tells how each `acceleration` runs.
    """

    def __init__(
        self,
        models: Models,
        *,
        device: torch.device,
        label: str,
        guidance_scale: float,
        load_safety_checker: Callable[[], SafetyChecker],
        least_side: int = 0,
        acceleration: Acceleration = "none",
        offload: Offload = "none",
        plan: Plan | None = None,
        batch_size: int = 1,
        progress: bool = True,
        compile: bool = False,
        group: Ulysses | None = None,
    ) -> None:
        self.models = models
        self.device = device
        vae.prepare(models.vae, device)
        self.dtype: torch.dtype = models.transformer.dtype
        self.label = label
        self.least_side = least_side
        self.guidance_scale = guidance_scale
        self.acceleration = acceleration
        self.batch_size = batch_size
        self.progress = progress
        self.group = group
        self._placing = Placing(models, device, offload, plan)
        self.engine: Engine | DiffusersEngine
        if isinstance(models.transformer, FluxTransformer):
            self.engine = Engine(
                models.transformer,
                device=device,
                resident=self._placing.resident,
                compile=compile,
                group=group,
            )
        elif group is None:
            self.engine = DiffusersEngine(models.transformer, device=device)
        else:
            raise InvalidRequest("engine='diffusers' does not share an image between processes")
        self._placing.begin(self.engine)
        self._adapting = Adapting(models, self.engine, device)
        self._load_safety_checker = load_safety_checker
        self._safety_checker: SafetyChecker | None = None
        self._prompts: OrderedDict[str, tuple[Tensor, Tensor, str | None]] = OrderedDict()
        self._said: set[str] = set()
        self._apart = False  # whether other processes may be elsewhere in their work
        self._lock = self._placing.lock
        self._running: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._preparing: set[threading.Event] = set()  # of calls that fetch what they draw with
        self._switch = threading.Lock()  # held while the three lines above change

    @property
    def offload(self) -> Offload:
        """What stays on the device now."""
        return self._placing.offload

    @property
    def plan(self) -> Plan | None:
        """What stays on the device now, and why; None where `offload` alone says so."""
        return self._placing.plan

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along a side: 8 in FLUX.1."""
        return int(2 ** (len(self.models.vae.config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Width and height are multiples of this: 16 in FLUX.1, which packs latents 2 x 2."""
        return 2 * self.vae_scale

    @documented(Txt2ImgRequest)
    def txt2img(
        self,
        prompt: str,
        *,
        image_size: ImageSizePreset | ImageSize | dict[str, int] = "landscape_4_3",
        num_inference_steps: int = 28,
        seed: int | None = None,
        guidance_scale: float | None = None,
        sync_mode: bool = False,
        num_images: int = 1,
        enable_safety_checker: bool = True,
        output_format: OutputFormat = "jpeg",
        acceleration: Acceleration | None = None,
        loras: Loras = (),
        on_step: OnStep | None = None,
    ) -> Result:
        """Draw pictures of `prompt`, with the parameters of `fal-ai/flux/krea`.

        Raises:
            InvalidRequest: names the parameter, its value and the rule.
            WeightsNotFound: the safety checker is on and not there.
            OutOfMemory: the GPU's memory does not suffice.
            GenerationFailed: the model produced NaN.
            Cancelled: by `cancel` or by `on_step`.
        """
        request = Txt2ImgRequest.from_call(locals())
        return self.run(request, on_step=on_step, stacklevel=3)

    @documented(Img2ImgRequest)
    def img2img(
        self,
        prompt: str,
        *,
        image_url: ImageSource,
        strength: float = 0.95,
        num_inference_steps: int = 40,
        seed: int | None = None,
        guidance_scale: float | None = None,
        sync_mode: bool = False,
        num_images: int = 1,
        enable_safety_checker: bool = True,
        output_format: OutputFormat = "jpeg",
        acceleration: Acceleration | None = None,
        loras: Loras = (),
        on_step: OnStep | None = None,
    ) -> Result:
        """Redraw an image after `prompt`, with those of `fal-ai/flux/krea/image-to-image`.

        The input keeps its aspect; it is scaled to sides that the model can make, 1440 x 1440
        pixels at most in area.

        Raises:
            InvalidImage: the input cannot be read or is too large.
            InvalidRequest, WeightsNotFound, OutOfMemory, GenerationFailed, Cancelled: as `txt2img`.
        """
        request = Img2ImgRequest.from_call(locals())
        return self.run(request, on_step=on_step, stacklevel=3)

    def run(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        *,
        on_step: OnStep | None = None,
        check: Callable[[], None] = lambda: None,
        stacklevel: int = 2,
    ) -> Result:
        """Draw what `request` asks for; raises as `txt2img` and `img2img` do.

        Args:
            request: what to draw.
            on_step: called after each piece of work; may raise `Cancelled`.
            check: called now and then while the input image or a LoRA is fetched; may raise
                `Cancelled`.
            stacklevel: whose line a `KreaWarning` names, as in `warnings.warn`.
        """
        if on_step is not None and not callable(on_step):
            raise InvalidRequest(f"on_step={on_step!r}: should be a function")
        if self._running is threading.current_thread():
            raise InvalidRequest("on_step cannot draw with the model that is calling it")
        request = self._with_own_defaults(request)
        with self._begun() as cancelled:
            # Before the lock: fetching is not the GPU's business.
            prepared = self._prepare_call(request, cancelled, check)
            with self._lock:
                result = self._run_alone(request, cancelled, prepared, on_step)
        # What a level cannot do here is in every result's notices, but said aloud once.
        ever = set(self.engine.notices.get(request.acceleration, ()))
        for notice in result.notices:
            if notice in self._said:
                continue
            self._said |= {notice} & ever
            warnings.warn(notice, KreaWarning, stacklevel=stacklevel)
        return result

    def cancel(self) -> bool:
        """Stop the call under way, from another thread: it raises `Cancelled` within a step.

        While none draws, calls that still fetch their input image or LoRA are stopped; not where
        several processes draw together.

        Returns:
            Whether there was a call to stop. One that is past its last check still ends well.
        """
        with self._switch:
            if self._running is not None:
                self._cancelled.set()
                return True
            for preparing in self._preparing:
                preparing.set()
            return bool(self._preparing)

    def wait_until_idle(self) -> None:
        """Return when no call is under way."""
        with self._lock:
            pass

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor, str | None]:
        """`prompt` as the transformer takes it, from a cache of the last few prompts.

        The LoRAs of the last call still count, here and in `latents`.

        Returns:
            prompt_embeds [1, 512, 4096], pooled_prompt_embeds [1, 768], and where the prompt was
            cut if it has more than 512 tokens.
        """
        models = self.models
        with self._lock:
            if prompt not in self._prompts:
                encoders = self._placing.encoders(self.acceleration)
                with encoders, self._adapting.encoders():
                    embeds = text.encode_prompt(models, prompt, self.device)
                self._prompts[prompt] = (*embeds, text.where_cut(models, prompt))
                if len(self._prompts) > CACHED_PROMPTS:
                    self._prompts.popitem(last=False)
            self._prompts.move_to_end(prompt)
            return self._prompts[prompt]

    @torch.inference_mode()
    def encode_image(self, image: Image.Image) -> Tensor:
        """Image → latent map [1, 16, h, w]: the mode of the posterior, so without chance."""
        model = self.models.vae
        with self._placing.resident(model):
            pixels = image_to_pixels(image).to(self.device, self.dtype)
            encoded = vae.encode(model, pixels)
        latent_map: Tensor = (encoded - model.config["shift_factor"]) * model.config[
            "scaling_factor"
        ]
        return latent_map

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, width: int, height: int) -> Tensor:
        """Latents [B, S, 64] → pixels [B, 3, H, W] in about [-1, 1]."""
        model = self.models.vae
        latent_map = unpack(
            latents, rows=height // self.size_multiple, columns=width // self.size_multiple
        )
        latent_map = latent_map / model.config["scaling_factor"] + model.config["shift_factor"]
        with self._placing.resident(model):
            strips = self.plan is not None and self.plan.strips
            return vae.decode(model, latent_map, in_strips=strips)

    @torch.inference_mode()
    def latents(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        *,
        seeds: list[int],
        width: int,
        height: int,
        clean: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Denoised latents [B, S, 64], one image a seed.

        Args:
            request: for prompt, guidance and number of steps.
            seeds: of the B images.
            width: of the images, a multiple of `size_multiple`.
            height: likewise.
            clean: the input image's latent map [1, 16, H/8, W/8], where there is one.
            on_step: as for `sampling.denoise`.
        """
        rows, columns = height // self.size_multiple, width // self.size_multiple
        steps = request.num_inference_steps
        sigmas = flow_sigmas(steps, rows * columns, self.models.shift)
        channels = self.models.vae.config["latent_channels"]
        shape = (channels, 2 * rows, 2 * columns)
        latent_map = draw_noise(seeds, shape, self.dtype).to(self.device)
        if clean is not None:
            assert isinstance(request, Img2ImgRequest)
            sigmas = sigmas[steps - steps_to_run(steps, request.strength) :]
            latent_map = add_noise(clean, latent_map, sigmas[0])
        prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(request.prompt)
        task = Task(
            prompt_embeds,
            pooled_prompt_embeds,
            guidance_scale=float(request.guidance_scale),
            sigmas=sigmas,
            batch=len(seeds),
            rows=rows,
            columns=columns,
        )
        with self._placing.transformer(request.acceleration):
            velocity = self.engine.velocity(request.acceleration, task)
            return denoise(velocity, pack(latent_map), sigmas, on_step)

    def prepare(self, acceleration: Acceleration) -> speed.Settings:
        """How `acceleration` runs here: chosen, and its kernels compiled, when first asked for."""
        with self._lock, self._placing.current_device():
            self._placing.prepare(acceleration)
            return self.engine.prepare(acceleration)

    @contextlib.contextmanager
    def _begun(self) -> Iterator[threading.Event]:
        """What `cancel` sets to stop a call, from before it fetches anything to its end."""
        cancelled = threading.Event()
        if self.group is None:  # the other processes would wait for this one
            with self._switch:
                self._preparing.add(cancelled)
        try:
            yield cancelled
        finally:
            with self._switch:
                self._preparing.discard(cancelled)

    def _prepare_call(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        cancelled: threading.Event,
        check: Callable[[], None],
    ) -> Prepared:
        """What a call draws with."""

        def check_both() -> None:
            if cancelled.is_set():
                raise Cancelled("cancelled")
            check()

        input_image, size, notices = self._plan_size(request, check_both)
        if min(size) < self.least_side:
            notices.append(
                f"{self.label} knows pictures of {self.least_side} pixels a side and more: at "
                f"{size[0]}x{size[1]} shapes are lost"
            )
        loras = self._find_loras(request, check_both)
        return Prepared(tuple(loras), input_image, size, tuple(notices))

    def _run_alone(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        cancelled: threading.Event,
        prepared: Prepared,
        on_step: OnStep | None,
    ) -> Result:
        """A call that has the lock."""
        if self._apart:
            raise GenerationFailed(
                "a call failed, so that the processes that draw together are at different "
                "places: start them again"
            )
        with self._switch:
            self._preparing.discard(cancelled)
            self._cancelled = cancelled
            self._running = threading.current_thread()
        try:
            self._apart = self.group is not None
            with (
                torch.inference_mode(),
                explained_out_of_memory(FREE_IT if self.plan else LET_IT_CHOOSE),
            ):
                request = self._agreed(request, prepared.input_image)
                result = self._run_somehow(request, prepared, on_step)
            self._apart = False
        finally:
            with self._switch:
                self._running = None
        return result

    def _run_somehow(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        prepared: Prepared,
        on_step: OnStep | None,
    ) -> Result:
        """`_run`, and where memory runs out, again with less of the model on the GPU."""
        first, notices = self.plan, [*prepared.notices]
        while True:
            try:
                self._adapt(prepared.loras, notices)
                return self._run(request, prepared, [*notices], on_step)
            except Exception as error:
                if not is_out_of_gpu_memory(error) or self.plan is None or self.group is not None:
                    raise
                smaller = self._placing.smaller(request.acceleration)
                if smaller is None:
                    if first is not None and self.plan is not first:
                        self._placing.settle_again(first)
                    raise
                traceback.clear_frames(error.__traceback__)
            logger.info("memory ran out; the call is repeated with\n%s", smaller)
            self._placing.settle(smaller)
            notices.append(said_of(smaller, "memory did not suffice"))

    def _find_loras(
        self, request: Txt2ImgRequest | Img2ImgRequest, check: Callable[[], None]
    ) -> list[LoraFile]:
        """The files that the request names, fetched if need be."""
        return [
            LoraFile(find_lora(one.path, progress=self.progress, check=check), one.scale)
            for one in cast("tuple[Lora, ...]", request.loras)
            if one.scale
        ]

    def _adapt(self, files: Sequence[LoraFile], notices: list[str]) -> None:
        """Have the models add these LoRAs, and no others.

        Raises:
            InvalidRequest: other processes have other files.
            OutOfMemory: they leave too little memory, and the host has none for the model.
        """
        wanted = self._adapting.read(files)
        if wanted is None:
            return
        if self.group is not None and not self.group.all_equal(wanted.recipe):
            raise InvalidRequest("the processes that draw together have different LoRAs")
        if wanted.has_text or self._adapting.current.has_text:
            self._prompts.clear()
        notice = self._placing.make_room(wanted.adapters.nbytes)
        notices += [] if notice is None else [notice]
        self._adapting.add(wanted)

    def _run(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        prepared: Prepared,
        notices: list[str],
        on_step: OnStep | None,
    ) -> Result:
        assert request.seed is not None
        start = time.perf_counter()
        checker = self._checker() if request.enable_safety_checker else None
        self._placing.make_way(request.acceleration)
        input_image, (width, height) = prepared.input_image, prepared.size
        steps, stages = request.num_inference_steps, TXT2IMG_STAGES
        if isinstance(request, Img2ImgRequest):
            steps, stages = steps_to_run(steps, request.strength), IMG2IMG_STAGES
        pieces = 1 + (input_image is not None) + (checker is not None)
        total = request.num_images * (steps + 1) + pieces
        call = Call(
            num_images=request.num_images,
            num_steps=steps,
            width=width,
            height=height,
            cancelled=self._cancelled,
            on_step=on_step,
            bar=Bar(total, show=self.progress),
            total=total,
            wait=self._wait,
            timings=dict.fromkeys(stages, 0.0),
            notices=notices,
        )
        try:
            images = self._draw(request, call, input_image, width=width, height=height)
            flags = (False,) * len(images)
            if checker is not None:
                images, flags = self._screen(checker, images, call)
        finally:
            call.bar.close()
        call.timings["total"] = time.perf_counter() - start
        return Result(
            images=tuple(
                with_recipe(image, self._recipe(request, i, input_image, width, height))
                for i, image in enumerate(images)
            ),
            seed=request.seed,
            has_nsfw_concepts=flags,
            timings=call.timings,
            prompt=request.prompt,
            notices=tuple(call.notices),
            output_format=request.output_format,
            sync_mode=request.sync_mode,
        )

    def _draw(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        call: Call,
        input_image: InputImage | None,
        *,
        width: int,
        height: int,
    ) -> list[Image.Image]:
        assert request.seed is not None
        with call.stage("text"):
            cut = self.encode_prompt(request.prompt)[2]
        if cut is not None:
            call.notices.append(cut)
        call.advance("text")
        clean = None
        if input_image is not None:
            with call.stage("encode"):
                clean = self.encode_image(resize(input_image.image, width=width, height=height))
            call.advance("encode")
        latents = self._denoise(request, call, clean, width=width, height=height)
        images: list[Image.Image] = []
        with self._placing.resident(self.models.vae):
            for i, one in enumerate(latents[:, None]):  # [1, S, 64] each
                with call.stage("decode"):
                    pixels = self.decode(one, width=width, height=height)
                    self._refuse_nan(pixels, request)
                    images += pixels_to_images(pixels)
                call.advance("decode", image=i)
        return images

    def _denoise(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        call: Call,
        clean: Tensor | None,
        *,
        width: int,
        height: int,
    ) -> Tensor:
        """The latents of all images of the call, [N, S, 64]."""
        assert request.seed is not None
        seeds = [request.seed + i for i in range(request.num_images)]
        batches = []
        with call.stage("denoise"), self._placing.transformer(request.acceleration):
            for first in range(0, len(seeds), self.batch_size):
                batch = seeds[first : first + self.batch_size]

                def on_step(
                    step: int, latents: Tensor, first: int = first, count: int = len(batch)
                ) -> None:
                    for image in range(first, first + count):
                        call.advance("denoise", image=image, step=step, latents=latents)

                batches.append(
                    self.latents(
                        request,
                        seeds=batch,
                        width=width,
                        height=height,
                        clean=clean,
                        on_step=on_step,
                    )
                )
            latents = torch.cat(batches)
            self._refuse_nan(latents, request)  # waits for the GPU, once, after the loop
        call.notices.extend(self.engine.notices.get(request.acceleration, ()))
        return latents

    def _refuse_nan(self, tensor: Tensor, request: Txt2ImgRequest | Img2ImgRequest) -> None:
        """Rather an error than a black picture."""
        if not bool(tensor.isfinite().all()):
            raise GenerationFailed(
                f"{self.label} produced NaN or infinity at seed {request.seed}: its weights are "
                "damaged (`krea-local verify` tells), or the GPU is"
            )

    def _screen(
        self, checker: SafetyChecker, images: list[Image.Image], call: Call
    ) -> tuple[list[Image.Image], tuple[bool, ...]]:
        """Flagged images become black ones of the same size."""
        with call.stage("safety"):
            flags = tuple(checker.flags(images))
        call.advance("safety")
        black = [Image.new("RGB", image.size) for image in images]
        screened = zip(images, black, flags, strict=True)
        return [dark if flag else image for image, dark, flag in screened], flags

    def _checker(self) -> SafetyChecker:
        if self._safety_checker is None:
            try:
                self._safety_checker = self._load_safety_checker()
            except WeightsNotFound as error:
                if "enable_safety_checker" in str(error):
                    raise
                message = f"{error}; or switch it off with enable_safety_checker=False"
                raise WeightsNotFound(message) from error
        return self._safety_checker

    def _with_own_defaults(
        self, request: Txt2ImgRequest | Img2ImgRequest
    ) -> Txt2ImgRequest | Img2ImgRequest:
        """`request` with this model's defaults where it names none, and its seed fixed."""
        own = {"guidance_scale": self.guidance_scale, "acceleration": self.acceleration}
        unset = {name: own[name] for name in own if name not in request.model_fields_set}
        return request.model_copy(update=unset).with_seed()

    def _agreed(
        self, request: Txt2ImgRequest | Img2ImgRequest, input_image: InputImage | None
    ) -> Txt2ImgRequest | Img2ImgRequest:
        """`request` with the first process's seed, which may be random.

        Raises:
            InvalidRequest: other processes are asked for something else.
        """
        if self.group is None:
            return request
        assert request.seed is not None
        request = request.model_copy(update={"seed": self.group.agree(request.seed)})
        asked = request.model_dump(exclude={"image_url"})
        if not self.group.all_equal((asked, input_image and input_image.sha256)):
            raise InvalidRequest(
                "the processes that draw together are asked for different pictures: give each the "
                "same parameters and the same input image"
            )
        return request

    def _plan_size(
        self, request: Txt2ImgRequest | Img2ImgRequest, check: Callable[[], None]
    ) -> tuple[InputImage | None, tuple[int, int], list[str]]:
        """The input image, (width, height) to draw at, and what is to be said of them."""
        multiple = self.size_multiple
        if isinstance(request, Txt2ImgRequest):
            size, asked = request.size(multiple), request.asked_size
            if size == asked:
                return None, size, []
            return (
                None,
                size,
                [
                    f"image_size {asked[0]}x{asked[1]} was rounded to {size[0]}x{size[1]}: "
                    f"{self.label} draws multiples of {multiple}"
                ],
            )
        image = open_image(request.image_url, check=check)
        width, height = image.image.size
        fitted = fit_input_size(width=width, height=height, multiple=multiple)
        if fitted is None:
            raise InvalidImage(
                f"image_url: {width}x{height} is too long and narrow to redraw: no side may be "
                f"below 64 at {MAX_INPUT_PIXELS:,} pixels in all; crop it"
            )
        notices = list(image.notices)
        if fitted != (width, height):
            notices.append(f"image_url {width}x{height} was resized to {fitted[0]}x{fitted[1]}")
        return image, fitted, notices

    def _recipe(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        i: int,
        input_image: InputImage | None,
        width: int,
        height: int,
    ) -> dict[str, object]:
        """All that image i takes to be drawn again, alone."""
        recipe = request.model_dump(exclude={"image_url", "sync_mode", "loras"})
        assert request.seed is not None
        recipe |= {"seed": request.seed + i, "num_images": 1, "width": width, "height": height}
        recipe |= {"model": self.label, "version": f"krea_local {__version__}"}
        if input_image is not None:
            recipe |= {"image_name": input_image.name, "image_sha256": input_image.sha256}
        if self._adapting.current.recipe:
            recipe["loras"] = self._adapting.current.recipe
        return recipe

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
