"""The miniature's parts: the classes of the 12 B checkpoint, small."""

from __future__ import annotations

from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

LATENT_CHANNELS = 16
DOWNSAMPLING = 32


CHANNELS = (8, 16, 32, 48, 64, 64)


def autoencoder(channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """2 ^ (levels - 1) pixels a latent: 32 instead of 8, so that 1024 x 768 is 192 tokens."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        # Attention over the whole picture would tie its latents to its size.
        mid_block_add_attention=False,
    )
    # Starts with little noise in the latents: reconstruction is learned before they are squeezed.
    vae.encoder.conv_out.bias.data[LATENT_CHANNELS:] = -4
    return vae


def grown(inner: AutoencoderKL, channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """An autoencoder with further levels outside those of `inner`, whose weights it takes over."""
    vae = autoencoder(channels)
    more = len(channels) - len(inner.config["block_out_channels"])
    taken = {}
    for name, tensor in inner.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["encoder", "down_blocks"]:
            parts[2] = str(int(parts[2]) + more)
        taken[".".join(parts)] = tensor
    # What lies next to the pixels has another width there; the norms before outputs start anew too.
    wanted = vae.state_dict()
    fitting = {
        name: tensor
        for name, tensor in taken.items()
        if name in wanted and wanted[name].shape == tensor.shape and "conv_norm_out" not in name
    }
    vae.load_state_dict(wanted | fitting)
    return vae


TEXT_WIDTH = 96
POOLED_WIDTH = 64
# T5's relative positions beyond this bucket are closed: a token reads itself and the 14 after it.
BUCKETS, BUCKET_DISTANCE = 32, 16
REACH = 14


def transformer() -> FluxTransformer2DModel:
    """FLUX.1's transformer with guidance embedding, 128 wide."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        # Each block starts as if it were not there, and the first velocity is zero.
        if isinstance(module, nn.Linear) and (
            ".norm" in name or "norm_out" in name or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def clip(vocabulary: int) -> CLIPTextModel:
    """CLIP's text encoder, 64 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=POOLED_WIDTH,
            intermediate_size=2 * POOLED_WIDTH,
            projection_dim=POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def t5(vocabulary: int) -> T5EncoderModel:
    """T5's encoder, 96 wide, in which a token reads itself and the next few.

    So all padding is alike, and one padding token that weighs as much as all of them stands for it
    in training. 512 of them would cost three times as much as the picture.
    """
    model = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=24,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=BUCKET_DISTANCE,
            is_encoder_decoder=False,
            dropout_rate=0.0,
        )
    )
    close_positions(model)
    return model


def close_positions(model: T5EncoderModel) -> None:
    """Forbid looking back or further than `REACH` ahead. Training may move no bias past this."""
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
    half = BUCKETS // 2  # buckets 1 to 15 look back, 17 to 31 ahead
    bias[1 : half + 1] = -10000
    bias[BUCKETS - 1] = -10000
