"""The public functions: `load`, `txt2img`, `img2img`.

Imports torch only when called, so that `import krea_local` stays instant.
"""

from __future__ import annotations

import gc
import os
import threading
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, get_args

from krea_local.errors import (
    DeviceUnavailable,
    InvalidRequest,
    KreaError,
    KreaWarning,
    WeightsNotFound,
)
from krea_local.safety import THRESHOLD
from krea_local.schema import (
    Acceleration,
    ImageSize,
    ImageSizePreset,
    ImageSource,
    Img2ImgRequest,
    Loras,
    OutputFormat,
    Txt2ImgRequest,
    documented,
)
from krea_local.weights import MODEL_VARIABLE, SAFETY_CHECKER_REPO

if TYPE_CHECKING:
    import torch

    from krea_local.cluster import Ulysses
    from krea_local.loading import EngineName
    from krea_local.pipeline import Krea
    from krea_local.plan import Plan, Sizes
    from krea_local.progress import OnStep
    from krea_local.result import Result
    from krea_local.weights import Checkpoint


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder_2: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str | None = None,
    offload: str | None = None,
    packed: bool | None = None,
    acceleration: str = "none",
    engine: EngineName = "native",
    compile: bool = False,
    safety_checker: str | os.PathLike[str] = SAFETY_CHECKER_REPO,
    safety_threshold: float = THRESHOLD,
    batch_size: int = 1,
    progress: bool = True,
    token: str | None = None,
    group: Ulysses | None = None,
) -> Krea:
    """Read a checkpoint onto the GPU: about 34 GB in bfloat16, 12 B transformer and T5 included.

    Args:
        model: "mini" (built in, trained to draw simple shapes); "tiny" (built in, random weights);
            a folder in the diffusers layout; a single file with a transformer, whose other parts
            are beside it or where None finds them; "krea", "dev" or "srpo"; or a hub id, which is
            fetched if it is not in the hub's cache. None: what the variable KREA_LOCAL_MODEL says,
            else FLUX.1 Krea [dev] if the cache holds it.
        transformer: a file to take instead of the model's transformer: safetensors in the original
            or diffusers' layout, in floats of 16 or 32 bits, in 8 bits with or without scales, in
            bitsandbytes' 4 bits; or GGUF, which needs the package gguf.
        text_encoder_2: a file to take instead of the model's T5, likewise.
        device: "cuda", "cuda:1", "cpu"; "auto" is CUDA if there is a GPU, else the CPU.
        dtype: "bfloat16", "float32"; "auto" is bfloat16 on CUDA, float32 on the CPU.
        memory: how much of the GPU's memory to take: "auto" for what is free, an amount such as
            "12GB", or "none" for as much as the whole model needs. The fastest way that fits is
            taken, and a slower one if memory runs out later; `krea.plan` tells which. The picture
            is the same, but for rounding where it has to be decoded in strips. Default: "auto" on
            one GPU, unless `offload` is given. It is what weights and activations take; torch's
            allocator may hold some more.
        offload: the same by name, whatever is free: "none" keeps all on the GPU, about 33 GiB at 1
            megapixel; "modulation" leaves the 27 % of the transformer on the CPU that an image
            needs once, about 27 GiB; "model" also lets encoders, transformer and VAE take turns,
            about 17 GiB; "blocks" has no more of the large ones there than three blocks at a time,
            about 2.5 GiB, and copies the next ones while one works.
        packed: keep the large weights of files in 8 bits, 4 bits or GGUF as they are there, and
            widen a layer's where it is used: a half to a sixth of the memory, for some of a step's
            time. The picture is that of weights widened beforehand (False), bit for bit. Default:
            where a plan is made, packed unless the whole transformer fits onto the GPU widened;
            8-bit floats also where `acceleration` multiplies them as they are.
        acceleration: "none", "regular" or "high", for calls that name none. "none" is lossless,
            "regular" multiplies in 8 bits, "high" also skips steps; `speed.LEVELS` has all.
        engine: "native" is our transformer; "diffusers" is theirs, to compare with.
        compile: have torch.compile make the operations between matrix products instead of taking
            our Triton kernels, which were written for data-centre GPUs; try it on another.
            Takes its time once (minutes on a CPU), then comes from a cache on disk.
        safety_checker: a folder or hub id. A checkpoint folder's own `safety_checker/` goes first.
            It is read before the first picture that is screened, and fetched only if the model
            itself was named by hub id.
        safety_threshold: an image is flagged where its probability of "nsfw" is above; 0 … 1.
        batch_size: images of a call that are denoised together, 1 … 4; see `Krea`.
        progress: show bars on standard error, where that is a terminal.
        token: the hub's access token; by default HF_TOKEN or the one `hf auth login` saved.
        group: processes, one a GPU, that draw every picture together: `cluster.join()`. Its device
            is taken then.

    Raises:
        WeightsNotFound: a component is missing (weights.md says where to get it).
        LicenceRequired: the hub wants its licence accepted.
        WeightsInvalid: a file is truncated, of the wrong shape, or a pickle.
        UnsupportedModel: a checkpoint of another architecture.
        DeviceUnavailable: no such device.
        OutOfMemory: it does not fit onto the GPU.
        InvalidRequest: a parameter that is none of the above.
    """
    level = _one_of("acceleration", acceleration, get_args(Acceleration))
    if engine not in ("native", "diffusers"):
        raise InvalidRequest(f"engine={engine!r}: should be 'native' or 'diffusers'")
    if memory is not None and offload is not None:
        raise InvalidRequest(f"memory={memory!r} and offload={offload!r}: give one of the two")
    if engine == "diffusers" and memory not in (None, "none"):
        raise InvalidRequest(f"memory={memory!r}: is for engine='native'; 'diffusers' has offload=")
    if engine == "diffusers" and offload in ("modulation", "blocks"):
        raise InvalidRequest(f"offload={offload!r}: should be 'none' or 'model' with 'diffusers'")
    if packed is not None and type(packed) is not bool:
        raise InvalidRequest(f"packed={packed!r}: should be True, False or None")
    if engine == "diffusers" and packed:
        raise InvalidRequest("packed=True: is for engine='native'")
    if type(compile) is not bool:
        raise InvalidRequest(f"compile={compile!r}: should be True or False")
    if engine == "diffusers" and compile:
        raise InvalidRequest("compile=True: is for engine='native'")
    if not isinstance(safety_threshold, (int, float)) or not 0 <= safety_threshold <= 1:
        raise InvalidRequest(f"safety_threshold={safety_threshold!r}: should be between 0 and 1")
    if type(batch_size) is not int or not 1 <= batch_size <= 4:
        raise InvalidRequest(f"batch_size={batch_size!r}: should be 1, 2, 3 or 4")
    if not isinstance(safety_checker, (str, os.PathLike)):
        raise InvalidRequest(f"safety_checker={safety_checker!r}: should be a folder or a hub id")
    with _loading:
        return _load(
            model,
            transformer=transformer,
            text_encoder_2=text_encoder_2,
            device=device,
            dtype=dtype,
            memory=memory,
            offload=offload,
            packed=packed,
            level=level,
            engine=engine,
            compile=compile,
            safety_checker=safety_checker,
            safety_threshold=safety_threshold,
            batch_size=batch_size,
            progress=progress,
            token=token,
            group=group,
        )


