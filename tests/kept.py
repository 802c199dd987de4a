"""Files of weights in the formats that people have: how numbers are kept, and what they stand for.

Each way takes tensors as in bfloat16 and returns those of the file, and what they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
LARGEST = 448.0  # of float8_e4m3


def is_large(name: str, tensor: Tensor) -> bool:
    """What programs that make small files round: the matrices of the blocks."""
    return tensor.ndim == 2 and "block" in name and tensor.shape[1] % 32 == 0


def as_float8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    stored = {
        name: tensor.to(torch.float8_e4m3fn) if is_large(name, tensor) else tensor
        for name, tensor in tensors.items()
    }
    return stored, {name: tensor.float() for name, tensor in stored.items()}


def scaled(
    tensors: Tensors, suffix: str, *, by_row: bool = False, shape: tuple[int, ...] = ()
) -> tuple[Tensors, Tensors]:
    stored, wanted = {}, {}
    for name, tensor in tensors.items():
        stored[name], wanted[name] = tensor, tensor.float()
        if is_large(name, tensor):
            most = tensor.float().abs().amax(1) if by_row else tensor.float().abs().max()
            scale = most / LARGEST
            column = scale[:, None] if by_row else scale
            stored[name] = (tensor.float() / column).to(torch.float8_e4m3fn)
            wanted[name] = stored[name].float() * column
            scale = scale if by_row else scale.reshape(shape)
            stored[name.replace("weight", suffix)] = scale
    return stored, wanted


def as_scaled_fp8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    stored, wanted = scaled(tensors, "scale_weight", shape=(1,))
    inputs = {
        name.replace("scale_weight", "scale_input"): torch.full((1,), 0.5)
        for name in stored
        if name.endswith("scale_weight")
    }
    return stored | inputs | {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, wanted


def as_comfy_quant(tensors: Tensors) -> tuple[Tensors, Tensors]:
    stored, wanted = scaled(tensors, "weight_scale")
    says = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    marks = {
        name.replace("weight_scale", "comfy_quant"): says.clone()
        for name in stored
        if name.endswith("weight_scale")
    }
    return stored | marks, wanted


def as_rows(tensors: Tensors) -> tuple[Tensors, Tensors]:
    return scaled(tensors, "weight_scale", by_row=True)


NF4 = torch.tensor(
    [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
    ]
)


def as_nf4(tensors: Tensors, *, nested: bool = False) -> tuple[Tensors, Tensors]:
    """As bitsandbytes keeps them: pairs in a byte, the first one in its upper half."""
    stored, wanted = {}, {}
    for name, tensor in tensors.items():
        stored[name], wanted[name] = tensor, tensor.float()
        if not is_large(name, tensor):
            continue
        blocks = tensor.float().reshape(-1, 64)
        largest = blocks.abs().amax(1)
        codes = (blocks / largest[:, None]).unsqueeze(-1).sub(NF4).abs().argmin(-1)
        pairs = codes.reshape(-1, 2).to(torch.uint8)
        stored[name] = (pairs[:, :1] << 4) | pairs[:, 1:]
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        state["shape"] = list(tensor.shape)
        absmax = largest
        if nested:
            levels = torch.linspace(-1, 1, 256)
            offset = float(largest.mean())
            groups = (largest - offset).split(256)
            tops = torch.stack([group.abs().max() for group in groups])
            spread = tops.repeat_interleave(256)[: len(largest)]
            small = ((largest - offset) / spread).unsqueeze(-1).sub(levels).abs().argmin(-1)
            absmax = small.to(torch.uint8)
            largest = levels[small] * spread + offset
            stored[f"{name}.nested_absmax"] = tops
            stored[f"{name}.nested_quant_map"] = levels.clone()
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        stored[f"{name}.absmax"] = absmax
        stored[f"{name}.quant_map"] = NF4.clone()
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = text
        wanted[name] = (NF4[codes] * largest[:, None]).reshape(tensor.shape)
    return stored, wanted


def as_nested_nf4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    return as_nf4(tensors, nested=True)


def as_is(tensors: Tensors) -> tuple[Tensors, Tensors]:
    return dict(tensors), dict(tensors)


Keeping = Callable[[Tensors], tuple[Tensors, Tensors]]
KEPT = [as_is, as_float8, as_scaled_fp8, as_comfy_quant, as_rows, as_nf4, as_nested_nf4]


def write_gguf(
    file: Path,
    architecture: str,
    tensors: Tensors,
    kind: gguf.GGMLQuantizationType,
    name_of: Callable[[str], str] = str,
) -> Tensors:
    """Write a file as llama.cpp and its kin do; returns what its tensors stand for."""
    writer = gguf.GGUFWriter(file, architecture)
    wanted = {}
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        here = kind if is_large(name, tensor) else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(numbers, here)
        writer.add_tensor(name_of(name), data, raw_dtype=here)
        wanted[name] = torch.from_numpy(gguf.dequantize(data, here).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted
