"""The transformer and T5, from files of any format and layout that `formats` knows.

Pieces of a file's tensors go to their places in the model's, which are fused in the transformer;
what a file keeps in fewer bits is widened on the way or, with `packed`, stays as it is. As in
`components`, what lies in a file as it is wanted is left to `reading.read`. Knows nothing of
checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from krea_local.components import (
    HARMLESS_TENSORS,
    empty_module,
    empty_pretrained,
    give_memory,
    refuse_shapes,
)
from krea_local.errors import WeightsInvalid
from krea_local.files import read_json
from krea_local.progress import OnBytes

if TYPE_CHECKING:
    import torch
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    from krea_local.formats import Packed, Stored
    from krea_local.layers import Linear
    from krea_local.packed import Packing
    from krea_local.reading import Transfer, View
    from krea_local.transformer import Config, FluxTransformer

TIED = "encoder.embed_tokens.weight"  # to shared.weight, in T5


def empty_transformer(folder: Path) -> tuple[FluxTransformer, Config]:
    """Our transformer after its configuration, without memory."""
    import torch

    from krea_local.transformer import Config, FluxTransformer

    try:
        config = Config.of(read_json(folder / "config.json"))
        with torch.device("meta"):
            return FluxTransformer(config), config
    except WeightsInvalid:
        raise
    except Exception as error:  # a configuration can ask for anything
        reason = str(error) or type(error).__name__
        raise WeightsInvalid(f"{str(folder / 'config.json')!r}: {reason}") from error


def packed_transformer(folder: Path, files: list[Path], dtype: torch.dtype) -> FluxTransformer:
    """Our transformer as `load_transformer` makes it with `packed`, without memory."""
    from krea_local import formats

    model, config = empty_transformer(folder)
    with formats.opened(files) as stored:
        model.pack(_packings(stored, model, _places(files, stored, model, config)), dtype)
    return model


def packed_t5(folder: Path, files: list[Path], dtype: torch.dtype) -> T5EncoderModel:
    """T5's encoder as `load_t5` makes it with `packed`, without memory."""
    from krea_local import formats

    model = _empty_t5(folder)
    with formats.opened(files, "t5") as found:
        _pack_t5(model, _t5_tensors(files, found, model), dtype)
    return model


def check_transformer(folder: Path, files: list[Path]) -> None:
    """As `check_module`, of the transformer in any format and layout."""
    from krea_local import formats

    model, config = empty_transformer(folder)
    with formats.opened(files) as stored:
        _refuse_others(files, stored, _layout_of(stored, model, config))


def check_t5(folder: Path, files: list[Path]) -> None:
    """As `check_module`, of T5 in any format."""
    from krea_local import formats

    with formats.opened(files, "t5") as stored:
        _t5_tensors(files, stored, _empty_t5(folder))


@dataclass(frozen=True)
class _Place:
    """Where rows of a model's tensor come from.

    Attributes:
        source: the name of a file's tensor.
        of_target: the view of the model's tensor that they are.
        of_source: that of the file's.
    """

    source: str
    of_target: View
    of_source: View


