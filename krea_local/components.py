"""Make one component's model for its weights, after seeing that they are that model's.

From safetensors of floats under the names of its class, as CLIP, T5 and VAE are published; other
files of T5 and the transformer's are for `any_format`. Every tensor is compared with the model in
name and shape. What lies in a file as it is wanted becomes a `Transfer`, so that all components are
read at once; the model is ready when `reading.read` has done it. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krea_local.errors import WeightsInvalid
from krea_local.files import check_safetensors, read_json, weight_files
from krea_local.progress import OnBytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from krea_local.reading import Numbers, Transfer

# What older checkpoints carry besides: positions, tied embeddings, the other half of CLIP or T5.
HARMLESS_TENSORS = (
    r"(^|\.)position_ids$|^encoder\.embed_tokens\.weight$|^(text|visual)_projection\.weight$"
    r"|^logit_scale$|^vision_model\.|^decoder\.|^lm_head\.|(^|\.)pooler\."
)

CLIP_PREFIX = "text_model."  # in every published file; transformers 5 has dropped it


def load_pretrained(
    kind: type[PreTrainedModel],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes | None = None,
    transfers: list[Transfer] | None = None,
) -> Any:
    """Read a transformers model from `folder`, refusing what transformers would only report.

    transformers renames tensors between its versions: its own reader is used where the files' names
    are not those of the model. It fills missing tensors with random numbers and goes on, which here
    is an error. Onto the device "meta" only names and shapes are read.

    Args:
        kind: the model's class.
        folder: of its files and configuration.
        dtype: of every weight.
        device: where they go.
        on_bytes: hears of progress.
        transfers: takes what is still to be read; without it all is read at once.
    """
    from krea_local import reading
    from krea_local.memory import is_out_of_memory

    files = weight_files(folder)
    if device.type != "meta":
        known = _known_pretrained(kind, folder, files, dtype, device)
        if known is not None:
            model, found = known
            if transfers is None:
                reading.read(found, on_bytes or (lambda component, count: None))
            else:
                transfers += found
            return model
    with _quiet_transformers():
        try:
            model, loaded = kind.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                device_map="meta" if device.type == "meta" else None,
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


def load_module(
    kind: Any,
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    transfers: list[Transfer],
) -> Any:
    """A diffusers model on `device`; `transfers` takes what is still to be read."""
    model = empty_module(kind, folder)
    check_tensors(files, _shapes(model))
    state = give_memory(model, dtype, device)
    transfers += _transfers(_numbers(files), state, folder)
    return model


def empty_module(kind: Any, folder: Path) -> Any:
    """A diffusers model after its configuration, without memory."""
    import torch

    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):  # of this thread only, unlike accelerate's patch of nn.Module
            return kind.from_config(config)
    except Exception as error:  # a configuration can ask for anything
        reason = str(error) or type(error).__name__
        raise WeightsInvalid(f"{str(folder / 'config.json')!r}: {reason}") from error


def check_module(kind: Any, folder: Path, files: list[Path]) -> None:
    """See that the tensors of `files` are those of a diffusers model; reads none of them.

    Raises:
        WeightsInvalid: one is missing, of another shape, or too many.
    """
    check_tensors(files, _shapes(empty_module(kind, folder)))


def empty_pretrained(kind: Any, folder: Path) -> Any:
    """A transformers model after its configuration, without memory."""
    import torch

    try:
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))
    except Exception as error:  # a configuration can ask for anything
        raise WeightsInvalid(f"{str(folder)!r} cannot be read: {error}") from error


def _known_pretrained(
    kind: Any, folder: Path, files: list[Path], dtype: torch.dtype, device: torch.device
) -> tuple[Any, list[Transfer]] | None:
    """A model and what fills it; None where the files' tensors are not those of its class."""
    import torch

    model = empty_pretrained(kind, folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = _numbers(files)
    if not wanted.keys() <= found.keys():
        found = {name.removeprefix(CLIP_PREFIX): one for name, one in found.items()}
    others = found.keys() - wanted.keys()
    if (
        {name: one.shape for name, one in found.items() if name in wanted} != wanted
        or not all(re.search(HARMLESS_TENSORS, name) for name in others)
        or not all(name.endswith("position_ids") for name, _ in model.named_buffers())
        or getattr(model.config, "quantization_config", None) is not None
    ):
        return None
    state = give_memory(model, dtype, device)
    for name, buffer in model.named_buffers():  # which no file has
        owner, _, attribute = name.rpartition(".")
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        setattr(model.get_submodule(owner), attribute, positions)
    return model, _transfers({name: found[name] for name in wanted}, state, folder)


def _numbers(files: list[Path]) -> dict[str, Numbers]:
    """The numbers of all `files`, by name."""
    from krea_local.reading import numbers_of

    return {name: one for file in files for name, one in numbers_of(file).items()}


def _transfers(
    found: Mapping[str, Numbers], state: Mapping[str, torch.Tensor], folder: Path
) -> list[Transfer]:
    """From each tensor of a file to that of the model with its name."""
    from krea_local.reading import Transfer

    return [Transfer(one, state[name], folder.name) for name, one in found.items()]


def give_memory(
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    apart: Mapping[str, torch.device] | None = None,
) -> dict[str, torch.Tensor]:
    """Make an empty model ready but for its numbers; returns its tensors by name.

    `apart`: by name, where some go instead of `device`.
    """
    import torch

    from krea_local.packed import PackedLinear

    places = apart or {}
    packed = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for part in module.packing.shapes
    }
    made: dict[int, torch.Tensor] = {}  # by what it replaces: tied weights stay tied
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            place, number = places.get(name, device), tensor.dtype if name in packed else dtype
            made[id(tensor)] = torch.empty(tensor.shape, dtype=number, device=place)
        state[name] = made[id(tensor)]
    model.load_state_dict(state, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    model.eval().requires_grad_(False)
    return state


def check_tensors(files: list[Path], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """See that the tensors of `files` are those of the model, in its shapes.

    Raises:
        WeightsInvalid: one is missing, of another shape, or too many.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= {name: tuple(t["shape"]) for name, t in check_safetensors(file).items()}
    refuse_shapes(files, found, wanted)


def tensors_of(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, one by one, by name.

    Raises:
        WeightsInvalid: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, reader.get_tensor(name)
    except SafetensorError as error:
        raise WeightsInvalid(f"{str(file)!r} cannot be read: {error}") from error


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def refuse_shapes(
    files: list[Path],
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """See that `files` hold all tensors that the model has, in its shapes, and no others."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [
        f"{name} is {found[name]} where config.json says {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    faults += [f"{name} is not part of the model" for name in found if name not in wanted]
    _refuse_faults(", ".join(str(file) for file in files), faults)


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
