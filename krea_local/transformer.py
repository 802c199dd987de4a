"""FLUX.1's flow transformer, for inference only, in the original checkpoint's fused layout.

What does not change from step to step (text embedding, rotary angles, the modulation of every block
at every step) is computed once an image, by `condition`; a step is then `forward`. Text and image
tokens share one buffer of rows through all blocks, and every residual sum is fused with the norm
that follows. Takes any size and batch without set-up. Knows nothing of files, prompts or levels.

Oracle: diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea_local import attention
from krea_local.kernels import PLAIN, Kernels, Layout, Rows, part
from krea_local.kernels.fallback import rows_of
from krea_local.layers import EightBitLinear, Linear, LowRank
from krea_local.packed import PackedLinear, Packing, packed_layers

SINUSOIDS = 256
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class Config:
    """The shape of a transformer; names and defaults of diffusers' config.json."""

    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    in_channels: int = 64
    out_channels: int | None = None
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Config:
        """From diffusers' config, whose other keys mean nothing here."""
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        if "axes_dims_rope" in known:
            known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        return cls(**known)

    @property
    def hidden_size(self) -> int:
        """Numbers a token, D: 3072 in FLUX.1."""
        return self.num_attention_heads * self.attention_head_dim


class Group(Protocol):
    """Processes that share the tokens of one image; see `cluster`."""

    def shard(self, tokens: Tensor) -> Tensor:
        """This process's part [B, n, …] of all tokens [B, N, …]."""

    def scatter_heads(
        self, query: Tensor, key: Tensor, value: Tensor, totals: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, H, d] of this process's tokens → [B, N, h, d] of its heads, three times.

        `totals`: how many tokens of text and of image there are in all, N together.
        """

    def gather_heads(self, tokens: Tensor, totals: tuple[int, ...]) -> Tensor:
        """The way back: [B, N, h, d] → [B, n, H, d]."""

    def gather(self, tokens: Tensor, total: int) -> Tensor:
        """All `total` tokens [B, N, …] from every process's part [B, n, …]."""

    def sum(self, number: Tensor) -> Tensor:
        """The sum over processes."""


class Streaming(Protocol):
    """Who has the blocks' weights where they are computed; see `streaming`."""

    def block(self, i: int) -> AbstractContextManager[None]:
        """Have those of block `i` there inside."""


class Cache(Protocol):
    """What may spare most of a step; see `skipping`."""

    def skip(self, step: int, first: Tensor) -> Tensor | None:
        """What all further blocks would add, if that need not be computed at this step.

        Args:
            step: from 0.
            first: what the first block added to the image's rows [B · S, D].
        """

    def keep(self, step: int, rest: Tensor) -> None:
        """Learn what all further blocks did add [B · S, D]."""


@dataclass(frozen=True)
class Execution:
    """How a step is carried out; the picture is the same but for rounding.

    Attributes:
        kernels: the fused operations.
        attention: one implementation of it.
        gelu_epilogue: in double blocks, GELU within the matrix product before it.
        group: other processes that have a part of the tokens each.
        streaming: what brings each block's weights; None where they are.
    """

    kernels: Kernels = PLAIN
    attention: attention.Attention = attention.DEFAULT
    gelu_epilogue: bool = False
    group: Group | None = None
    streaming: Streaming | None = None


@dataclass(frozen=True)
class Conditioning:
    """What a call's steps have in common.

    Attributes:
        context: the prompt's embedding [L, D], or this process's part of it.
        text: L, of all processes.
        cos: of the rotary angles, float32 [L + S, d / 2].
        sin: likewise.
        double: modulation of the double blocks, each [T, 2, 6, D]: of text and image, each with
            shift, scale and gate before attention, then before the MLP.
        single: of the single blocks, each [T, 2, 3, D].
        final: shift and scale of the last norm, [T, 2, 2, D].
    """

    context: Tensor
    text: int
    cos: Tensor
    sin: Tensor
    double: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: Tensor


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class _QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = _Scale(width), _Scale(width)


class _Modulation(nn.Module):
    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.lin = Linear(width, vectors * width)