@dataclass(frozen=True)
class Fused:
    """One tensor of the original checkpoint, from a file that may keep it in pieces.

    Attributes:
        shape: of it.
        is_large: whether it is a matrix inside a block.
        is_modulation: whether it is one of the modulation.
        pieces: what it is read from, and where that goes.
    """

    shape: tuple[int, ...]
    is_large: bool
    is_modulation: bool
    pieces: tuple[tuple[Stored, _Place], ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What they take in bfloat16."""
        return 2 * self.count

    def read(self) -> torch.Tensor:
        """All of it, in bfloat16, while the file is open."""
        import torch

        whole = torch.empty(self.shape, dtype=torch.bfloat16)
        for stored, place in self.pieces:
            place.of_target(whole).copy_(place.of_source(stored.read()))
        return whole


def fused_tensors(
    folder: Path, files: list[Path], stored: Mapping[str, Stored]
) -> dict[str, Fused]:
    """The transformer's tensors under their original names, of `files` that are opened as `stored`.

    Raises:
        WeightsInvalid: as `load_transformer`.
    """
    model, config = empty_transformer(folder)
    places = _places(files, stored, model, config)
    large, modulation = model.layer_names()
    return {
        name: Fused(
            tuple(tensor.shape),
            name.removesuffix(".weight") in large,
            name.removesuffix(".weight") in modulation,
            tuple((stored[place.source], place) for place in places[name]),
        )
        for name, tensor in model.state_dict().items()
    }


def load_transformer(
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    devices: tuple[torch.device, torch.device],
    on_bytes: OnBytes,
    transfers: list[Transfer],
    *,
    packed: bool = False,
) -> FluxTransformer:
    """Our transformer, in whose fused tensors those of the files go.

    Args:
        folder: of its configuration.
        files: in any format and layout.
        dtype: of every weight.
        devices: of the weights, and of the modulation's.
        on_bytes: hears of what is read here: numbers that have to be computed.
        transfers: takes what is still to be read.
        packed: keep large weights in the bits that the files keep them in, where there are fewer.
    """
    from krea_local import formats

    model, config = empty_transformer(folder)
    with formats.opened(files) as stored:
        places = _places(files, stored, model, config)
        packings = _packings(stored, model, places) if packed else {}
        model.pack(packings, dtype)
        apart = {
            f"{name}.{kind}": devices[1]
            for name in model.layer_names()[1]
            for kind in model.get_submodule(name)._parameters
        }
        state = give_memory(model, dtype, devices[0], apart)
        pairs: dict[str, list[tuple[torch.Tensor, View]]] = {}
        for target, sources in places.items():
            layer = target.removesuffix(".weight")
            for place in sources:
                if target.endswith(".weight") and layer in packings:
                    own = stored[place.source].packed
                    assert own is not None
                    parts = {name: state[f"{layer}.{name}"] for name in packings[layer].shapes}
                    _fill_packed(own, parts, place, folder, transfers)
                else:
                    pair = place.of_target(state[target]), place.of_source
                    pairs.setdefault(place.source, []).append(pair)
        for name, targets in pairs.items():
            _fill(targets, stored[name], folder, on_bytes, transfers)
        _keep_scales(model, stored, places)
    return model


def load_t5(
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
    transfers: list[Transfer],
    *,
    packed: bool = False,
) -> T5EncoderModel:
    """T5's encoder from files outside its folder, which has its configuration.

    `on_bytes`, `transfers` and `packed` are as in `load_transformer`.
    """
    from krea_local import formats

    model = _empty_t5(folder)
    with formats.opened(files, "t5") as found:
        stored = _t5_tensors(files, found, model)
        layers = _pack_t5(model, stored, dtype) if packed else set()
        state = give_memory(model, dtype, device)
        for name, one in stored.items():
            layer = name.removesuffix(".weight")
            if layer in layers and one.packed:
                parts = {part: state[f"{layer}.{part}"] for part in one.packed.packing.shapes}
                _fill_packed(one.packed, parts, _Place(name, _all, _all), folder, transfers)
            else:
                _fill([(state[name], _all)], one, folder, on_bytes, transfers)
    return model


def as_diffusers(transformer: FluxTransformer, folder: Path) -> FluxTransformer2DModel:
    """diffusers' class with the weights of ours."""
    from diffusers import FluxTransformer2DModel

    from krea_local import tensor_names

    config = transformer.config
    table = tensor_names.pieces(config.num_layers, config.num_single_layers)
    model = empty_module(FluxTransformer2DModel, folder)
    state = tensor_names.to_diffusers(transformer.state_dict(), table, config.hidden_size)
    model.load_state_dict(state, assign=True)
    other: FluxTransformer2DModel = model.eval().requires_grad_(False)
    return other


def _places(
    files: list[Path], stored: Mapping[str, Stored], model: FluxTransformer, config: Config
) -> dict[str, list[_Place]]:
    """Where each of the model's tensors comes from, after seeing that all are there."""
    from krea_local import tensor_names

    wanted = _layout_of(stored, model, config)
    _refuse_others(files, stored, wanted)
    names = model.state_dict()
    if wanted.keys() == names.keys():  # fused there too
        return {name: [_Place(name, _all, _all)] for name in names}
    found: dict[str, list[_Place]] = {}
    for piece in tensor_names.pieces(config.num_layers, config.num_single_layers):
        views = (
            partial(view, hidden_size=config.hidden_size)
            for view in (piece.of_original, piece.of_diffusers)
        )
        found.setdefault(piece.original, []).append(_Place(piece.diffusers, *views))
    return found


def _layout_of(
    stored: Mapping[str, Stored], model: FluxTransformer, config: Config
) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that most of the file's have: original or diffusers'."""
    from krea_local import tensor_names

    original = model.state_dict()
    table = tensor_names.pieces(config.num_layers, config.num_single_layers)
    diffusers = tensor_names.to_diffusers(original, table, config.hidden_size)
    return max(diffusers, original, key=lambda names: sum(name in names for name in stored))


def _packings(
    stored: Mapping[str, Stored], model: FluxTransformer, places: Mapping[str, list[_Place]]
) -> dict[str, Packing]:
    """How the files' large layers are packed, by name; those that are, and in one way."""
    found = {}
    for name in set().union(*model.layer_names()):
        kept = [stored[place.source].packed for place in places[f"{name}.weight"]]
        packings = [one.packing for one in kept if one is not None]
        if len(packings) == len(kept) and all(packings[0].joins(one) for one in packings):
            found[name] = packings[0].of_rows(
                cast("Linear", model.get_submodule(name)).out_features
            )
    return found


def _fill(
    pairs: Sequence[tuple[torch.Tensor, View]],
    stored: Stored,
    folder: Path,
    on_bytes: OnBytes,
    transfers: list[Transfer],
) -> None:
    """Put views of a stored tensor in their places, or leave that to `transfers`."""
    from krea_local.reading import Transfer

    numbers = stored.numbers
    if numbers is not None:
        transfers += [Transfer(numbers.part(view), target, folder.name) for target, view in pairs]
        return
    tensor = stored.read()
    for target, view in pairs:
        target.copy_(view(tensor))
    on_bytes(folder.name, stored.nbytes)


def _fill_packed(
    own: Packed,
    parts: Mapping[str, torch.Tensor],
    place: _Place,
    folder: Path,
    transfers: list[Transfer],
) -> None:
    """Put a file's packed rows in their place among a layer's parts, or leave it to `transfers`."""
    from krea_local.kernels.rows import CODES, TABLE
    from krea_local.reading import Transfer

    target = place.of_target(parts[CODES])
    transfers.append(Transfer(own.codes.part(place.of_source), target, folder.name))
    for name, other in own.others().items():
        if name == TABLE:
            parts[name].copy_(other)
        else:
            place.of_target(parts[name]).copy_(place.of_source(other))


def _keep_scales(
    model: FluxTransformer, stored: Mapping[str, Stored], places: Mapping[str, list[_Place]]
) -> None:
    """Tell layers whose files have 8-bit floats what those were multiplied by."""
    import torch

    from krea_local.layers import Linear
    from krea_local.packed import PackedLinear

    for layer in model.layer_names()[0]:
        linear = model.get_submodule(layer)
        assert isinstance(linear, Linear)
        if isinstance(linear, PackedLinear):
            continue
        scale = torch.zeros(linear.out_features)
        for place in places[f"{layer}.weight"]:
            own = stored[place.source].packed
            if own is None or own.codes.dtype != torch.float8_e4m3fn:
                break
            place.of_target(scale).copy_(place.of_source(own.others()["scale"]))
        if bool((scale.isfinite() & (scale > 0)).all()):  # of all rows, and usable
            linear.float8_scale = scale


def _empty_t5(folder: Path) -> T5EncoderModel:
    """T5's encoder after its configuration, without memory."""
    from transformers import T5EncoderModel

    model: T5EncoderModel = empty_pretrained(T5EncoderModel, folder)
    return model


def _pack_t5(model: T5EncoderModel, stored: Mapping[str, Stored], dtype: torch.dtype) -> set[str]:
    """Make room for packed weights in T5's blocks, where its file has such; returns the layers."""
    import torch

    from krea_local.packed import PackedLinear

    layers = set()
    for name, module in list(model.encoder.block.named_modules(prefix="encoder.block")):
        if isinstance(module, torch.nn.Linear) and (own := stored[f"{name}.weight"].packed):
            with torch.device("meta"):
                model.set_submodule(name, PackedLinear(own.packing, bias=False, dtype=dtype))
            layers.add(name)
    return layers


def _t5_tensors(
    files: list[Path], found: Mapping[str, Stored], model: T5EncoderModel
) -> dict[str, Stored]:
    """Those that the model has, after seeing that all are there."""
    stored = {n: one for n, one in found.items() if not re.search(HARMLESS_TENSORS, n)}
    _refuse_others(files, stored, {n: t for n, t in model.state_dict().items() if n != TIED})
    return stored


def _refuse_others(
    files: list[Path], stored: Mapping[str, Stored], wanted: Mapping[str, torch.Tensor]
) -> None:
    """As `refuse_shapes`, of tensors."""
    refuse_shapes(
        files,
        {name: one.shape for name, one in stored.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
    )


def _all(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
