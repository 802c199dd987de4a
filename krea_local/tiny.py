"""The tiny checkpoint: FLUX.1's real folder format with random weights, about 1 MB.

`write_tiny(folder)` makes what `load("tiny")` reads, so that everything runs in seconds without a
GPU or a download. Every class, file name and tensor name is that of the 12 B checkpoint, so no
other code knows that it is tiny. Its pictures are coloured noise: the weights were never trained.

The parts of writing are of use to whoever makes another small checkpoint, as
`benchmarks.miniature` does.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krea_local.errors import OutputFailed

if TYPE_CHECKING:
    from torch import nn

TEXT_WIDTH = 32
# Enough letters and words for the tokenizers to learn from; every other text still has tokens.
_CORPUS = (
    "a red fox in fresh snow the same fox at dusk a cat dressed as a wizard with a background of a "
    "mystic forest a candid street photo of a woman with a pink bob and bold eyeliner on a "
    "graffiti-covered subway platform she wears a bright yellow patent leather coat over a "
    "black-and-white checkered turtleneck natural light small large blue green square circle"
)
_WORDS = _CORPUS.split()


def write_tiny(folder: Path) -> Path:
    """Write the tiny checkpoint to `folder`, which must be empty or absent. Same bytes every time.

    Raises:
        OutputFailed: `folder` holds something else, or cannot be written.
    """
    return write_checkpoint(folder, _write)


def write_checkpoint(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a folder that becomes `folder` when it is whole.

    Raises:
        OutputFailed: `folder` holds something else, or cannot be written.
    """
    from safetensors import SafetensorError

    folder = folder.absolute()
    partial = folder.parent / f".{secrets.token_hex(8)}.part"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputFailed(f"{str(folder)!r} is not an empty folder: name another")
        partial.mkdir(parents=True)
        write(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OutputFailed:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputFailed(f"cannot write {str(folder)!r}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    import torch

    vocabulary, t5_vocabulary = write_tokenizers(folder, _WORDS, map(chr, range(33, 127)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, model in _models(vocabulary, t5_vocabulary):
            save_model(model, folder / name)
        write_safety_checker(folder / "safety_checker")
    write_settings(folder)


def write_settings(folder: Path) -> None:
    """Write what FLUX.1's folder says of its parts and of its noise levels."""
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "FluxPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
    )


def _models(clip_vocabulary: int, t5_vocabulary: int) -> Iterator[tuple[str, nn.Module]]:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        T5Config,
        T5EncoderModel,
    )

    yield (
        "transformer",
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )
    yield (
        "vae",
        AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )
    yield (
        "text_encoder",
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_vocabulary,
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
    )
    yield (
        "text_encoder_2",
        T5EncoderModel(
            T5Config(
                vocab_size=t5_vocabulary,
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        ),
    )


def write_safety_checker(folder: Path, *, width: int = 32, side: int = 32) -> None:
    """Write a checker that was never trained, and so flags nothing.

    Args:
        folder: new.
        width: of its layers.
        side: of the images it looks at, in pixels; a multiple of 16.
    """
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    checker = ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=16,
            id2label={0: "normal", 1: "nsfw"},
            label2id={"normal": 0, "nsfw": 1},
        )
    )
    with torch.no_grad():  # an untrained checker has no business flagging anything
        checker.classifier.bias.copy_(torch.tensor([4.0, -4.0]))
    save_model(checker, folder)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "ViTImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": side, "width": side},
        },
    )


def save_model(model: Any, folder: Path) -> None:
    """Write `model` in its library's format, under the tensor names of the published checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    rename: Callable[[str], str] = {
        # transformers 5 dropped the prefix that every published CLIP file has.
        "CLIPTextModel": lambda name: f"text_model.{name.removeprefix('text_model.')}",
    }.get(type(model).__name__, lambda name: name)
    state = {
        rename(name): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # tied to shared.weight
    }
    if hasattr(model, "save_config"):
        model.save_config(folder)
        file = "diffusion_pytorch_model.safetensors"
    else:
        model.config.save_pretrained(folder)
        file = "model.safetensors"
    save_file(state, folder / file, metadata={"format": "pt"})


def write_tokenizers(
    folder: Path, words: Sequence[str], characters: Iterable[str], *, clip_vocabulary: int = 600
) -> tuple[int, int]:
    """Write CLIP's and T5's tokenizers, and return the sizes of their vocabularies.

    Args:
        folder: of the checkpoint.
        words: for both to know. CLIP's takes letters and parts of words besides.
        characters: that T5's knows besides; every other text is unknown to it.
        clip_vocabulary: most pieces CLIP's may have.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    clip.train_from_iterator(
        [word for word in words if word == word.lower()],  # CLIP reads everything in lower case
        trainers.BpeTrainer(
            vocab_size=clip_vocabulary,
            special_tokens=[start, end, *(letter + "</w>" for letter in alphabet)],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(clip.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer" / "vocab.json", model["vocab"])
    (folder / "tokenizer" / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )
    _write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {
            "bos_token": start,
            "eos_token": end,
            "model_max_length": 77,
            "pad_token": end,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": end,
        },
    )

    pieces = ["<pad>", "</s>", "<unk>", "▁", *characters]
    pieces += [f"▁{word}" for word in dict.fromkeys(words)]
    # Longer pieces score higher than their letters together, so words stay whole.
    scores = [(piece, 0.0 if rank < 3 else -5.0) for rank, piece in enumerate(pieces)]
    t5 = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    t5.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    t5.decoder = decoders.Metaspace()
    t5.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    t5.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (folder / "tokenizer_2").mkdir(exist_ok=True)
    t5.save(str(folder / "tokenizer_2" / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_2" / "tokenizer_config.json",
        {
            "eos_token": "</s>",
            "extra_ids": 0,
            "model_max_length": 512,
            "pad_token": "<pad>",
            "tokenizer_class": "T5TokenizerFast",
            "unk_token": "<unk>",
        },
    )
    return len(model["vocab"]), len(pieces)


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
