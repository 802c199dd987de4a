"""Tensors of weights files, whatever the files keep them in: floats, scaled 8-bit floats, blocks.

Each tensor is read as the numbers that it stands for, or refused: one whose scale was overlooked
makes garbage without an error. Knows which names belong together, nothing of models.

Sources: safetensors; ComfyUI's `scaled_fp8` and `comfy_quant`; bitsandbytes' 4-bit state; ggml's
blocks, through the package `gguf`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from krea_local.errors import KreaError, UnsupportedModel, WeightsInvalid, WeightsNotFound
from krea_local.files import AGAIN, FLOAT8, FLOATS, check_safetensors
from krea_local.kernels import PLAIN, ggml
from krea_local.kernels.rows import CODES, TABLE
from krea_local.packed import Packing
from krea_local.reading import Numbers, locate

ModelName = Literal["transformer", "t5"]

# What programs put before the names of one model in a file, where it may stand beside others.
PREFIXES: dict[ModelName, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "t5": ("text_encoders.t5xxl.transformer.", "t5xxl.transformer."),
}
EMBEDDINGS = ("shared.weight", "embed_tokens.weight")  # in T5; scales are of matrix products
SCALES = ("scale_weight", "weight_scale")
# Scales for inputs, which we find anew at each product; and what says that there are scales.
SPARE = r"(^|\.)(scale_input|input_scale|comfy_quant)$|^scaled_fp8$"
SCALED_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise")
QUANT_STATE = ".quant_state.bitsandbytes__"
GGUF_ARCHITECTURES = ("flux", "t5", "t5encoder")
# llama.cpp's names of T5's tensors.
T5_NAMES = {
    r"^enc\.blk\.(\d+)\.": r"encoder.block.\1.",
    r"^token_embd\.": "shared.",
    r"^enc\.output_norm\.": "encoder.final_layer_norm.",
    r"^dec\.": "decoder.",
    r"\.attn_([qkvo])\.": r".layer.0.SelfAttention.\1.",
    r"\.attn_rel_b\.": ".layer.0.SelfAttention.relative_attention_bias.",
    r"\.attn_norm\.": ".layer.0.layer_norm.",
    r"\.ffn_gate\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn_up\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn_down\.": ".layer.1.DenseReluDense.wo.",
    r"\.ffn_norm\.": ".layer.1.layer_norm.",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        name: without what stands for the model.
        shape: of the numbers it stands for.
        kind: what they are kept in, as its format calls it.
        nbytes: that they take in the file, without their scales.
        read: the numbers, in some float dtype, on the CPU.
        numbers: where they lie in the file as they are; None where `read` has to compute them.
        packed: how they can be kept as they are in the file; None where they cannot, or are wide.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    read: Callable[[], Tensor]
    numbers: Numbers | None = None
    packed: Packed | None = None


@dataclass(frozen=True)
class Packed:
    """A matrix of a file in the bits it is kept in.

    Attributes:
        packing: how.
        codes: where those of its rows lie in the file.
        others: reads its other parts, on the CPU.
    """

    packing: Packing
    codes: Numbers
    others: Callable[[], dict[str, Tensor]]


@contextlib.contextmanager
def opened(files: Sequence[Path], model: ModelName = "transformer") -> Iterator[dict[str, Stored]]:
    """The tensors of `model` that `files` hold, by name; read while the context lasts.

    Where a file holds several models, those of the others are passed over.

    Raises:
        WeightsNotFound: no such file.
        WeightsInvalid: truncated, damaged, or numbers kept in a way that is not known here.
        UnsupportedModel: a GGUF file of another architecture.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Stored] = {}
        for file in files:
            gguf = file.suffix.lower() == ".gguf"
            found |= _gguf(file, model) if gguf else _safetensors(file, model, stack)
        yield found


def _safetensors(file: Path, model: ModelName, stack: contextlib.ExitStack) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    header = check_safetensors(file)
    try:
        reader = stack.enter_context(safe_open(file, framework="pt"))
    except SafetensorError as error:
        raise WeightsInvalid(f"{str(file)!r} cannot be read: {error}") from error
    return _File(file, header, reader, locate(file, header), _prefix(header, model)).tensors()


