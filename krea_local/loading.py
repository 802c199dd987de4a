"""Check a checkpoint's files and read them into `Models`.

Only safetensors are read, never pickles; no code from a checkpoint runs. Every file is compared
with its own header, and every tensor with the model it is for. Knows nothing of requests, of the
hub, or of how pictures are made.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from krea_local.errors import UnsupportedModel, WeightsInvalid, WeightsNotFound
from krea_local.files import check_safetensors, read_json, weight_files
from krea_local.weights import COMPONENTS, FOLDERS, Checkpoint, other_model

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import (
        CLIPTextModel,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        T5EncoderModel,
    )

    from krea_local.sampling import Shift
    from krea_local.transformer import FluxTransformer

# What older checkpoints carry besides: positions, tied embeddings, the other half of CLIP or T5.
HARMLESS_TENSORS = (
    r"(^|\.)position_ids$|^encoder\.embed_tokens\.weight$|^(text|visual)_projection\.weight$"
    r"|^logit_scale$|^vision_model\.|^decoder\.|^lm_head\.|(^|\.)pooler\."
)

MAX_BLOCKS = 1000  # FLUX.1 has 19 and 38
MIN_MERGES = 10  # CLIP's has 48,894

EngineName = Literal["native", "diffusers"]
"""`native`: our transformer, fused and fast. `diffusers`: theirs, to compare with."""

OnBytes = Callable[[str, int], None]
"""(component, bytes read since the last call), while a checkpoint is read."""


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
    on_bytes: OnBytes | None = None,
) -> Models:
    """Read a checkpoint, which `check_layout` has seen, onto `device`.

    Args:
        checkpoint: what to read.
        dtype: of every weight.
        device: where they go.
        modulation_device: where the transformer's modulation goes instead, with engine "native".
        engine: whose transformer class.
        on_bytes: hears of progress.

    Raises:
        WeightsNotFound: a component or one of its files is missing.
        WeightsInvalid: a file is truncated, holds wrong tensors, or is a pickle.
        UnsupportedModel: a scheduler of another kind.
    """
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    folder = checkpoint.folder
    shift = _read_shift(folder / "scheduler" / "scheduler_config.json")
    report = on_bytes or (lambda component, count: None)
    tokenizer = load_tokenizer(CLIPTokenizer, folder / "tokenizer", "vocab.json")
    tokenizer_2 = load_tokenizer(T5TokenizerFast, folder / "tokenizer_2", "spiece.model")
    transformer_files = (
        [checkpoint.transformer_file]
        if checkpoint.transformer_file
        else weight_files(folder / "transformer")
    )
    text_encoder, text_encoder_2 = (
        load_pretrained(kind, folder / name, dtype=dtype, device=device, on_bytes=report)
        for kind, name in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
    )
    vae_config = read_json(folder / "vae" / "config.json")
    for name in ("scaling_factor", "shift_factor"):
        # FLUX.1's file has both; diffusers' own defaults are those of Stable Diffusion.
        _number(vae_config, name, math.nan, folder / "vae" / "config.json")
    vae = _load_module(
        AutoencoderKL, folder / "vae", weight_files(folder / "vae"), dtype, device, report
    )
    transformer = (
        _load_module(
            FluxTransformer2DModel, folder / "transformer", transformer_files, dtype, device, report
        )
        if engine == "diffusers"
        else _load_transformer(
            folder / "transformer",
            transformer_files,
            dtype,
            (device, modulation_device or device),
            report,
        )
    )
    return Models(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        shift=shift,
    )


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of weights that `load_models` will read."""
    own = checkpoint.transformer_file
    files = [
        file
        for name in COMPONENTS
        for file in (
            [own] if own and name == "transformer" else weight_files(checkpoint.folder / name)
        )
    ]
    return sum(file.stat().st_size for file in files)


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
            raise WeightsNotFound(f"no {name}/ in {str(folder)!r}: weights.md says where to get it")
    for name in COMPONENTS:
        if not (folder / name / "config.json").exists():
            raise WeightsNotFound(f"no config.json in {str(folder / name)!r}: weights.md shows it")
        if name == "transformer" and checkpoint.transformer_file:
            check_safetensors(checkpoint.transformer_file)
        else:
            weight_files(folder / name)
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