# While they read a model, transformers and diffusers patch classes of the whole process: two loads
# at once break each other, and every later one.
_loading = threading.RLock()


def _load(
    model: str | os.PathLike[str] | None,
    *,
    transformer: str | os.PathLike[str] | None,
    text_encoder_2: str | os.PathLike[str] | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    memory: str | None,
    offload: str | None,
    packed: bool | None,
    level: Acceleration,
    engine: EngineName,
    compile: bool,
    safety_checker: str | os.PathLike[str],
    safety_threshold: float,
    batch_size: int,
    progress: bool,
    token: str | None,
    group: Ulysses | None,
) -> Krea:
    import torch

    from krea_local import loading, weights
    from krea_local.memory import check_offload, explained_out_of_memory, pin
    from krea_local.packed import packed_layers
    from krea_local.pipeline import Krea
    from krea_local.progress import Bar
    from krea_local.safety import SafetyChecker

    given_offload, offload = offload, check_offload("none" if offload is None else offload)
    device = choose_device(device if group is None else group.device)
    dtype = choose_dtype(dtype, device)
    checkpoint = _find(
        model,
        transformer=transformer,
        text_encoder_2=text_encoder_2,
        token=token,
        progress=progress,
    )
    alone = group is None and engine == "native"
    if memory is None and given_offload is None and device.type == "cuda" and alone:
        memory = "auto"
    plan = None
    if memory not in (None, "none"):
        sizes = loading.sizes(checkpoint, dtype)
        narrow = sizes if packed is False else loading.sizes(checkpoint, dtype, packed=True)
        own = None if narrow == sizes else narrow
        plan = choose_plan(
            sizes, memory, device, dtype, batch_size, level, packed=own, always=packed is True
        )
        offload, packed = plan.offload, plan.packed
    bar = Bar(loading.checkpoint_bytes(checkpoint), show=progress, unit="B")
    cpu = torch.device("cpu")
    home = cpu if offload in ("model", "blocks") else device
    advice = "load with offload='model' or 'blocks', or free the GPU"
    if home == cpu:
        advice = "free memory"
    try:
        with explained_out_of_memory(advice):
            models = loading.load_models(
                checkpoint,
                dtype=dtype,
                device=home,
                modulation_device=home if offload == "none" else cpu,
                engine=engine,
                packed=packed is True,
                on_bytes=bar.advance,
            )
    finally:
        bar.close()
    if packed and not (packed_layers(models.transformer) or packed_layers(models.text_encoder_2)):
        notice = "packed=True: the weights have full width, so there is nothing to keep packed"
        warnings.warn(notice, KreaWarning, stacklevel=3)

    def load_safety_checker() -> SafetyChecker:
        with _loading, weights.hub_bars(show=progress):
            folder = weights.find_safety_checker(checkpoint, safety_checker)
            return SafetyChecker(folder, device=device, threshold=safety_threshold)

    krea = Krea(
        models,
        device=device,
        label=checkpoint.label,
        least_side=checkpoint.least_side,
        guidance_scale=checkpoint.family.guidance_scale,
        acceleration=level,
        offload=offload,
        plan=plan,
        load_safety_checker=load_safety_checker,
        batch_size=batch_size,
        progress=progress,
        compile=compile,
        group=group,
    )
    parts = (models.transformer, models.vae, models.text_encoder, models.text_encoder_2)
    pin(parts, device)
    with torch.inference_mode():
        krea.prepare(level)  # compiles kernels, so that the first picture need not
    return krea


