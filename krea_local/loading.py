"""Check a checkpoint's files and read them into `Models`.

No pickles are read, and no code from a checkpoint runs. Every file is compared with its own header,
and every tensor with the model it is for. Knows nothing of requests, of the hub, or of how pictures
are made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from krea_local.any_format import (
    as_diffusers,
    check_t5,
    check_transformer,
    empty_transformer,
    load_t5,
    load_transformer,
    packed_t5,
    packed_transformer,
)
from krea_local.components import check_module, empty_module, load_module, load_pretrained
from krea_local.errors import UnsupportedModel, WeightsInvalid, WeightsNotFound
from krea_local.files import AGAIN, check_safetensors, read_json, weight_files
from krea_local.plan import Sizes
from krea_local.progress import OnBytes
from krea_local.weights import COMPONENTS, FOLDERS, Checkpoint, other_model

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

    from krea_local.sampling import Shift
    from krea_local.transformer import FluxTransformer

SAFETY_CHECKER_BYTES = 343_000_000  # Falconsai/nsfw_image_detection
MAX_BLOCKS = 1000  # FLUX.1 has 19 and 38
MIN_MERGES = 10  # CLIP's has 48,894

EngineName = Literal["native", "diffusers"]
"""`native`: our transformer, fused and fast. `diffusers`: theirs, to compare with."""


@dataclass(frozen=True)
class Models:
    """The parts of FLUX.1 [dev], ready to run: in evaluation mode, in one dtype."""

    transformer: FluxTransformer | FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase
    shift: Shift


def load_models(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    modulation_device: torch.device | None = None,
    engine: EngineName = "native",
    packed: bool = False,
    on_bytes: OnBytes | None = None,
) -> Models:
    """Read a checkpoint, which `check_layout` has seen, onto `device`.

    Args:
        checkpoint: what to read.
        dtype: of every weight.
        device: where they go.
        modulation_device: where the transformer's modulation goes instead, with engine "native".
        engine: whose transformer class.
        packed: keep large weights in the bits that their files keep them in, where there are fewer.
        on_bytes: hears of progress.

    Raises:
        WeightsNotFound: a component or one of its files is missing.
        WeightsInvalid: a file is truncated, holds wrong tensors, or is a pickle.
        UnsupportedModel: a scheduler of another kind.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, T5EncoderModel

    from krea_local import reading

    folder = checkpoint.folder
    shift = read_shift(checkpoint)
    report = on_bytes or (lambda component, count: None)
    tokenizer, tokenizer_2 = load_tokenizers(checkpoint)
    files = {name: component_files(checkpoint, name) for name in COMPONENTS}
    transfers: list[reading.Transfer] = []
    pretrained = functools.partial(
        load_pretrained, dtype=dtype, device=device, on_bytes=report, transfers=transfers
    )
    t5_folder, t5_files = folder / "text_encoder_2", files["text_encoder_2"]
    text_encoder = pretrained(CLIPTextModel, folder / "text_encoder")
    text_encoder_2 = (
        load_t5(t5_folder, t5_files, dtype, device, report, transfers, packed=packed)
        if checkpoint.text_encoder_2_file
        else pretrained(T5EncoderModel, t5_folder)
    )
    _check_vae_config(folder)
    vae = load_module(AutoencoderKL, folder / "vae", files["vae"], dtype, device, transfers)
    devices = device, modulation_device or device
    transformer: FluxTransformer | FluxTransformer2DModel = load_transformer(
        folder / "transformer",
        files["transformer"],
        dtype,
        devices,
        report,
        transfers,
        packed=packed,
    )
    reading.read(transfers, report)
    if engine == "diffusers":
        transformer = as_diffusers(transformer, folder / "transformer")
    return Models(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        shift=shift,
    )