def load_pretrained(
    kind: type[PreTrainedModel],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes | None = None,
) -> Any:
    """Read a transformers model from `folder`, refusing what transformers would only report.

    transformers renames tensors between its versions, so its own reader is used; it fills missing
    tensors with random numbers and goes on, which here is an error.
    """
    from krea_local.memory import is_out_of_memory

    files = weight_files(folder)
    with _quiet_transformers():
        try:
            model, loaded = kind.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported in `loaded`, and refused below
                output_loading_info=True,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # A configuration can ask for anything, and each class fails at it in its own way.
            raise WeightsInvalid(f"{str(folder)!r} cannot be read: {error}") from error
    faults = [f"{name} is missing" for name in sorted(loaded["missing_keys"])]
    faults += [
        f"{name} is {tuple(found)} where config.json says {tuple(wanted)}"
        for name, found, wanted in sorted(loaded["mismatched_keys"])
    ]
    faults += [
        f"{name} is not part of the model"
        for name in sorted(loaded["unexpected_keys"])
        if not re.search(HARMLESS_TENSORS, name)
    ]
    _refuse_faults(str(folder), faults)
    if on_bytes:
        on_bytes(folder.name, sum(file.stat().st_size for file in files))
    return model.eval().requires_grad_(False).to(device)


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


def _read_shift(file: Path) -> Shift:
    from krea_local.sampling import Shift

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
            raise WeightsInvalid(f"{str(merges)!r} is truncated: fetch it again")
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:  # the Rust tokenizers raise bare Exception on a damaged file
        raise WeightsInvalid(f"{str(folder)!r} cannot be read: {error}") from error
    return tokenizer


def _load_module(
    kind: Any,
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
) -> Any:
    """Build a diffusers model without memory, then read its tensors one by one onto `device`."""
    import torch

    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):  # of this thread only, unlike accelerate's patch of nn.Module
            model = kind.from_config(config)
    except Exception as error:  # a configuration can ask for anything
        reason = str(error) or type(error).__name__
        raise WeightsInvalid(f"{str(folder / 'config.json')!r}: {reason}") from error
    state = {}
    for name, tensor in _tensors(
        files, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ):
        state[name] = tensor.to(device=device, dtype=dtype)
        on_bytes(folder.name, tensor.nbytes)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _load_transformer(
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    devices: tuple[torch.device, torch.device],
    on_bytes: OnBytes,
) -> FluxTransformer:
    """Build our transformer without memory, then read diffusers' tensors into its fused ones.

    `devices`: of the weights, and of the modulation's.
    """
    import torch

    from krea_local import tensor_names
    from krea_local.transformer import Config, FluxTransformer

    try:
        config = Config.of(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = FluxTransformer(config)
    except WeightsInvalid:
        raise
    except Exception as error:  # a configuration can ask for anything
        reason = str(error) or type(error).__name__
        raise WeightsInvalid(f"{str(folder / 'config.json')!r}: {reason}") from error
    empty, width = model.state_dict(), config.hidden_size
    table = tensor_names.pieces(config.num_layers, config.num_single_layers)
    modulations = {id(layer) for layer in model.modulations()}
    streamed = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if id(module) in modulations
        for kind in ("weight", "bias")
    }
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in tensor_names.to_diffusers(empty, table, width).items()
    }
    places: dict[str, list[tensor_names.Piece]] = {}
    for piece in table:
        places.setdefault(piece.diffusers, []).append(piece)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(files, wanted):
        for piece in places[name]:
            original = piece.original
            if original not in state:
                place = devices[original in streamed]
                state[original] = torch.empty(empty[original].shape, dtype=dtype, device=place)
            piece.of_original(state[original], width).copy_(piece.of_diffusers(tensor, width))
        on_bytes(folder.name, tensor.nbytes)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _tensors(
    files: list[Path], wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of `files`, after seeing that they are those of the model, in its shapes."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= {name: tuple(t["shape"]) for name, t in check_safetensors(file).items()}
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [
        f"{name} is {found[name]} where config.json says {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    faults += [f"{name} is not part of the model" for name in found if name not in wanted]
    _refuse_faults(", ".join(str(file) for file in files), faults)
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    yield name, reader.get_tensor(name)
        except SafetensorError as error:
            raise WeightsInvalid(f"{str(file)!r} cannot be read: {error}") from error


def _refuse_faults(where: str, faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WeightsInvalid(f"{where}: tensor {faults[0]}{more}")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own report and progress bar; its settings are put back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