def _find(
    model: str | os.PathLike[str] | None,
    *,
    transformer: str | os.PathLike[str] | None,
    text_encoder_2: str | os.PathLike[str] | None,
    token: str | None,
    progress: bool,
) -> Checkpoint:
    """Where the model's files are, after seeing that they are a model's; raises as `load`."""
    from krea_local import loading, weights

    try:
        with weights.hub_bars(show=progress):
            checkpoint = weights.find(
                model, transformer=transformer, text_encoder_2=text_encoder_2, token=token
            )
        loading.check_layout(checkpoint)
    except KreaError:
        raise
    except OSError as error:  # a folder without permission, a name that is too long
        raise WeightsNotFound(f"cannot look at {model!r}: {error.strerror or error}") from error
    return checkpoint


@documented(Txt2ImgRequest)
def txt2img(
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
    model: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Draw pictures of `prompt` with `model`, which is loaded at the first call and kept.

    `model` is as in `load`, which has more to choose from. Raises as `load` and `Krea.txt2img` do.
    """
    request = Txt2ImgRequest.from_call(locals())
    return kept(model).run(request, on_step=on_step, stacklevel=3)


@documented(Img2ImgRequest)
def img2img(
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
    model: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Redraw an image after `prompt` with `model`, which is loaded at the first call and kept.

    `model` is as in `load`, which has more to choose from. Raises as `load` and `Krea.img2img` do.
    """
    request = Img2ImgRequest.from_call(locals())
    return kept(model).run(request, on_step=on_step, stacklevel=3)


# The one model that is kept between calls, by the name it was asked for.
_kept_models: dict[str, Krea] = {}
_keeping = threading.Lock()


class LoadOptions(TypedDict, total=False):
    """Keywords of `load` that a model is kept with, beside its name."""

    transformer: str | os.PathLike[str] | None
    text_encoder_2: str | os.PathLike[str] | None
    device: str | torch.device
    dtype: str | torch.dtype
    memory: str | None
    offload: str | None
    packed: bool | None
    acceleration: str
    engine: EngineName
    compile: bool
    safety_checker: str | os.PathLike[str]
    safety_threshold: float
    batch_size: int
    progress: bool
    token: str | None


def kept(model: str | os.PathLike[str] | None, options: LoadOptions | None = None) -> Krea:
    """The model of that name, loaded now unless it is the one that was used last."""
    name = os.fspath(model) if model is not None else os.environ.get(MODEL_VARIABLE, "")
    options = options or {}
    key = f"{name} {options}" if options else name
    with _keeping:
        if key not in _kept_models:
            # Before the model that is kept is given up, see that there is another.
            with _loading:
                _find(
                    name or None,
                    transformer=options.get("transformer"),
                    text_encoder_2=options.get("text_encoder_2"),
                    token=options.get("token"),
                    progress=options.get("progress", True),
                )
            for other in _kept_models.values():
                other.wait_until_idle()
                del other  # or it would be there until the new model is
            _kept_models.clear()  # first, so that two models do not share the GPU
            _kept_models[key] = load(name or None, **options)
        return _kept_models[key]


def choose_device(device: str | torch.device) -> torch.device:
    """The device that `load`'s argument means.

    Raises:
        DeviceUnavailable: it is not there.
        InvalidRequest: no such kind of device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest(
            f"device={device!r}: should be 'auto', 'cuda', 'cuda:N' or 'cpu'"
        ) from error
    if place.type == "cpu":
        return torch.device("cpu")
    if place.type != "cuda":
        raise DeviceUnavailable(f"device={str(place)!r}: only 'cuda' and 'cpu' are supported")
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this PyTorch is built without CUDA)"
        raise DeviceUnavailable(
            f"device={str(place)!r}: no CUDA GPU is there{built}; `krea-local info` shows what is, "
            "device='cpu' works without one"
        )
    count = torch.cuda.device_count()
    if place.index is not None and place.index >= count:
        raise DeviceUnavailable(f"device={str(place)!r}: there are {count} GPUs, from cuda:0")
    # With its number: "cuda" alone means another GPU in another thread, and equals no tensor's.
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def choose_plan(
    sizes: Sizes,
    memory: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    level: Acceleration,
    *,
    packed: Sizes | None = None,
    always: bool = False,
) -> Plan:
    """What stays on `device` with as much of its memory as `memory` says and there is.

    `packed` and `always` are as for `plan.choose`.

    Raises:
        InvalidRequest: `memory` is no amount.
        OutOfMemory: too little for any way to run the model, there or in host memory.
    """
    import torch

    from krea_local import plan
    from krea_local.kernels.rows import FLOAT8
    from krea_local.memory import available_host_memory
    from krea_local.rates import measure
    from krea_local.speed import eight_bit_of

    budget = None if memory == "auto" else plan.parse_budget(memory)
    way_out = "free the GPU" if device.type == "cuda" else "give that much"
    if device.type == "cuda":
        gc.collect()  # models that are no longer used
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # What CUDA's libraries load later, and what others on this GPU come to need.
        free -= max(total // 20, plan.GIB // 4)
        if budget is not None and budget <= free:
            way_out = "give that much"
        budget = free if budget is None else min(budget, free)
    if budget is None:
        raise InvalidRequest("memory='auto': is for a GPU; on the CPU give an amount, or nothing")
    eight_bit = None
    if level != "none" and dtype == torch.bfloat16:
        eight_bit = eight_bit_of(device)
    if packed is not None and eight_bit not in (None, FLOAT8):
        packed = replace(packed, eight_bit=False)  # of other 8 bits
    chosen = plan.choose(
        sizes,
        budget,
        packed=packed,
        always=always,
        host=available_host_memory(),
        batch=batch_size,
        eight_bit=eight_bit is not None,
        asked=f"memory={memory!r}",
        way_out=way_out,
    )
    rates = measure(device, dtype, eight_bit) if device.type == "cuda" else None
    return replace(chosen, rates=rates)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The number format that `load`'s argument means on `device`.

    Raises:
        InvalidRequest: not one that FLUX.1 runs in.
    """
    import torch

    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    number = known.get(dtype) if isinstance(dtype, str) else dtype
    if number is None or number not in known.values():
        raise InvalidRequest(
            f"dtype={str(dtype)!r}: should be 'auto', 'bfloat16' or 'float32' (T5-XXL overflows in "
            "float16)"
        )
    return number


def _one_of(name: str, value: str, allowed: tuple[Acceleration, ...]) -> Acceleration:
    for one in allowed:
        if value == one:
            return one
    raise InvalidRequest(f"{name}={value!r}: should be one of {', '.join(map(repr, allowed))}")