def component_files(checkpoint: Checkpoint, name: str) -> list[Path]:
    """The files of a component, in the checkpoint's folder or named apart.

    Raises:
        WeightsNotFound, WeightsInvalid: as `weight_files`.
    """
    apart = {
        "transformer": checkpoint.transformer_file,
        "text_encoder_2": checkpoint.text_encoder_2_file,
    }
    file = apart.get(name)
    if file is not None:
        if file.suffix.lower() != ".gguf":
            check_safetensors(file)
        return [file]
    # The transformer's reader knows what integers may stand for.
    return weight_files(checkpoint.folder / name, floats_only=name != "transformer")


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of weights that `load_models` will read."""
    return sum(
        file.stat().st_size for name in COMPONENTS for file in component_files(checkpoint, name)
    )


def sizes(checkpoint: Checkpoint, dtype: torch.dtype, *, packed: bool = False) -> Sizes:
    """What the weights of a checkpoint, which `check_layout` has seen, will take in `dtype`.

    Args:
        checkpoint: which.
        dtype: of every weight that is not packed.
        packed: as in `load_models`.

    Raises:
        WeightsNotFound, WeightsInvalid: a configuration that makes no model; with `packed`, as
            `load_models` raises them.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from krea_local.packed import scratch_bytes, weight_bytes

    folder = checkpoint.folder

    def count(modules: Iterable[torch.nn.Module]) -> int:
        return weight_bytes(modules, dtype.itemsize)

    transformer = wide = empty_transformer(folder / "transformer")[0]
    if packed:
        files = component_files(checkpoint, "transformer")
        transformer = packed_transformer(folder / "transformer", files, dtype)
    vae = empty_module(AutoencoderKL, folder / "vae")
    try:
        with torch.device("meta"):
            clip = CLIPTextModel(CLIPTextConfig.from_pretrained(str(folder / "text_encoder")))
            t5 = T5EncoderModel(T5Config.from_pretrained(str(folder / "text_encoder_2")))
    except Exception as error:  # a configuration can ask for anything
        reason = str(error) or type(error).__name__
        raise WeightsInvalid(f"{str(folder)!r}: {reason}") from error
    if packed and checkpoint.text_encoder_2_file:
        t5_files = component_files(checkpoint, "text_encoder_2")
        t5 = packed_t5(folder / "text_encoder_2", t5_files, dtype)
    blocks = tuple(count(block) for block in transformer.step_blocks())
    numbers = [weight_bytes(block, 1) for block in wide.step_blocks()]
    doubles = wide.config.num_layers
    t5_blocks = tuple(count([block]) for block in t5.encoder.block)
    checker = folder / "safety_checker" / "model.safetensors"
    return Sizes(
        blocks=blocks,
        numbers=tuple(numbers),
        a_token=sum(numbers[:doubles]) // 2 + sum(numbers[doubles:]),
        outside=count(transformer.step_modules()) - sum(blocks),
        modulation=count(transformer.modulations()),
        t5_blocks=t5_blocks,
        t5_outside=count([t5]) - sum(t5_blocks),
        text_encoder=count([clip]),
        vae=count([vae]),
        safety_checker=checker.stat().st_size if checker.is_file() else SAFETY_CHECKER_BYTES,
        row=transformer.config.hidden_size * dtype.itemsize,
        itemsize=dtype.itemsize,
        scratch=scratch_bytes([transformer, t5], dtype.itemsize),
        eight_bit=transformer.is_kept_in_float8,
    )


def check_component(checkpoint: Checkpoint, name: str) -> None:
    """See that a component's tensors are those of its model, in name and shape; reads no tensor.

    Raises:
        WeightsNotFound, WeightsInvalid: as `load_models`.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, T5EncoderModel

    folder = checkpoint.folder / name
    files = component_files(checkpoint, name)
    if name == "transformer":
        check_transformer(folder, files)
    elif name == "vae":
        _check_vae_config(checkpoint.folder)
        check_module(AutoencoderKL, folder, files)
    elif name == "text_encoder_2" and checkpoint.text_encoder_2_file:
        check_t5(folder, files)
    else:
        kind = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}[name]
        load_pretrained(kind, folder, dtype=torch.bfloat16, device=torch.device("meta"))


def check_layout(checkpoint: Checkpoint) -> None:
    """See that every component is there and that the model is of our architecture.

    Raises:
        WeightsNotFound, UnsupportedModel, WeightsInvalid: as `load_models`.
    """
    folder = checkpoint.folder
    index = folder / "model_index.json"
    if index.exists():
        _refuse_pipeline(str(read_json(index).get("_class_name", "")), folder)
    for name in FOLDERS:
        if not (folder / name).is_dir():
            raise WeightsNotFound(
                f"no {name}/ in {str(folder)!r}: get it with `krea-local download` (weights.md)"
            )
    for name in COMPONENTS:
        if not (folder / name / "config.json").exists():
            raise WeightsNotFound(f"no config.json in {str(folder / name)!r}: weights.md shows it")
        component_files(checkpoint, name)
    config = read_json(folder / "transformer" / "config.json")
    kind = config.get("_class_name", "FluxTransformer2DModel")
    if kind != "FluxTransformer2DModel":
        raise UnsupportedModel(other_model(f"{str(folder)!r} holds a {kind}"))
    for name in ("num_layers", "num_single_layers"):
        count = config.get(name, 1)
        if type(count) is not int or not 1 <= count <= MAX_BLOCKS:
            raise WeightsInvalid(
                f"{str(folder / 'transformer' / 'config.json')!r} has {name}={count!r}, which "
                f"should be a number from 1 to {MAX_BLOCKS}"
            )
    if config.get("patch_size", 1) != 1:
        raise UnsupportedModel(
            other_model(f"{str(folder)!r} has patch_size={config['patch_size']!r}, not 1")
        )
    if config.get("guidance_embeds") is not True:
        raise UnsupportedModel(
            other_model(f"{str(folder)!r} has no guidance embedding, like FLUX.1 [schnell]")
        )
    if config.get("in_channels") != 64:
        raise UnsupportedModel(
            other_model(
                f"{str(folder)!r} takes {config.get('in_channels')} channels, unlike FLUX.1 [dev]"
            )
        )
    axes, head = config.get("axes_dims_rope", [16, 56, 56]), config.get("attention_head_dim", 128)
    if not isinstance(axes, list) or sum(map(_as_int, axes)) != head:
        raise WeightsInvalid(
            f"{str(folder / 'transformer' / 'config.json')!r} has axes_dims_rope={axes!r}, which "
            f"should add up to attention_head_dim={head!r}"
        )


def _refuse_pipeline(pipeline: str, folder: Path) -> None:
    names = {
        "Flux2Pipeline": "FLUX.2",
        "Flux2KleinPipeline": "FLUX.2 [klein]",
        "Krea2Pipeline": "Krea 2",
        "FluxKontextPipeline": "FLUX.1 Kontext [dev]",
        "FluxFillPipeline": "FLUX.1 Fill [dev]",
        "FluxControlPipeline": "FLUX.1 Canny or Depth [dev]",
    }
    if pipeline not in ("", "FluxPipeline", "FluxImg2ImgPipeline"):
        raise UnsupportedModel(
            other_model(f"{str(folder)!r} is {names.get(pipeline, 'a ' + pipeline)}")
        )


def read_shift(checkpoint: Checkpoint) -> Shift:
    """The time shift that the scheduler's configuration asks for.

    Raises:
        WeightsInvalid: it cannot be read.
        UnsupportedModel: a scheduler of another kind.
    """
    from krea_local.sampling import Shift

    file = checkpoint.folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    expected: dict[str, object] = {"use_dynamic_shifting": True, "num_train_timesteps": 1000}
    expected |= dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"),
        False,
    )
    expected |= {"invert_sigmas": False, "shift_terminal": None, "time_shift_type": "exponential"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UnsupportedModel(
                other_model(f"{str(file)!r} has {name}={config[name]!r}, not {value!r}")
            )
    known = Shift()
    shift = Shift(
        base=_number(config, "base_shift", known.base, file),
        max=_number(config, "max_shift", known.max, file),
        base_seq_len=int(_number(config, "base_image_seq_len", known.base_seq_len, file)),
        max_seq_len=int(_number(config, "max_image_seq_len", known.max_seq_len, file)),
    )
    if shift.max_seq_len <= shift.base_seq_len:
        raise WeightsInvalid(f"{str(file)!r}: max_image_seq_len should be over base_image_seq_len")
    return shift


def _as_int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _number(config: Mapping[str, Any], name: str, default: float, file: Path) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise WeightsInvalid(f"{str(file)!r} has {name}={value!r}, not a number")
    return value


def _check_vae_config(folder: Path) -> None:
    file = folder / "vae" / "config.json"
    config = read_json(file)
    for name in ("scaling_factor", "shift_factor"):
        # FLUX.1's file has both; diffusers' own defaults are those of Stable Diffusion.
        _number(config, name, math.nan, file)


def load_tokenizers(
    checkpoint: Checkpoint,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """CLIP's and T5's; raises as `load_tokenizer`."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder = checkpoint.folder
    return (
        load_tokenizer(CLIPTokenizer, folder / "tokenizer", "vocab.json"),
        load_tokenizer(T5TokenizerFast, folder / "tokenizer_2", "spiece.model"),
    )


def load_tokenizer(kind: Any, folder: Path, vocabulary: str) -> PreTrainedTokenizerBase:
    """Read a tokenizer from tokenizer.json or from the file named `vocabulary`.

    Raises:
        WeightsNotFound: neither is there.
        WeightsInvalid: a file is damaged.
    """
    # Without its files transformers builds an empty tokenizer and says nothing.
    whole = (folder / "tokenizer.json").is_file()
    if not whole and not (folder / vocabulary).is_file():
        raise WeightsNotFound(
            f"no tokenizer.json or {vocabulary} in {str(folder)!r}: see weights.md"
        )
    merges = folder / "merges.txt"
    if not whole and vocabulary == "vocab.json":
        if not merges.is_file():
            raise WeightsNotFound(f"no merges.txt in {str(folder)!r}: see weights.md")
        if merges.read_bytes().count(b"\n") < MIN_MERGES:
            raise WeightsInvalid(f"{str(merges)!r} is truncated: {AGAIN}")
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:  # the Rust tokenizers raise bare Exception on a damaged file
        raise WeightsInvalid(f"{str(folder)!r} cannot be read: {error}") from error
    return tokenizer
