"""Flags of the command line that several commands share."""

from __future__ import annotations

import argparse

OK, FAILED, USAGE, WEIGHTS, GPU, FILTERED, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130
"""Exit codes."""
LOADING = (
    "transformer",
    "text_encoder_2",
    "device",
    "dtype",
    "memory",
    "offload",
    "packed",
    "engine",
    "compile",
    "safety_checker",
    "safety_threshold",
)
"""Flags of `add_loading` that `load` takes by the same name."""


def add_loading(command: argparse.ArgumentParser) -> None:
    """Add the flags that say which model is loaded, and how."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--model",
        help='"mini" (built in, draws simple shapes), "tiny" (built in, random weights), a folder, '
        'a file with a transformer, "krea", "dev", "srpo" or a hub id, which is fetched if need be '
        "(default: $KREA_LOCAL_MODEL, else FLUX.1 Krea [dev] if it is in the hub's cache, else "
        "mini)",
    )
    group.add_argument(
        "--transformer",
        metavar="FILE",
        help="take this transformer instead of the model's: .safetensors or .gguf (weights.md)",
    )
    group.add_argument(
        "--text-encoder-2", metavar="FILE", help="take this T5 instead of the model's, likewise"
    )
    group.add_argument("--device", help='"cuda", "cuda:1", "cpu" (default: CUDA if there is a GPU)')
    group.add_argument(
        "--dtype", help='"bfloat16" or "float32" (default: bfloat16 on CUDA, float32 on the CPU)'
    )
    group.add_argument(
        "--memory",
        metavar="AMOUNT",
        help='of the GPU to use: "auto", what is free; such as "12GB"; or "none", no limit. The '
        "fastest way that fits is taken (default: auto, unless --offload is given)",
    )
    group.add_argument(
        "--offload",
        help='"none": all on the GPU, about 33 GiB; "modulation": but for a part needed once an '
        'image, 27 GiB; "model": models take turns, 17 GiB; "blocks": their blocks do, 2 GiB '
        "(default: none)",
    )
    group.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="keep weights of files in 8 bits, 4 bits or GGUF as they are there, and widen them "
        "where they are used: less memory, some time, the same picture (default: where they do "
        "not fit widened)",
    )
    group.add_argument(
        "--engine",
        help='"native" or "diffusers": whose transformer runs (default: native)',
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="have torch.compile make what runs between matrix products, not our Triton kernels",
    )
    group.add_argument(
        "--safety-checker", metavar="MODEL", help="folder or hub id of another NSFW checker"
    )
    group.add_argument(
        "--safety-threshold",
        type=float,
        metavar="P",
        help="flag an image where P(nsfw) is above this (default: 0.5)",
    )


def one_line(message: object) -> str:
    """In one line, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