@dataclass(frozen=True)
class _File:
    """A safetensors file, open, and the tensors in it that start with `prefix`."""

    path: Path
    header: Mapping[str, Mapping[str, Any]]
    reader: Any
    numbers: Mapping[str, Numbers]
    prefix: str

    def tensors(self) -> dict[str, Stored]:
        names = [name[len(self.prefix) :] for name in self.header if name.startswith(self.prefix)]
        named = set(names)
        # Where one has a scale, all should; a weight whose scale is missing would be garbage.
        signs = (*SCALES, "scaled_fp8", "comfy_quant")
        scaled = any(name.endswith(signs) for name in names)
        found: dict[str, Stored] = {}
        spare = {name for name in names if re.search(SPARE, name)}
        used = set(spare)
        for name in spare:
            self._check_spare(name)
        for name in (name for name in names if name not in spare):
            if f"{name}{QUANT_STATE}nf4" in named or f"{name}{QUANT_STATE}fp4" in named:
                used |= {other for other in named if other.startswith(f"{name}.")}
                found[name] = self._four_bit(name, named)
            elif self._dtype(name) in FLOAT8:
                scale = self._scale_of(name, named)
                lacks = scaled and scale is None and len(self._shape(name)) > 1
                if lacks and not name.endswith(EMBEDDINGS):
                    raise WeightsInvalid(
                        f"{str(self.path)!r}: tensor {name} is {self._dtype(name)} without the "
                        "scale that others there have: the file is damaged, or of a kind that is "
                        "not read"
                    )
                used |= {scale} if scale else set()
                found[name] = self._float8(name, scale)
        rest = [name for name in names if name not in used and name not in found]
        return found | {name: self._plain(name) for name in rest}

    def _dtype(self, name: str) -> str:
        return str(self.header[self.prefix + name]["dtype"])

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.header[self.prefix + name]["shape"])

    def _stored(self, name: str, kind: str, read: Callable[[], Tensor]) -> Stored:
        start, end = self.header[self.prefix + name]["data_offsets"]
        return Stored(name, self._shape(name), kind, end - start, read)

    def _as_it_is(self, name: str) -> Stored:
        stored = self._stored(name, self._dtype(name), lambda: self._read(name))
        return replace(stored, numbers=self.numbers.get(self.prefix + name))

    def _read(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self.reader.get_tensor(self.prefix + name)
        except SafetensorError as error:
            raise WeightsInvalid(f"{str(self.path)!r} cannot be read: {error}") from error
        return tensor

    def _plain(self, name: str) -> Stored:
        kind = self._dtype(name)
        if kind not in FLOATS and not name.endswith("position_ids"):
            raise WeightsInvalid(
                f"{str(self.path)!r}: tensor {name} is {kind}: such weights are not read "
                "(weights.md lists the formats that are)"
            )
        return self._as_it_is(name)

    def _scale_of(self, name: str, named: set[str]) -> str | None:
        stem = name.removesuffix(".weight")
        scales = [f"{stem}.{kind}" for kind in SCALES if f"{stem}.{kind}" in named]
        return scales[0] if scales and name.endswith(".weight") else None

    def _float8(self, name: str, scale: str | None) -> Stored:
        kind = self._dtype(name)
        if scale is None:
            stored = replace(self._as_it_is(name), read=lambda: self._read(name).float())
            return replace(stored, packed=_packed_float8(stored.numbers, stored.shape))
        rows, numbers = self._shape(name)[0], self._shape(scale)
        if numbers not in ((), (1,), (rows,), (1, 1), (rows, 1)):
            raise WeightsInvalid(
                f"{str(self.path)!r}: tensor {scale} is {numbers}: scales by block are not read, "
                "only one of a tensor or of each row"
            )

        def read() -> Tensor:
            factor = self._read(scale).float().reshape(-1, *(1,) * (len(self._shape(name)) - 1))
            return self._read(name).float() * factor

        stored = self._stored(name, f"{kind} with scale", read)
        codes = self.numbers.get(self.prefix + name)
        return replace(
            stored, packed=_packed_float8(codes, stored.shape, lambda: self._read(scale))
        )

    def _check_spare(self, name: str) -> None:
        if not name.endswith("comfy_quant"):
            return
        kind = self._json(name).get("format")
        if kind not in SCALED_FORMATS:
            raise WeightsInvalid(
                f"{str(self.path)!r}: tensor {name} says {kind!r}: weights in that format are not "
                f"read, only {', '.join(SCALED_FORMATS)}"
            )

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(bytes(self._read(name).flatten().tolist()))
        except ValueError as error:
            raise WeightsInvalid(f"{str(self.path)!r}: tensor {name} should hold JSON") from error
        if not isinstance(content, dict):
            raise WeightsInvalid(f"{str(self.path)!r}: tensor {name} should hold a JSON object")
        return content

    def _four_bit(self, name: str, named: set[str]) -> Stored:
        """Pairs of numbers to a byte, each one of 16 values times the largest of its block."""
        kind = "nf4" if f"{name}{QUANT_STATE}nf4" in named else "fp4"
        state = self._json(f"{name}{QUANT_STATE}{kind}")
        try:
            shape, block = tuple(map(int, state["shape"])), int(state["blocksize"])
            nested = int(state["nested_blocksize"]) if "nested_blocksize" in state else 0
            offset = float(state["nested_offset"]) if nested else 0.0
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsInvalid(
                f"{str(self.path)!r}: tensor {name}{QUANT_STATE}{kind} lacks {error}"
            ) from error
        one = _FourBit(self, name, shape, block, nested, offset)
        stored = replace(self._stored(name, kind.upper(), one.read), shape=shape)
        if block < 2 or block % 2 or math.prod(shape) != 2 * stored.nbytes:
            raise WeightsInvalid(
                f"{str(self.path)!r}: tensor {name} has {stored.nbytes:,} bytes, which are not "
                f"{shape} numbers of 4 bits in blocks of {block}"
            )
        return replace(stored, packed=one.packed())


@dataclass(frozen=True)
class _FourBit:
    """A tensor of bitsandbytes: blocks of `block` numbers, one after the other."""

    file: _File
    name: str
    shape: tuple[int, ...]
    block: int
    nested: int
    offset: float

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block)

    def read(self) -> Tensor:
        """Block by block, of which a row need not be a multiple."""
        count, half = math.prod(self.shape), self.block // 2
        codes = self.file._read(self.name).contiguous().view(torch.uint8).flatten()
        codes = F.pad(codes, (0, self.blocks * half - codes.numel())).view(self.blocks, half)
        numbers = torch.empty(self.blocks, self.block)
        PLAIN.widen("4bit", {CODES: codes, **self.others(self.blocks)}, numbers)
        return numbers.flatten()[:count].reshape(self.shape)

    def packed(self) -> Packed | None:
        numbers = self.file.numbers.get(self.file.prefix + self.name)
        if numbers is None or len(self.shape) != 2 or self.shape[1] % self.block:
            return None
        rows, columns = self.shape
        codes = replace(numbers, shape=(rows, columns // 2), dtype=torch.uint8)
        shapes = {"largest": (rows, columns // self.block), TABLE: (16,)}
        packed = _packed("4bit", codes, self.shape, shapes, lambda: self.others(rows))
        if packed is None:
            return None
        return replace(packed, packing=replace(packed.packing, table=tuple(self._table().tolist())))

    def others(self, rows: int) -> dict[str, Tensor]:
        """What the codes are read with; `largest` in so many rows."""
        largest = self._part("absmax", self.blocks)
        if self.nested:
            groups = self._part("nested_absmax", -(-self.blocks // self.nested))
            values = self._part("nested_quant_map", 256)[largest.int()]
            groups = groups.repeat_interleave(self.nested)[: values.numel()]
            largest = values * groups + self.offset
        return {"largest": largest.float().reshape(rows, -1), TABLE: self._table()}

    def _table(self) -> Tensor:
        return self._part("quant_map", 16).float()

    def _part(self, kind: str, count: int) -> Tensor:
        """So many numbers that its codes are read with."""
        part = self.file._read(f"{self.name}.{kind}").flatten()
        if part.numel() != count:
            raise WeightsInvalid(
                f"{str(self.file.path)!r}: tensor {self.name}.{kind} has {part.numel():,} numbers "
                f"where {count:,} belong"
            )
        return part


def _packed(
    kind: str,
    codes: Numbers | None,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    others: Callable[[], dict[str, Tensor]] = dict,
) -> Packed | None:
    """A matrix [N, K] as it is kept; `shapes` are those of its other parts, in float32."""
    if codes is None or len(shape) != 2 or not all(shape):
        return None
    parts = {CODES: codes.shape, **(shapes or {})}
    dtypes = {part: codes.dtype if part == CODES else torch.float32 for part in parts}
    return Packed(Packing(kind, dtypes, parts, (shape[0], shape[1])), codes, others)


def _packed_float8(
    codes: Numbers | None,
    shape: tuple[int, ...],
    scale: Callable[[], Tensor] = lambda: torch.ones(1),
) -> Packed | None:
    """A matrix in 8-bit floats; `scale` reads what all of it or each row is multiplied by."""

    def others() -> dict[str, Tensor]:
        return {"scale": scale().float().flatten().expand(shape[0])}

    return _packed("float8", codes, shape, {"scale": shape[:1]}, others)


def import_gguf(file: Path) -> Any:
    """The package gguf, for `file`.

    Raises:
        KreaError: it is not there.
    """
    try:
        import gguf
    except ImportError as error:
        raise KreaError(
            f"{str(file)!r} needs the package gguf: pip install 'krea_local[gguf]'"
        ) from error
    return gguf


def _gguf(file: Path, model: ModelName) -> dict[str, Stored]:
    reader_of = import_gguf(file).GGUFReader
    if not file.is_file():
        raise WeightsNotFound(f"no file {str(file)!r}")
    try:
        reader = reader_of(file)
        field = reader.fields.get("general.architecture")
        architecture = str(field.contents()) if field else "no model"
        names = {str(tensor.name): tensor for tensor in reader.tensors}
        shapes = {name: _gguf_shape(reader, tensor) for name, tensor in names.items()}
    except Exception as error:  # a damaged file fails at it in any way
        size = file.stat().st_size
        raise WeightsInvalid(
            f"{str(file)!r} is truncated or not GGUF, as far as its {size:,} bytes go: {AGAIN}"
        ) from error
    if architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedModel(f"{str(file)!r} is a GGUF of {architecture!r}: read are {known}")
    prefix = _prefix(names, model)
    found = {}
    for name, tensor in names.items():
        if name.startswith(prefix):
            ours = _t5_name(name) if architecture.startswith("t5") else name[len(prefix) :]
            read = functools.partial(_read_gguf, file, tensor, shapes[name])
            kind, nbytes = tensor.tensor_type.name, int(tensor.n_bytes)
            packed = _packed_gguf(file, tensor, shapes[name])
            found[ours] = Stored(ours, shapes[name], kind, nbytes, read, packed=packed)
    return found


def _gguf_shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    # Programs that quantise image models note shapes here that ggml cannot express.
    noted = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
    return tuple(map(int, noted.contents() if noted else reversed(tensor.shape.tolist())))


def _read_gguf(file: Path, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    from gguf import dequantize

    try:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        return torch.tensor(numbers).reshape(shape)
    except Exception as error:  # a kind that the package does not know, bytes that are none
        raise WeightsInvalid(
            f"{str(file)!r}: tensor {tensor.name} is {tensor.tensor_type.name}: {error}"
        ) from error


def _packed_gguf(file: Path, tensor: Any, shape: tuple[int, ...]) -> Packed | None:
    kind, nbytes = tensor.tensor_type.name, int(tensor.n_bytes)
    size, block, _ = ggml.KINDS.get(kind, (1, 1, None))
    rows_of_blocks = len(shape) == 2 and all(shape) and shape[1] % size == 0
    if kind not in ggml.KINDS or not rows_of_blocks or nbytes * size != math.prod(shape) * block:
        return None
    codes = Numbers(file, int(tensor.data_offset), (shape[0], nbytes // shape[0]), torch.uint8)
    return _packed(kind, codes, shape)


def _t5_name(name: str) -> str:
    for pattern, ours in T5_NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def _prefix(names: Iterable[str], model: ModelName) -> str:
    names = list(names)
    known = PREFIXES[model]
    return next((one for one in known if any(name.startswith(one) for name in names)), "")
