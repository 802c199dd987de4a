"""How far 8 bits are from float32, on random numbers: `python -m benchmarks.rounding`.

Of one product, at the lengths of FLUX.1's rows, and of a forward pass of all its 57 blocks at small
widths: weights N(0, 0.02), times √(3072 / width), so that a layer does to its rows what it does at
full width. Three kinds of activations: `normal`; `outliers`, of which 1 % of the channels (after
every norm, in a forward pass) are 20 times as large; `balanced`, the same, with weights for them 20
times smaller, so that they matter as much as the others. Needs no GPU; the last line of the output
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

import torch
from torch import Tensor

from benchmarks.fidelity import EMULATED
from benchmarks.latency import positive
from krea_local.info import versions
from krea_local.kernels import PLAIN
from krea_local.kernels.fallback import int8_product
from krea_local.layers import Linear, float8_product
from krea_local.sampling import latent_ids
from krea_local.transformer import Conditioning, Config, FluxTransformer

KINDS = ("normal", "outliers", "balanced")
LENGTHS = (3072, 12288, 15360)
FACTOR = 20
ROWS, OUTPUTS = 256, 512
TEXT, SIDE = 64, 16  # tokens, the image's by side
CPU = torch.device("cpu")
Errors = dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--widths", type=positive, nargs="+", default=[256, 512], help="multiples of 128")
    add("--lengths", type=positive, nargs="+", default=LENGTHS, help="of the products' rows")
    add("--double", type=positive, default=19, help="double blocks")
    add("--single", type=positive, default=38, help="single blocks")
    options = parser.parse_args(arguments)
    if any(width % 128 for width in options.widths):
        parser.error("--widths: should be multiples of 128, which is a head")
    lines = []
    with torch.inference_mode():
        for kind in KINDS:
            for length in options.lengths:
                lines.append({"what": "product", "size": length, "kind": kind})
                lines[-1] |= product_errors(length, kind)
                print(described(lines[-1]), flush=True)
        for width in options.widths:
            config = Config(options.double, options.single, num_attention_heads=width // 128)
            for kind in KINDS:
                lines.append({"what": "forward", "size": width, "kind": kind})
                lines[-1] |= forward_errors(config, kind)
                print(described(lines[-1]), flush=True)
    blocks = {"double": options.double, "single": options.single}
    print(json.dumps({"errors": lines} | blocks | {"versions": versions()}))
    return 0


def product_errors(length: int, kind: str) -> Errors:
    """Of rows of `length` numbers."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, length, generator=random)
    weight = torch.randn(OUTPUTS, length, generator=random) * 0.02
    channels = outliers(length)
    if kind != "normal":
        x[:, channels] *= FACTOR
    if kind == "balanced":
        weight[:, channels] /= FACTOR
    exact = x.double() @ weight.double().t()
    bias = torch.zeros(OUTPUTS)

    def rounded(eight_bit: torch.dtype) -> Tensor:
        rows, columns = (PLAIN.quantize(one, eight_bit=eight_bit) for one in (x, weight))
        product = int8_product if eight_bit == torch.int8 else float8_product
        return product(rows, columns, bias)

    errors = {name: distance(rounded(eight_bit), exact) for name, eight_bit in EMULATED.items()}
    return errors | {"bfloat16": distance(x.bfloat16() @ weight.bfloat16().t(), exact)}


def forward_errors(config: Config, kind: str) -> Errors:
    """Of a transformer whose weights bfloat16 holds exactly; in 8 bits the rest is float32."""
    random = torch.Generator().manual_seed(0)
    model = FluxTransformer(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.normal_(0, 0.02 * math.sqrt(3072 / config.hidden_size), generator=random)
            module.bias.zero_()
    if kind == "balanced":
        channels = outliers(config.hidden_size)
        for owner, name in model.large_layers():
            if name in ("qkv", "0", "linear1"):  # those after a norm
                owner.get_submodule(name).get_parameter("weight")[:, channels] /= FACTOR
    model.bfloat16()
    rough = velocity(model, kind)
    model.float()
    exact = velocity(model, kind)
    errors = {
        name: distance(velocity(model.in_eight_bit(eight_bit, PLAIN, CPU), kind), exact)
        for name, eight_bit in EMULATED.items()
    }
    return errors | {"bfloat16": distance(rough, exact)}


def velocity(model: FluxTransformer, kind: str) -> Tensor:
    """Of random inputs, which bfloat16 holds exactly."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16().to(model.dtype)

    latents = draw(1, SIDE * SIDE, model.config.in_channels)
    conditioning = model.condition(
        draw(1, TEXT, model.config.joint_attention_dim),
        draw(1, model.config.pooled_projection_dim),
        timesteps=torch.tensor([0.5], dtype=model.dtype),
        guidance=torch.tensor([4.0]),
        txt_ids=torch.zeros(TEXT, 3),
        img_ids=latent_ids(rows=SIDE, columns=SIDE),
    )
    if kind != "normal":
        enlarge(conditioning, outliers(model.config.hidden_size))
    result: Tensor = model(latents, conditioning, 0)
    return result


def enlarge(conditioning: Conditioning, channels: Tensor) -> None:
    """Have the norms before a block's products make these channels larger, by way of modulation."""
    for table in (*conditioning.double, *conditioning.single):  # [T, 2, 6 or 3, D]
        for shift in range(0, table.shape[2], 3):
            table[:, :, shift, channels] *= FACTOR
            scale = table[:, :, shift + 1, channels]
            table[:, :, shift + 1, channels] = (1 + scale) * FACTOR - 1


def outliers(width: int) -> Tensor:
    """1 % of the channels."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(2))[: max(1, width // 100)]


def distance(one: Tensor, other: Tensor) -> float:
    """Relative L2 distance."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def described(line: dict[str, object]) -> str:
    """A line for people."""
    errors = "  ".join(f"{name} {line[name]:7.2%}" for name in (*EMULATED, "bfloat16"))
    return f"{line['what']:8} {line['size']:6}  {line['kind']:9} {errors}"


if __name__ == "__main__":
    sys.exit(main())
