from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from krea_local.tensor_names import pieces, to_diffusers, to_original
from krea_local.transformer import Config, FluxTransformer

SMALL = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


@settings(max_examples=5)
@given(layers=st.integers(1, 3), single=st.integers(1, 3))
def test_the_way_there_and_back_is_exact(layers: int, single: int) -> None:
    model = FluxTransformer2DModel(num_layers=layers, num_single_layers=single, **SMALL)
    theirs = model.state_dict()
    table = pieces(layers, single)
    original = to_original(theirs, table, 32)
    with torch.device("meta"):
        ours = FluxTransformer(Config.of(model.config)).state_dict()
    assert {k: v.shape for k, v in original.items()} == {k: v.shape for k, v in ours.items()}
    back = to_diffusers(original, table, 32)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_diffusers_own_converter_reads_the_original_names_alike() -> None:
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers,
    )

    # That converter knows 12 heads of 256 numbers and an MLP of 4 times that, so: true width, thin
    # elsewhere. Numbers that tell every row from every other.
    config = Config(num_layers=1, num_single_layers=1, joint_attention_dim=8)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in FluxTransformer(config).state_dict().items()}
    original = {}
    for i, (name, shape) in enumerate(shapes.items()):
        rows = torch.arange(shape[0], dtype=torch.float32) + 1e5 * i
        original[name] = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    ours = to_diffusers(original, pieces(1, 1), config.hidden_size)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name][..., :1], tensor[..., :1]), name


def test_the_original_names_are_those_of_the_published_file() -> None:
    names = {piece.original for piece in pieces(19, 38)}
    assert len(names) == 780  # tensors of flux1-dev.safetensors
    assert {
        "double_blocks.18.txt_attn.norm.key_norm.scale",
        "final_layer.adaLN_modulation.1.weight",
        "guidance_in.in_layer.bias",
        "single_blocks.37.linear1.weight",
    } <= names
