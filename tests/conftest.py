"""Fixtures: the tiny checkpoint, loaded, and diffusers' pipelines over the very same weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Set before anything imports huggingface_hub, which reads them once: no test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The tiny model gains nothing from threads, and OpenMP's waste a busy machine by spinning: the
# suite took three times as long beside one other busy process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("KREA_LOCAL_MODEL", None)
os.environ.pop("HF_TOKEN", None)

import pytest
from hypothesis import HealthCheck, settings
from serving import server  # noqa: F401 - a fixture

if TYPE_CHECKING:
    import torch

    from krea_local.pipeline import Krea

settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_configure() -> None:
    import torch

    # A shell's background jobs ignore Ctrl-C, and so would every process that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Triton's kernels run for real on a GPU, and elsewhere in its interpreter.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint; not to be changed."""
    from krea_local.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def broken_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    import shutil

    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def krea(tiny_folder: Path) -> Krea:
    import krea_local

    return krea_local.load(tiny_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def krea_bfloat16(tiny_folder: Path) -> Krea:
    import krea_local

    return krea_local.load(tiny_folder, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="session")
def krea_diffusers(tiny_folder: Path) -> Krea:
    """With diffusers' transformer."""
    import krea_local

    return krea_local.load(tiny_folder, device="cpu", dtype="float32", engine="diffusers")


@pytest.fixture(scope="session")
def krea_diffusers_bfloat16(tiny_folder: Path) -> Krea:
    import krea_local

    return krea_local.load(tiny_folder, device="cpu", dtype="bfloat16", engine="diffusers")


@dataclass(frozen=True)
class Oracle:
    """diffusers' own FLUX.1 pipelines over a Krea's models."""

    krea: Krea
    folder: Path

    def txt2img(
        self, prompt: str, *, seeds: list[int], output_type: str = "latent", **arguments: object
    ) -> torch.Tensor:
        import torch
        from diffusers import FluxPipeline

        return self._call(
            FluxPipeline,
            prompt=prompt,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_images_per_prompt=len(seeds),
            output_type=output_type,
            **arguments,
        )

    def img2img(
        self, prompt: str, *, clean: torch.Tensor, seeds: list[int], **arguments: object
    ) -> torch.Tensor:
        import torch
        from diffusers import FluxImg2ImgPipeline

        return self._call(
            FluxImg2ImgPipeline,
            prompt=prompt,
            image=clean,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_images_per_prompt=len(seeds),
            output_type="latent",
            **arguments,
        )

    def _call(self, kind: type, **arguments: object) -> torch.Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        models = self.krea.models
        pipe = kind(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder / "scheduler"),
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
            text_encoder_2=models.text_encoder_2,
            tokenizer_2=models.tokenizer_2,
            transformer=models.transformer,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe(**arguments).images


@pytest.fixture(scope="session")
def oracle(krea_diffusers: Krea, tiny_folder: Path) -> Oracle:
    return Oracle(krea_diffusers, tiny_folder)


@pytest.fixture(scope="session")
def oracle_bfloat16(krea_diffusers_bfloat16: Krea, tiny_folder: Path) -> Oracle:
    return Oracle(krea_diffusers_bfloat16, tiny_folder)


@pytest.fixture
def no_models_kept() -> Iterator[None]:
    """The module-level functions start without a loaded model."""
    from krea_local import api

    api._kept_models.clear()
    yield
    api._kept_models.clear()
