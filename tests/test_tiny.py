from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from krea_local import OutputFailed
from krea_local.tiny import write_tiny


def test_it_is_small_and_the_same_bytes_every_time(tiny_folder: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = write_tiny(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    files = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    same, different, missing = filecmp.cmpfiles(again, tiny_folder, files, shallow=False)
    assert (len(same), different, missing) == (len(files), [], [])
    assert sum((again / file).stat().st_size for file in files) < 1_500_000


def test_diffusers_itself_reads_and_runs_it(tiny_folder: Path) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a fox", width=64, height=64, num_inference_steps=1).images[0]
    assert image.size == (64, 64)
    assert pipe.transformer.config.guidance_embeds
    assert pipe.vae.config.latent_channels == 16


def test_its_layout_is_the_published_one(tiny_folder: Path) -> None:
    files = {p.relative_to(tiny_folder).as_posix() for p in tiny_folder.rglob("*") if p.is_file()}
    assert {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_2/tokenizer.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    } <= files
    for file in tiny_folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"


@pytest.mark.parametrize("text", ["a red fox", "", "Übergröße", "狐", "🦊", "a\tb\n", "x" * 300])
def test_every_text_has_tokens(tiny_folder: Path, text: str) -> None:
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    tokens = clip(text)["input_ids"]
    assert (tokens[0], tokens[-1]) == (clip.bos_token_id, clip.eos_token_id)
    # CLIP lowers case and joins white space; all else comes back.
    assert "".join(clip.decode(tokens[1:-1]).split()) == "".join(text.lower().split())
    t5 = T5TokenizerFast.from_pretrained(tiny_folder / "tokenizer_2")
    assert t5(text)["input_ids"][-1] == t5.eos_token_id
    if text.isascii() and text.strip():
        assert t5.decode(t5(text)["input_ids"], skip_special_tokens=True).split() == text.split()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputFailed, match="No space left on device"):
        write_tiny(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_only_an_empty_or_new_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for folder in (tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(OutputFailed, match="is not an empty folder"):
            write_tiny(folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "x"]
    (tmp_path / ".empty.part").mkdir()
    (tmp_path / ".empty.part" / "x").write_text("mine too")
    (tmp_path / "empty").mkdir()
    assert (write_tiny(tmp_path / "empty") / "vae").is_dir()
    assert (tmp_path / ".empty.part" / "x").read_text() == "mine too"
    with pytest.raises(OutputFailed, match="cannot write '/proc/x/y'"):
        write_tiny(Path("/proc/x/y"))