class _Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width)
        self.norm = _QKNorm(config.attention_head_dim)
        self.proj = Linear(width, width)


class _Embedder(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = Linear(inputs, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return embedded


class _DoubleBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", _Modulation(width, 6))
            self.add_module(f"{stream}_attn", _Attention(config))
            mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU("tanh"), Linear(4 * width, width))
            self.add_module(f"{stream}_mlp", mlp)
        self.img_mod: _Modulation
        self.txt_mod: _Modulation
        self.img_attn: _Attention
        self.txt_attn: _Attention
        self.img_mlp: nn.Sequential
        self.txt_mlp: nn.Sequential


class _SingleBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.modulation = _Modulation(width, 3)
        self.linear1 = Linear(width, 7 * width)
        self.linear2 = Linear(5 * width, width)
        self.norm = _QKNorm(config.attention_head_dim)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))
        self.linear = Linear(width, outputs)

    @property
    def modulation(self) -> Linear:
        layer = self.adaLN_modulation[1]
        assert isinstance(layer, Linear)
        return layer


class FluxTransformer(nn.Module):
    """The transformer; its state dict has the original checkpoint's names and shapes.

    Attributes:
        eight_bit: what its large layers multiply, float8_e4m3fn or int8; None for its own numbers.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.eight_bit: torch.dtype | None = None
        self._kernels = PLAIN
        width = config.hidden_size
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.joint_attention_dim, width)
        self.time_in = _Embedder(SINUSOIDS, width)
        self.guidance_in = _Embedder(SINUSOIDS, width)
        self.vector_in = _Embedder(config.pooled_projection_dim, width)
        self.double_blocks = nn.ModuleList(_DoubleBlock(config) for _ in range(config.num_layers))
        self.single_blocks = nn.ModuleList(
            _SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.final_layer = _FinalLayer(width, config.out_channels or config.in_channels)

    @property
    def _doubles(self) -> list[_DoubleBlock]:
        return cast("list[_DoubleBlock]", list(self.double_blocks))

    @property
    def _singles(self) -> list[_SingleBlock]:
        return cast("list[_SingleBlock]", list(self.single_blocks))

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.img_in.weight.dtype

    def modulations(self) -> list[Linear]:
        """The layers that only `condition` needs: 27 % of FLUX.1's weights, 6.5 GB in bfloat16."""
        found = [block.img_mod.lin for block in self._doubles]
        found += [block.txt_mod.lin for block in self._doubles]
        found += [block.modulation.lin for block in self._singles]
        return [*found, self.final_layer.modulation]

    def adapt(self, low_rank: Mapping[str, LowRank]) -> None:
        """Have this added to linear layers, by name, and nothing to the others."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.low_rank = low_rank.get(name)

    def step_modules(self) -> list[nn.Module]:
        """The modules with weights that `forward` needs, all but `modulations`."""
        spared = {id(layer) for layer in self.modulations()}
        return [
            module
            for module in self.modules()
            if id(module) not in spared and not list(module.children())
        ]

    def step_blocks(self) -> list[list[nn.Module]]:
        """Those of `step_modules` that are in blocks, by block, in the order of their use."""
        wanted = {id(module) for module in self.step_modules()}
        blocks = (*self.double_blocks, *self.single_blocks)
        return [[one for one in block.modules() if id(one) in wanted] for block in blocks]

    def large_layers(self) -> Iterator[tuple[nn.Module, str]]:
        """The matrix products inside the blocks, as (owner, attribute)."""
        for block in self._doubles:
            for attn in (block.img_attn, block.txt_attn):
                yield attn, "qkv"
                yield attn, "proj"
            for mlp in (block.img_mlp, block.txt_mlp):
                yield mlp, "0"
                yield mlp, "2"
        for single in self._singles:
            yield single, "linear1"
            yield single, "linear2"

    def layer_names(self) -> tuple[set[str], set[str]]:
        """The names of `large_layers` and of `modulations`."""
        names = {id(module): name for name, module in self.named_modules()}
        large = {names[id(owner.get_submodule(name))] for owner, name in self.large_layers()}
        return large, {names[id(layer)] for layer in self.modulations()}

    def pack(self, packings: Mapping[str, Packing], dtype: torch.dtype) -> None:
        """Make room for packed weights in linear layers, by name, instead of wide ones.

        Args:
            packings: of some layers that are on the device "meta".
            dtype: that they are widened to.
        """
        for name, packing in packings.items():
            with torch.device("meta"):
                self.set_submodule(name, PackedLinear(packing, bias=True, dtype=dtype))

    def use(self, kernels: Kernels) -> None:
        """Have packed layers widened by these kernels from now on."""
        if kernels is not self._kernels:
            self._kernels = kernels
            for layer in packed_layers(self):
                layer.kernels = kernels

    @property
    def is_kept_in_float8(self) -> bool:
        """Whether its large layers have no other numbers than 8-bit floats (e4m3)."""
        return all(
            isinstance(layer, PackedLinear) and layer.is_float8
            for layer in (owner.get_submodule(name) for owner, name in self.large_layers())
        )

    def in_eight_bit(
        self, eight_bit: torch.dtype, kernels: Kernels, device: torch.device
    ) -> FluxTransformer:
        """The same transformer with its large layers in 8 bits; all else is shared.

        Args:
            eight_bit: float8_e4m3fn or int8.
            kernels: who quantises, and multiplies integers.
            device: where to quantise; each layer stays where it is.
        """
        with torch.device("meta"):
            other = FluxTransformer(self.config)
        _share(self, other)
        large = list(zip(self.large_layers(), other.large_layers(), strict=True))
        for (owner, name), (new_owner, _) in large:
            layer = owner.get_submodule(name)
            assert isinstance(layer, Linear)
            setattr(new_owner, name, EightBitLinear.of(layer, eight_bit, kernels, device))
        other.eight_bit = eight_bit
        return other.eval().requires_grad_(False)

    def condition(
        self,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        *,
        timesteps: Tensor,
        guidance: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
        group: Group | None = None,
    ) -> Conditioning:
        """Compute what all steps of a call share: of one prompt, at all noise levels at once.

        Args:
            prompt_embeds: [1, L, 4096].
            pooled_prompt_embeds: [1, 768].
            timesteps: [T] noise levels in [0, 1], as `sampling.model_timestep` rounds them.
            guidance: float32 [1].
            txt_ids: rotary positions [L, 3].
            img_ids: [S, 3].
            group: processes that share the tokens.
        """
        device, dtype = prompt_embeds.device, self.dtype
        time = self.time_in(_sinusoids(timesteps.to(dtype) * 1000).to(dtype))
        strength = self.guidance_in(_sinusoids(guidance.to(dtype) * 1000).to(dtype))
        activated = F.silu(time + strength + self.vector_in(pooled_prompt_embeds))  # [T, D]

        def vectors(layer: Linear, count: int) -> Tensor:
            # The weights may be on the CPU; `memory.pin` has made their copies asynchronous.
            weight, bias = layer.weight_on(device), layer.bias.to(device, non_blocking=True)
            table: Tensor = layer.multiply(activated, weight, bias).unflatten(1, (1, count, -1))
            return table

        double = tuple(
            torch.cat([vectors(block.txt_mod.lin, 6), vectors(block.img_mod.lin, 6)], dim=1)
            for block in self._doubles
        )
        single = tuple(
            vectors(block.modulation.lin, 3).repeat(1, 2, 1, 1) for block in self._singles
        )
        final = vectors(self.final_layer.modulation, 2).repeat(1, 2, 1, 1)
        text = prompt_embeds.shape[1]
        if group is not None:
            prompt_embeds = group.shard(prompt_embeds)
            txt_ids, img_ids = (group.shard(ids[None])[0] for ids in (txt_ids, img_ids))
        cos, sin = _rotary(torch.cat([txt_ids, img_ids]), self.config.axes_dims_rope)
        context = self.txt_in(prompt_embeds[0])
        return Conditioning(context, text, cos, sin, double, single, final)

    def forward(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        step: int,
        execution: Execution = Execution(),
        cache: Cache | None = None,
    ) -> Tensor:
        """The velocity [B, S, 64] at latents [B, S, 64] and step `step`, from 0.

        Waits for nothing, unless `cache` does.
        """
        group, ops = execution.group, execution.kernels
        total = latents.shape[1]
        if group is not None:
            latents = group.shard(latents)
        layout = Layout(latents.shape[0], conditioning.context.shape[0], latents.shape[1])
        image = slice(layout.text_rows, None)
        x = latents.new_empty(layout.rows, self.config.hidden_size)
        x[: layout.text_rows].unflatten(0, (layout.batch, -1)).copy_(conditioning.context)
        self.img_in.project(latents.flatten(0, 1), out=x[image])

        # What follows a block is the norm of the next one, fused with the block's residual sum.
        double = [table[step].unbind(1) for table in conditioning.double]
        single = [table[step].unbind(1) for table in conditioning.single]
        final = conditioning.final[step].unbind(1)
        norms = [(vectors[0], vectors[1]) for vectors in (*double, *single, final)]
        run = _Run(self, execution, layout, conditioning, totals=(conditioning.text, total))
        h = ops.norm_modulate(x, *norms[0], text_rows=layout.text_rows, eight_bit=self.eight_bit)
        start = x[image].clone() if cache else x
        rest = None
        for i, block in enumerate((*self.double_blocks, *self.single_blocks)):
            last = i + 2 == len(norms)
            shift, scale = norms[i + 1]
            after = (shift, scale, None if last else self.eight_bit)
            with execution.streaming.block(i) if execution.streaming else nullcontext():
                if i < len(double):
                    h = run.double(block, x, h, double[i], after)
                else:
                    h = run.single(block, x, h, single[i - len(double)], after)
            if cache and i == 0:
                rest = cache.skip(step, x[image] - start)
                if rest is not None:
                    x[image] += rest
                    h = ops.norm_modulate(x, *final, text_rows=layout.text_rows)
                    break
                start = x[image].clone()
        if cache and rest is None:
            cache.keep(step, x[image] - start)
        velocity = self.final_layer.linear.project(part(h, image))
        velocity = velocity.unflatten(0, (layout.batch, -1))
        return velocity if group is None else group.gather(velocity, total)


class _Run:
    """One step's blocks."""

    def __init__(
        self,
        model: FluxTransformer,
        execution: Execution,
        layout: Layout,
        conditioning: Conditioning,
        *,
        totals: tuple[int, int],
    ) -> None:
        self.totals = totals
        self.ops = execution.kernels
        self.execution = execution
        self.layout = layout
        self.text_rows = layout.text_rows
        self.streams = (slice(0, layout.text_rows), slice(layout.text_rows, None))
        self.cos, self.sin = conditioning.cos, conditioning.sin
        self.eight_bit = model.eight_bit
        self.epilogue = execution.gelu_epilogue and model.eight_bit is None

    def double(
        self,
        block: Any,
        x: Tensor,
        h: Rows,
        vectors: tuple[Tensor, ...],
        after: tuple[Tensor, Tensor, torch.dtype | None],
    ) -> Rows:
        """A double block: text and image have weights of their own, and attend together.

        Args:
            block: a _DoubleBlock.
            x: [R, D], the residual stream, changed in place.
            h: x, normed and modulated.
            vectors: [2, D] each: shift, scale, gate; shift, scale, gate.
            after: shift and scale of the norm after this block, and its result's 8 bits, if any.

        Returns:
            x, normed and modulated for the next block.
        """
        _, _, gate, shift, scale, mlp_gate = vectors
        attns, mlps = (block.txt_attn, block.img_attn), (block.txt_mlp, block.img_mlp)
        qkv = x.new_empty(x.shape[0], 3 * x.shape[1])
        for attn, rows in zip(attns, self.streams, strict=True):
            attn.qkv.project(part(h, rows), out=qkv[rows])
        joined = self.attend(qkv, block.txt_attn.norm, block.img_attn.norm)
        attended: Rows = joined
        if self.eight_bit is not None:
            attended = self.ops.quantize(joined, eight_bit=self.eight_bit)
        y = torch.empty_like(x)
        for attn, rows in zip(attns, self.streams, strict=True):
            attn.proj.project(part(attended, rows), out=y[rows])
        h = self.ops.residual_norm_modulate(
            x, y, gate, shift, scale, text_rows=self.text_rows, eight_bit=self.eight_bit
        )
        hidden = x.new_empty(x.shape[0], 4 * x.shape[1])
        for mlp, rows in zip(mlps, self.streams, strict=True):
            project = mlp[0].project_gelu if self.epilogue else mlp[0].project
            project(part(h, rows), out=hidden[rows])
        active: Rows = hidden
        if not self.epilogue:
            active = self.ops.gelu(hidden, eight_bit=self.eight_bit)
        for mlp, rows in zip(mlps, self.streams, strict=True):
            mlp[2].project(part(active, rows), out=y[rows])
        return self._close(x, y, mlp_gate, after)

    def single(
        self,
        block: Any,
        x: Tensor,
        h: Rows,
        vectors: tuple[Tensor, ...],
        after: tuple[Tensor, Tensor, torch.dtype | None],
    ) -> Rows:
        """A single block: the same weights for text and image, attention beside the MLP.

        Arguments and result as for `double`, with `vectors` of shift, scale, gate.
        """
        width = x.shape[1]
        fused = block.linear1.project(h)  # [R, 7 D]
        joined = self.attend(fused[:, : 3 * width], block.norm, block.norm)
        # Not in the product's epilogue: cuBLASLt would have to write beside attention's result, and
        # torch uses it for contiguous results only.
        active = self.ops.gelu(fused[:, 3 * width :], joined, eight_bit=self.eight_bit)
        y = block.linear2.project(active)
        return self._close(x, y, vectors[2], after)

    def attend(self, qkv: Tensor, text_norm: _QKNorm, image_norm: _QKNorm) -> Tensor:
        """Queries, keys and values [R, 3 D] → [R, D]."""
        group = self.execution.group
        norms = (text_norm, image_norm)
        heads = self.ops.qk_norm_rotary(
            qkv,
            tuple(norm.query_norm.scale for norm in norms),
            tuple(norm.key_norm.scale for norm in norms),
            self.cos,
            self.sin,
            layout=self.layout,
        )
        if group is not None:
            joined = self.execution.attention.run(*group.scatter_heads(*heads, self.totals))
            joined = group.gather_heads(joined, self.totals)
        else:
            joined = self.execution.attention.run(*heads)
        return rows_of(joined.flatten(2), self.layout)

    def _close(
        self, x: Tensor, y: Tensor, gate: Tensor, after: tuple[Tensor, Tensor, torch.dtype | None]
    ) -> Rows:
        shift, scale, eight_bit = after
        return self.ops.residual_norm_modulate(
            x, y, gate, shift, scale, text_rows=self.text_rows, eight_bit=eight_bit
        )


def _share(source: nn.Module, target: nn.Module) -> None:
    """Make the parameters of `target` those of `source`, and what is added to them."""
    for name, module in source.named_modules():
        if isinstance(module, PackedLinear):
            target.set_submodule(name, module.twin())
            continue
        other = target.get_submodule(name)
        if isinstance(module, Linear) and isinstance(other, Linear):
            other.low_rank = module.low_rank
        for key, parameter in module._parameters.items():
            other._parameters[key] = parameter


def _sinusoids(numbers: Tensor) -> Tensor:
    """[T] → float32 [T, 256]: cosines, then sines, of 128 frequencies from 1 down to 1 / 10000."""
    half = SINUSOIDS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=numbers.device) / half
    angles = numbers.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _rotary(ids: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Positions [N, 3] → cosines and sines, float32 [N, d / 2], of angles computed in float64."""
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[:, axis, None].double() / ROTARY_BASE**exponents)
    joined = torch.cat(angles, dim=1)
    return joined.cos().float(), joined.sin().float()
