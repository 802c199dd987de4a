"""The way from a request to pictures: prompt, latents, denoising, decoding, screening.

`Krea` holds the models and the one lock; everything that belongs to a call lives in that call, so
nothing is left behind when it fails or is cancelled. Knows nothing of where weights come from.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from krea_local import speed, text, vae
from krea_local._version import __version__
from krea_local.engine import DiffusersEngine, Engine, Task
from krea_local.errors import (
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
from krea_local.memory import (
    Footprint,
    Offload,
    explained_out_of_memory,
    on_device,
)
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

STAGES: dict[type[Txt2ImgRequest | Img2ImgRequest], tuple[Stage, ...]] = {
    Txt2ImgRequest: ("text", "denoise", "decode", "safety"),
    Img2ImgRequest: ("text", "encode", "denoise", "decode", "safety"),
}
CACHED_PROMPTS = 8  # 4 MB each
NEEDS = Footprint()
OUT_OF_MEMORY_ADVICE: dict[Offload, str] = {
    "none": f"load with offload='modulation' or 'model', with which the 12 B model takes about "
    f"{NEEDS.modulation:.0f} or {NEEDS.model:.0f} GiB at 1 megapixel, make the image smaller, or "
    "free the GPU",
    "modulation": f"load with offload='model', with which the 12 B model takes about "
    f"{NEEDS.model:.0f} GiB at 1 megapixel, make the image smaller, or free the GPU",
    "model": "make the image smaller, or free the GPU",
}


class Krea:
    """FLUX.1 [dev] models held ready for many calls. Made by `krea_local.load`.

    Calls from several threads wait for one another: one GPU, one picture at a time.

    Args:
        models: the parts, in one dtype, on `device`, or on the CPU where `offload` says so.
        device: where the pictures are made.
        label: what recipes call the model.
        guidance_scale: default of calls that name none.
        acceleration: default of calls that name none.
        offload: what stays on the device.
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
        acceleration: Acceleration = "none",
        offload: Offload = "none",
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
        self.guidance_scale = guidance_scale
        self.acceleration = acceleration
        self.offload = offload
        self.batch_size = batch_size
        self.progress = progress
        self.group = group
        self.engine: Engine | DiffusersEngine
        if isinstance(models.transformer, FluxTransformer):
            self.engine = Engine(
                models.transformer,
                device=device,
                resident=self._resident if offload == "model" else None,
                compile=compile,
                group=group,
            )
        elif group is None:
            self.engine = DiffusersEngine(models.transformer, device=device)
        else:
            raise InvalidRequest("engine='diffusers' does not share an image between processes")
        self._load_safety_checker = load_safety_checker
        self._safety_checker: SafetyChecker | None = None
        self._prompts: OrderedDict[str, tuple[Tensor, Tensor, str | None]] = OrderedDict()
        self._said: set[str] = set()
        self._apart = False  # whether other processes may be elsewhere in their work
        self._lock = threading.RLock()  # held while the models work
        self._running: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._switch = threading.Lock()  # held while the two lines above change

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
        stacklevel: int = 2,
    ) -> Result:
        """Draw what `request` asks for; raises as `txt2img` and `img2img` do.

        Args:
            request: what to draw.
            on_step: called after each piece of work; may raise `Cancelled`.
            stacklevel: whose line a `KreaWarning` names, as in `warnings.warn`.
        """
        if on_step is not None and not callable(on_step):
            raise InvalidRequest(f"on_step={on_step!r}: should be a function")
        if self._running is threading.current_thread():
            raise InvalidRequest("on_step cannot draw with the model that is calling it")
        request = self._with_own_defaults(request)
        # Before the lock: fetching an image is not the GPU's business.
        planned = self._plan_size(request)
        with self._lock:
            if self._apart:
                raise GenerationFailed(
                    "a call failed, so that the processes that draw together are at different "
                    "places: start them again"
                )
            with self._switch:
                self._cancelled.clear()
                self._running = threading.current_thread()
            try:
                self._apart = self.group is not None
                with (
                    torch.inference_mode(),
                    explained_out_of_memory(OUT_OF_MEMORY_ADVICE[self.offload]),
                ):
                    request = self._agreed(request, planned[0])
                    result = self._run(request, *planned, on_step)
                self._apart = False
            finally:
                with self._switch:
                    self._running = None
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

        Returns:
            Whether there was a call to stop. One that is past its last check still ends well.
        """
        with self._switch:
            if self._running is not None:
                self._cancelled.set()
            return self._running is not None

    def wait_until_idle(self) -> None:
        """Return when no call is under way."""
        with self._lock:
            pass

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor, str | None]:
        """`prompt` as the transformer takes it, from a cache of the last few prompts.

        Returns:
            prompt_embeds [1, 512, 4096], pooled_prompt_embeds [1, 768], and where the prompt was
            cut if it has more than 512 tokens.
        """
        models = self.models
        with self._lock:
            if prompt not in self._prompts:
                with self._resident(models.text_encoder, models.text_encoder_2):
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
        with self._resident(model):
            pixels = image_to_pixels(image).to(self.device, self.dtype)
            encoded = model.encode(pixels).latent_dist.mode()
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
        with self._resident(model):
            return vae.decode(model, latent_map)

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
        with self._lock, self._resident(*self._transformer_modules(request.acceleration)):
            velocity = self.engine.velocity(request.acceleration, task)
            return denoise(velocity, pack(latent_map), sigmas, on_step)

    def prepare(self, acceleration: Acceleration) -> speed.Settings:
        """How `acceleration` runs here: chosen, and its kernels compiled, when first asked for."""
        with self._lock, self._current_device():
            return self.engine.prepare(acceleration)

    def _run(
        self,
        request: Txt2ImgRequest | Img2ImgRequest,
        input_image: InputImage | None,
        size: tuple[int, int],
        notices: list[str],
        on_step: OnStep | None,
    ) -> Result:
        assert request.seed is not None
        start = time.perf_counter()
        checker = self._checker() if request.enable_safety_checker else None
        width, height = size
        steps = request.num_inference_steps
        if isinstance(request, Img2ImgRequest):
            steps = steps_to_run(steps, request.strength)
        pieces = 1 + (input_image is not None) + (checker is not None)
        total = request.num_images * (steps + 1) + pieces
        call = Call(
            num_images=request.num_images,
            num_steps=steps,
            cancelled=self._cancelled,
            on_step=on_step,
            bar=Bar(total, show=self.progress),
            total=total,
            wait=self._wait,
            timings=dict.fromkeys(STAGES[type(request)], 0.0),
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
        with self._resident(self.models.vae):
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
        modules = self._transformer_modules(request.acceleration)
        with call.stage("denoise"), self._resident(*modules):
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
                "damaged (weights.md says how to verify them), or the GPU is"
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
        self, request: Txt2ImgRequest | Img2ImgRequest
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
        image = open_image(request.image_url)
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
        recipe = request.model_dump(exclude={"image_url", "sync_mode"})
        assert request.seed is not None
        recipe |= {"seed": request.seed + i, "num_images": 1, "width": width, "height": height}
        recipe |= {"model": self.label, "version": f"krea_local {__version__}"}
        if input_image is not None:
            recipe |= {"image_name": input_image.name, "image_sha256": input_image.sha256}
        return recipe

    def _current_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the thread's current GPU, wherever the tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _transformer_modules(self, acceleration: Acceleration) -> list[nn.Module]:
        """What has to be on the device for the steps of a call."""
        with self._lock, self._current_device():
            return self.engine.modules(acceleration)

    @contextlib.contextmanager
    def _resident(self, *modules: nn.Module) -> Iterator[None]:
        """Have `modules` on the device, and to oneself."""
        with self._lock, self._current_device():
            if self.offload == "model":
                with on_device(list(modules), self.device):
                    yield
            else:
                yield
