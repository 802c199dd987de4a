from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

import krea_local
from benchmarks import latency, load, lora, random_model, rounding
from krea_local.packed import packed_layers, weight_bytes


def test_latency_prints_a_table_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    options = "--model tiny --image-size 64x96 --steps 2 --batch 2 --runs 2 --device cpu --output"
    assert latency.main([*shlex.split(options), str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert output.read_text() == printed[-1] + "\n"
    assert result["engine"] == "krea_local:none"
    assert (result["width"], result["height"], result["steps"], result["batch"]) == (64, 96, 2, 2)
    assert result["device"] == "cpu"
    assert set(result["stages"]) == {"text", "denoise", "decode", "safety", "total"}
    assert result["stages"]["text"] > 0.001  # the prompts differ, so the cache does not hide it
    assert min(result["seconds_all"]) <= result["seconds"] <= max(result["seconds_all"])
    assert result["peak_gib"] > 0.1
    assert result["first_image_seconds"] > 0
    assert result["versions"]["torch"] == torch.__version__
    table = "\n".join(printed[:-1])
    for word in ("images a minute", "per megapixel", "peak memory"):
        assert word in table


def test_what_loras_cost_is_measured_level_by_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    options = "--model tiny --image-size 64x64 --steps 1 --ranks 2 4 --levels none --runs 1"
    assert lora.main([*shlex.split(options), "--device", "cpu", "--output", str(output)]) == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["rank"] for result in results] == [2, 4]
    assert results[1]["file_bytes"] > 1.5 * results[0]["file_bytes"]
    assert all(result["ratio"] > 0 for result in results)
    assert "rank 4" in capsys.readouterr().out


def test_what_8_bits_round_depends_on_outliers(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--widths 128 --double 1 --single 1 --lengths 3072"
    assert rounding.main(options.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["errors"]
    errors = {(line["what"], line["kind"]): line for line in found}
    assert len(errors) == len(found) == 2 * 3
    for line in found:  # the exponents of floats follow what is large
        assert 0.03 < line["float8"] < 0.05
        assert 0.002 < line["bfloat16"] < 0.01
    for what in ("product", "forward"):
        normal, outliers, balanced = (errors[what, kind]["int8"] for kind in rounding.KINDS)
        assert 0.01 < normal < 0.015
        assert normal < outliers < balanced
    assert errors["product", "outliers"]["int8"] == pytest.approx(0.05, abs=0.005)
    with pytest.raises(SystemExit):
        rounding.main(["--widths", "100"])
    assert "multiples of 128" in capsys.readouterr().err


def test_the_cost_is_shown_for_a_gpu_next_to_the_hosted_apis() -> None:
    result = {
        "device": "NVIDIA H200",
        "model": "random-12b",
        "dtype": "bfloat16",
        "offload": "none",
        "batch": 1,
        "width": 1000,
        "height": 1000,
        "steps": 28,
        "load_seconds": 1.0,
        "first_image_seconds": 4.0,
        "stages": {"total": 3.6},
        "seconds": 3.6,
        "runs": 5,
        "peak_gib": 34.0,
    }
    assert "$0.00300 a megapixel at $3 an hour; the hosted API: $0.025" in latency.table(
        result, 3.0
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_load_measures_readers_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: dict[str, dict[str, object]] = {
        "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
        "vae": {"block_out_channels": (32,) * 4, "layers_per_block": 1},
        "text_encoder": {"num_hidden_layers": 1, "vocab_size": 1000},
        "text_encoder_2": {"num_layers": 1, "d_ff": 64, "num_heads": 2, "vocab_size": 1000},
    }
    monkeypatch.setattr(load, "SMALL", tiny)
    monkeypatch.setattr(load, "PACKAGES", {"runai": "a_package_that_nobody_has"})
    output, folder = tmp_path / "results.jsonl", tmp_path / "random"
    options = ["--readers", "ours", "from_pretrained", "runai", "--runs", "1", "--device", "cpu"]
    options += ["--caches", "cold", "--output", str(output)]
    assert load.main([str(folder), "--random", *options]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    runs, lines = lines[:2], lines[2:]
    assert [line["kind"] for line in runs] == ["load_run"] * 2
    assert [line["engine"] for line in lines] == ["ours", "from_pretrained", "runai"]
    assert lines[2]["failed"] == "the package a_package_that_nobody_has is not installed"
    files = load.files_of(folder)
    assert len(files) == 4
    for line in lines[:2]:
        assert (line["kind"], line["cache"], line["device"]) == ("load", "cold", "cpu")
        assert line["nbytes"] == sum(file.stat().st_size for file in files)
        assert line["seconds"] == line["seconds_all"][0] > 0
        assert line["gb_per_second"] == pytest.approx(line["nbytes"] / line["seconds"] / 1e9)
    assert lines[0]["peak_host_gib"] > 0.5 * lines[0]["nbytes"] / 2**30  # on a CPU, the weights
    assert lines[1]["peak_host_gib"] >= 0  # which theirs leaves in the mapped files
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[2].endswith(" 1.00")
    assert "not measured: the package a_package" in table[3]


@pytest.fixture
def small_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 12 B model's shapes with few blocks and heads."""
    small = {
        "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
        "vae": {"block_out_channels": (32,) * 4, "layers_per_block": 1},
        "text_encoder": {"num_hidden_layers": 1, "vocab_size": 1000},
        "text_encoder_2": {"num_layers": 1, "d_ff": 64, "num_heads": 2, "vocab_size": 1000},
    }
    configs = {name: {**random_model.CONFIGS[name], **small[name]} for name in small}
    monkeypatch.setattr(random_model, "CONFIGS", configs)


@pytest.mark.parametrize("kind", ["float8", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_random_packed_weights_are_numbers_of_the_usual_size(
    kind: str, small_configs: None
) -> None:
    krea = random_model.krea_of(f"random-12b:{kind}", "cpu", "bfloat16", "none", 1)
    layers = packed_layers(krea.models.transformer)
    assert len(layers) == 8 + 2 + 2 + 1 + 1
    for layer in layers:
        assert layer.packing.kind == kind
        assert layer.wide().isfinite().all()
        assert 1e-3 < float(layer.wide().float().std()) < 0.2
    found = random_model.sizes_of(kind)
    assert found.blocks[0] == weight_bytes(krea.models.transformer.step_blocks()[0], 2)
    assert found.eight_bit == (kind == "float8")
    size = {"width": 64, "height": 64}
    assert krea.txt2img("a fox", image_size=size, num_inference_steps=1).images


def test_a_kind_of_packed_weights_that_is_none_is_refused() -> None:
    with pytest.raises(krea_local.InvalidRequest, match="random-12b:int4: should be one of float8"):
        random_model.krea_of("random-12b:int4", "cpu", "bfloat16", "none", 1)


def test_random_weights_fill_every_tensor_and_are_never_zero(small_configs: None) -> None:
    krea = random_model.krea_of("random-12b", "cpu", "bfloat16", "none", 1)
    models = krea.models
    for part in (models.transformer, models.vae, models.text_encoder, models.text_encoder_2):
        for tensor in part.parameters():
            assert tensor.dtype == torch.bfloat16
            assert tensor.isfinite().all()
            assert tensor.ndim == 1 or float(tensor.float().std()) == pytest.approx(0.02, rel=0.2)
    for name, tensor in models.transformer.named_parameters():
        if tensor.ndim == 1:  # zeros in the norms of queries and keys would make attention faster
            assert (tensor == (1 if name.endswith("scale") else 0)).all(), name
    shared = random_model.as_diffusers(models.transformer)
    assert (
        shared.single_transformer_blocks[0].proj_out.weight.data_ptr()
        == models.transformer.single_blocks[0].linear2.weight.data_ptr()
    )
    t5 = models.text_encoder_2
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    size = {"width": 64, "height": 64}
    assert krea.txt2img("a fox", image_size=size, num_inference_steps=1).images
