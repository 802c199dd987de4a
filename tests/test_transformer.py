"""Our transformer against diffusers', on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from krea_local.kernels import PLAIN
from krea_local.sampling import latent_ids
from krea_local.tensor_names import pieces, to_original
from krea_local.transformer import Conditioning, Config, Execution, FluxTransformer

AXES = {16: (4, 6, 6), 24: (8, 8, 8), 32: (8, 12, 12)}


def make(
    *, dtype: torch.dtype = torch.float32, scale: float = 0.2, bias: float = 0.5, **config: Any
) -> tuple[FluxTransformer, FluxTransformer2DModel]:
    """A random transformer, ours and theirs."""
    values = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        **config,
    }
    values["axes_dims_rope"] = AXES[values["attention_head_dim"]]
    theirs = FluxTransformer2DModel(**values).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        size = scale if parameter.ndim > 1 else bias
        parameter.copy_(torch.randn(parameter.shape, generator=random) * size)
    theirs = theirs.to(dtype)
    return ours_of(theirs), theirs


def ours_of(theirs: FluxTransformer2DModel) -> FluxTransformer:
    config = Config.of(theirs.config)
    with torch.device("meta"):
        ours = FluxTransformer(config)
    table = pieces(config.num_layers, config.num_single_layers)
    ours.load_state_dict(to_original(theirs.state_dict(), table, config.hidden_size), assign=True)
    return ours.eval().requires_grad_(False)


@dataclasses.dataclass
class Inputs:
    """Of a call of `steps` steps."""

    batch: int = 2
    text: int = 5
    rows: int = 3
    columns: int = 4
    steps: int = 3
    guidance: float = 4.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        shape = (self.batch, self.rows * self.columns, 64)
        self.latents = torch.randn(shape, generator=random).to(self.dtype)
        self.prompt_embeds = torch.randn(1, self.text, 24, generator=random).to(self.dtype)
        self.pooled = torch.randn(1, 12, generator=random).to(self.dtype)
        # Their thousandfold, and that of the guidance, are exact in bfloat16 too: what is compared
        # in both is then the same function. (4.5 becomes 4.512, as everywhere that runs FLUX.1.)
        self.timesteps = torch.tensor([1, 0.5, 0.25])[: self.steps].to(self.dtype)
        self.positions = {
            "txt_ids": torch.zeros(self.text, 3),
            "img_ids": latent_ids(rows=self.rows, columns=self.columns),
        }

    def condition(self, model: FluxTransformer) -> Conditioning:
        return model.condition(
            self.prompt_embeds,
            self.pooled,
            timesteps=self.timesteps,
            guidance=torch.tensor([self.guidance]),
            **self.positions,
        )

    def reference(self, model: FluxTransformer2DModel, step: int) -> torch.Tensor:
        return model(
            hidden_states=self.latents,
            timestep=self.timesteps[step].expand(self.batch),
            guidance=torch.full((self.batch,), self.guidance),
            pooled_projections=self.pooled.repeat(self.batch, 1),
            encoder_hidden_states=self.prompt_embeds.repeat(self.batch, 1, 1),
            return_dict=False,
            **self.positions,
        )[0]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@settings(max_examples=25)
@given(
    config=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "num_single_layers": st.integers(1, 3),
            "attention_head_dim": st.sampled_from(sorted(AXES)),
            "num_attention_heads": st.integers(1, 4),
        }
    ),
    inputs=st.builds(
        Inputs,
        batch=st.integers(1, 4),
        text=st.integers(1, 9),
        rows=st.integers(1, 6),
        columns=st.integers(1, 6),
        steps=st.integers(1, 3),
        guidance=st.floats(1, 20),
    ),
    epilogue=st.booleans(),
)
def test_float32_equals_diffusers_within_rounding(
    config: dict[str, int], inputs: Inputs, epilogue: bool
) -> None:
    ours, theirs = make(**config)
    conditioning = inputs.condition(ours)
    for step in range(inputs.steps):
        found = ours(inputs.latents, conditioning, step, Execution(gelu_epilogue=epilogue))
        assert found.shape == inputs.latents.shape
        assert distance(found, inputs.reference(theirs, step)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_is_as_near_to_float32_as_diffusers_is(batch: int) -> None:
    config = {"num_attention_heads": 8, "num_layers": 3, "num_single_layers": 6, "scale": 0.06}
    _, exact = make(**config)
    ours, theirs = make(**config, dtype=torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in theirs.state_dict().items()})
    inputs = Inputs(batch=batch, text=32, rows=8, columns=8, dtype=torch.bfloat16)
    wanted = dataclasses.replace(inputs)
    wanted.latents, wanted.pooled = inputs.latents.float(), inputs.pooled.float()
    wanted.prompt_embeds, wanted.timesteps = inputs.prompt_embeds.float(), inputs.timesteps.float()
    conditioning = inputs.condition(ours)
    for step in range(inputs.steps):
        reference = wanted.reference(exact, step)
        error = distance(ours(inputs.latents, conditioning, step), reference)
        assert error < 1.1 * distance(inputs.reference(theirs, step), reference)


def test_an_image_of_a_batch_is_its_own_within_rounding() -> None:
    ours, _ = make()
    three = Inputs(batch=3)
    alone = Inputs(batch=1)
    conditioning = three.condition(ours)
    together = ours(three.latents, conditioning, 1)
    for i in range(3):
        alone.latents = three.latents[i : i + 1]
        assert distance(together[i : i + 1], ours(alone.latents, conditioning, 1)) < 1e-5


def test_the_same_twice_is_the_same_bit_for_bit_and_inputs_are_left_alone() -> None:
    ours, _ = make(dtype=torch.bfloat16)
    inputs = Inputs(dtype=torch.bfloat16)
    before = inputs.latents.clone()
    conditioning = inputs.condition(ours)
    copies = [table.clone() for table in (*conditioning.double, *conditioning.single)]
    first = ours(inputs.latents, conditioning, 1)
    ours(inputs.latents, conditioning, 2)
    assert torch.equal(first, ours(inputs.latents, conditioning, 1))
    assert torch.equal(before, inputs.latents)
    tables = (*conditioning.double, *conditioning.single)
    assert all(torch.equal(*pair) for pair in zip(copies, tables, strict=True))


class Recorder:
    """A cache that spares nothing, or what it is told."""

    def __init__(self, spared: torch.Tensor | None = None) -> None:
        self.spared = spared
        self.first: list[torch.Tensor] = []
        self.rest: list[torch.Tensor] = []

    def skip(self, step: int, first: torch.Tensor) -> torch.Tensor | None:
        self.first.append(first)
        return self.spared

    def keep(self, step: int, rest: torch.Tensor) -> None:
        self.rest.append(rest)


@pytest.mark.parametrize("eight_bit", [None, torch.float8_e4m3fn, torch.int8])
def test_a_cache_sees_what_blocks_add_and_can_spare_all_but_the_first(
    eight_bit: torch.dtype | None,
) -> None:
    ours, _ = make()
    if eight_bit is not None:
        ours = ours.in_eight_bit(eight_bit, PLAIN, torch.device("cpu"))
    inputs = Inputs()
    conditioning = inputs.condition(ours)
    wanted = ours(inputs.latents, conditioning, 1)
    watching = Recorder()
    assert torch.equal(ours(inputs.latents, conditioning, 1, cache=watching), wanted)
    (first,), (rest,) = watching.first, watching.rest
    assert first.shape == rest.shape == (2 * 12, 64)
    # Told what the other blocks will add, the first block alone gives the same.
    told = Recorder(rest)
    assert distance(ours(inputs.latents, conditioning, 1, cache=told), wanted) < 1e-5
    assert told.rest == []
    assert torch.equal(told.first[0], first)
    # Without the first block's part the sum would be another.
    assert distance(first, torch.zeros_like(first) + rest) > 0.1
    assert first.norm() > 0.1 * inputs.latents.norm()


def test_a_step_needs_no_modulation_weights() -> None:
    ours, _ = make()
    inputs = Inputs()
    conditioning = inputs.condition(ours)
    wanted = ours(inputs.latents, conditioning, 1)
    parameters = {id(p) for p in ours.parameters()}
    spared = {id(p) for layer in ours.modulations() for p in layer.parameters()}
    needed = {id(p) for module in ours.step_modules() for p in module.parameters()}
    assert spared | needed == parameters
    assert not spared & needed
    for layer in ours.modulations():
        layer.to("meta")  # gone
    assert torch.equal(ours(inputs.latents, conditioning, 1), wanted)


def test_modulation_is_27_percent_of_the_true_model() -> None:
    with torch.device("meta"):
        model = FluxTransformer(Config())
    total = sum(p.numel() for p in model.parameters())
    assert total == 11_901_408_320
    spared = sum(p.numel() for layer in model.modulations() for p in layer.parameters())
    assert spared / total == pytest.approx(0.273, abs=1e-3)
    assert 2 * (total - spared) / 2**30 < 16.15  # GiB in bfloat16, while denoising


@pytest.mark.parametrize("batch", [1, 4])
def test_the_true_model_takes_1024_pixels_and_a_table_of_80_megabytes(batch: int) -> None:
    with torch.device("meta"):  # shapes only
        model = FluxTransformer(Config()).to(torch.bfloat16).requires_grad_(False)
        halves = [
            model.in_eight_bit(eight_bit, PLAIN, torch.device("meta"))
            for eight_bit in (torch.float8_e4m3fn, torch.int8)
        ]
        conditioning = model.condition(
            torch.empty(1, 512, 4096, dtype=torch.bfloat16),
            torch.empty(1, 768, dtype=torch.bfloat16),
            timesteps=torch.empty(28),
            guidance=torch.empty(1),
            txt_ids=torch.empty(512, 3),
            img_ids=torch.empty(4096, 3),
        )
        latents = torch.empty(batch, 4096, 64, dtype=torch.bfloat16)
        for one in (model, *halves):
            assert one(latents, conditioning, 27).shape == latents.shape
    tables = (*conditioning.double, *conditioning.single, conditioning.final)
    assert sum(table.nbytes for table in tables) == pytest.approx(79e6, rel=0.01)
    for half in halves:
        weights = {id(p): p.nbytes for module in half.step_modules() for p in module.parameters()}
        assert sum(weights.values()) / 2**30 == pytest.approx(8.1, abs=0.05)


@pytest.mark.parametrize(
    ("eight_bit", "product_error", "forward_error"),
    [
        # 3 bits of fraction: 2.6 % of each factor, 3.7 % of a product.
        (torch.float8_e4m3fn, (0.03, 0.04), (0.03, 0.08)),
        # Of normal numbers, the largest of 256 is 2.8 times their size, of which 127 steps are
        # rounded by 0.29 steps: 0.64 % of each factor, 0.9 % of a product.
        (torch.int8, (0.008, 0.011), (0.008, 0.03)),
    ],
)
def test_8_bits_round_each_product_by_some_percent_and_share_all_else(
    eight_bit: torch.dtype, product_error: tuple[float, float], forward_error: tuple[float, float]
) -> None:
    ours, _ = make(num_attention_heads=8, scale=0.06)
    inputs = Inputs(rows=8, columns=8)
    half = ours.in_eight_bit(eight_bit, PLAIN, torch.device("cpu"))
    conditioning = inputs.condition(half)
    error = distance(half(inputs.latents, conditioning, 1), ours(inputs.latents, conditioning, 1))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    product = half.single_blocks[0].linear1.project(PLAIN.quantize(x, eight_bit=eight_bit))
    same = half(inputs.latents, conditioning, 1, Execution(gelu_epilogue=True))  # has no effect
    assert torch.equal(same, half(inputs.latents, conditioning, 1))
    least, most = product_error
    assert least < distance(product, ours.single_blocks[0].linear1.project(x)) < most
    least, most = forward_error  # some products in a row
    assert least < error < most
    assert half.img_in.weight is ours.img_in.weight
    assert half.double_blocks[0].img_mod.lin.weight is ours.double_blocks[0].img_mod.lin.weight
    large = list(half.large_layers())
    assert len(large) == 2 * 8 + 2 * 2
    for owner, name in large:
        assert owner.get_submodule(name).weight.dtype == eight_bit
    dtypes = {tensor.dtype for tensor in half.state_dict().values()}
    assert dtypes == {torch.float32, eight_bit}
    # The original is untouched.
    assert ours.eight_bit is None
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_every_weight_matters() -> None:
    ours, _ = make(num_layers=1, num_single_layers=1)
    inputs = Inputs(steps=1)
    wanted = ours(inputs.latents, inputs.condition(ours), 0)
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        changed = ours(inputs.latents, inputs.condition(ours), 0)
        parameter.copy_(kept)
        # The text's way ends with the last block's attention; a key's bias moves all scores alike.
        assert distance(changed, wanted) > 1e-6, name
