"""Prompts to what the transformer takes: T5's tokens and CLIP's summary.

Knows nothing of requests, images or where weights come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from krea_local.layers import LowRank
from krea_local.streaming import BlockStream

if TYPE_CHECKING:
    import torch
    from transformers import T5EncoderModel

    from krea_local.loading import Models

T5_TOKENS = 512  # attention has no mask, so fewer would change the picture
CLIP_TOKENS = 77


def encode_prompt(models: Models, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """prompt_embeds [1, 512, 4096] by T5, pooled_prompt_embeds [1, 768] by CLIP."""
    tokens, tokens_2 = (
        tokenizer(
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        for tokenizer, length in (
            (models.tokenizer, CLIP_TOKENS),
            (models.tokenizer_2, T5_TOKENS),
        )
    )
    dtype = models.transformer.dtype
    pooled_prompt_embeds = models.text_encoder(tokens).pooler_output.to(dtype)
    # No mask: FLUX.1 was trained with padding tokens attended to.
    return models.text_encoder_2(tokens_2)[0].to(dtype), pooled_prompt_embeds


def stream_t5(encoder: T5EncoderModel, device: torch.device) -> BlockStream:
    """Have T5's blocks on `device` only while they work, inside the `open` of what is returned."""
    blocks = list(encoder.encoder.block)
    stream = BlockStream([[block] for block in blocks], device, again=False)
    for i, block in enumerate(blocks):
        # The default binds this block's number, not the last one's.
        block.register_forward_pre_hook(lambda *_, i=i: stream.acquire(i))
        block.register_forward_hook(lambda *_, i=i: stream.release(i))
    return stream


@contextlib.contextmanager
def adapted(encoder: nn.Module, low_rank: Mapping[str, LowRank]) -> Iterator[None]:
    """Have this added to the encoder's linear layers, by name, inside the block."""

    def hook(added: LowRank) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            rows = out.reshape(-1, out.shape[-1])
            return added.add(inputs[0].reshape(-1, inputs[0].shape[-1]), rows).view_as(out)

        return add

    with contextlib.ExitStack() as stack:
        for name, added in low_rank.items():
            handle = encoder.get_submodule(name).register_forward_hook(hook(added))
            stack.callback(handle.remove)
        yield


def outside_blocks(encoder: T5EncoderModel) -> list[nn.Module]:
    """T5's modules that are in none of its blocks."""
    return [encoder.shared, encoder.encoder.embed_tokens, encoder.encoder.final_layer_norm]


def where_cut(models: Models, prompt: str) -> str | None:
    """Where a prompt ends for the model, in words, if T5 reads less than all of it.

    CLIP reads 77 tokens of any prompt; it only sets the tone, so that is not worth a word.
    """
    rows = models.tokenizer_2(
        prompt,
        max_length=T5_TOKENS,
        truncation=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    if len(rows["input_ids"]) == 1:
        return None
    end = max(stop for _, stop in rows["offset_mapping"][0])
    words = prompt[max(0, end - 40) : end].split()[-4:]
    return (
        f"the prompt is longer than the {T5_TOKENS} tokens that FLUX.1 reads: it was cut after "
        f"{end} characters, at '… {' '.join(words)}'"
    )
