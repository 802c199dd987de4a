"""FLUX.1's tensors under their original names, where projections are fused, and under diffusers'.

The original checkpoint (flux1-krea-dev.safetensors) keeps query, key and value in one matrix, in
the single blocks with the MLP's first matrix too; diffusers splits them. The numbers are the same,
so both ways are exact. Knows nothing of files or devices.

Source: black-forest-labs/flux, `model.py`; diffusers, `scripts/convert_flux_to_diffusers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows of an original tensor and where diffusers keeps them.

    Attributes:
        original: the original tensor's name.
        diffusers: diffusers' name.
        rows: how many hidden sizes D of rows; 0 for all of the tensor.
        start: the first of them in the original tensor, in D.
        diffusers_start: the first of them in diffusers' tensor, in D.
    """

    original: str
    diffusers: str
    rows: int = 0
    start: int = 0
    diffusers_start: int = 0

    def of_original(self, tensor: Tensor, hidden_size: int) -> Tensor:
        """The view of the original tensor that these rows are."""
        return self._view(tensor, self.start * hidden_size, hidden_size)

    def of_diffusers(self, tensor: Tensor, hidden_size: int) -> Tensor:
        """The same for diffusers' tensor."""
        return self._view(tensor, self.diffusers_start * hidden_size, hidden_size)

    def _view(self, tensor: Tensor, start: int, hidden_size: int) -> Tensor:
        return tensor[start : start + self.rows * hidden_size] if self.rows else tensor


def pieces(num_layers: int, num_single_layers: int) -> list[Piece]:
    """Every tensor of a transformer with so many double and single blocks."""
    found: list[Piece] = []

    def linear(original: str, *parts: tuple[str, int]) -> None:
        for kind in ("weight", "bias"):
            start = 0
            for name, rows in parts:
                found.append(Piece(f"{original}.{kind}", f"{name}.{kind}", rows, start))
                start += rows

    for original, name in (
        ("time_in", "timestep_embedder"),
        ("guidance_in", "guidance_embedder"),
        ("vector_in", "text_embedder"),
    ):
        linear(f"{original}.in_layer", (f"time_text_embed.{name}.linear_1", 0))
        linear(f"{original}.out_layer", (f"time_text_embed.{name}.linear_2", 0))
    linear("img_in", ("x_embedder", 0))
    linear("txt_in", ("context_embedder", 0))
    for i in range(num_layers):
        here, there = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, norm, mlp, out, query, key, value, prefix in (
            ("img", "norm1", "ff", "to_out.0", "to_q", "to_k", "to_v", ""),
            (
                *("txt", "norm1_context", "ff_context", "to_add_out"),
                *("add_q_proj", "add_k_proj", "add_v_proj", "added_"),
            ),
        ):
            linear(f"{here}.{stream}_mod.lin", (f"{there}.{norm}.linear", 0))
            linear(
                f"{here}.{stream}_attn.qkv",
                *((f"{there}.attn.{name}", 1) for name in (query, key, value)),
            )
            for kind in ("query", "key"):
                found.append(
                    Piece(
                        f"{here}.{stream}_attn.norm.{kind}_norm.scale",
                        f"{there}.attn.norm_{prefix}{kind[0]}.weight",
                    )
                )
            linear(f"{here}.{stream}_attn.proj", (f"{there}.attn.{out}", 0))
            linear(f"{here}.{stream}_mlp.0", (f"{there}.{mlp}.net.0.proj", 0))
            linear(f"{here}.{stream}_mlp.2", (f"{there}.{mlp}.net.2", 0))
    for i in range(num_single_layers):
        here, there = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        linear(f"{here}.modulation.lin", (f"{there}.norm.linear", 0))
        linear(
            f"{here}.linear1",
            *((f"{there}.attn.{name}", 1) for name in ("to_q", "to_k", "to_v")),
            (f"{there}.proj_mlp", 4),
        )
        linear(f"{here}.linear2", (f"{there}.proj_out", 0))
        for kind in ("query", "key"):
            found.append(
                Piece(f"{here}.norm.{kind}_norm.scale", f"{there}.attn.norm_{kind[0]}.weight")
            )
    linear("final_layer.linear", ("proj_out", 0))
    for kind in ("weight", "bias"):  # diffusers has scale before shift, the original after it
        for start, other in ((0, 1), (1, 0)):
            name = f"final_layer.adaLN_modulation.1.{kind}"
            found.append(Piece(name, f"norm_out.linear.{kind}", 1, start, other))
    return found


def to_original(
    tensors: Mapping[str, Tensor], table: Iterable[Piece], hidden_size: int
) -> dict[str, Tensor]:
    """Tensors under diffusers' names → under the original names, fused."""
    by_original: dict[str, list[Piece]] = {}
    for piece in table:
        by_original.setdefault(piece.original, []).append(piece)
    return {
        name: torch.cat([p.of_diffusers(tensors[p.diffusers], hidden_size) for p in parts])
        if len(parts) > 1
        else tensors[parts[0].diffusers]
        for name, parts in by_original.items()
    }


def to_diffusers(
    tensors: Mapping[str, Tensor], table: Iterable[Piece], hidden_size: int
) -> dict[str, Tensor]:
    """Tensors under the original names → under diffusers' names; views, where rows adjoin."""
    by_name: dict[str, list[Piece]] = {}
    for piece in table:
        by_name.setdefault(piece.diffusers, []).append(piece)
    found = {}
    for name, parts in by_name.items():
        views = [
            p.of_original(tensors[p.original], hidden_size)
            for p in sorted(parts, key=lambda piece: piece.diffusers_start)
        ]
        found[name] = torch.cat(views) if len(views) > 1 else views[0]
    return found
