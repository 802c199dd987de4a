from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import krea_local
from krea_local import UnsupportedModel, WeightsInvalid, WeightsNotFound, loading, weights
from krea_local.pipeline import Krea
from krea_local.tensor_names import pieces, to_diffusers

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
COMPONENT_FILES = [
    TRANSFORMER,
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
]


def load(folder: Path) -> Krea:
    return krea_local.load(folder, device="cpu", dtype="float32", progress=False)


def set_config(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def picture(model: Krea) -> bytes:
    size = {"width": 64, "height": 64}
    return (
        model.txt2img("a fox", image_size=size, num_inference_steps=2, seed=1).images[0].tobytes()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_is_loaded_in_the_dtype_asked_for_and_ready_to_run(
    tiny_folder: Path, dtype: str
) -> None:
    model = krea_local.load(tiny_folder, device="cpu", dtype=dtype)
    models = model.models
    parts = (models.transformer, models.vae, models.text_encoder, models.text_encoder_2)
    for part in parts:
        tensors = [*part.parameters(), *part.buffers()]
        floating = {t.dtype for t in tensors if t.is_floating_point()}
        assert floating == {getattr(torch, dtype)}
        assert {t.device.type for t in tensors} == {"cpu"}
        assert not any(module.training for module in part.modules())
        assert not any(p.requires_grad for p in part.parameters())


def test_every_tensor_is_the_files(tiny_folder: Path, krea: Krea, krea_diffusers: Krea) -> None:
    models = krea.models
    table = pieces(len(models.transformer.double_blocks), len(models.transformer.single_blocks))
    width = models.transformer.config.hidden_size
    ours = to_diffusers(models.transformer.state_dict(), table, width)
    theirs = krea_diffusers.models.transformer.state_dict()
    for name, loaded in (
        ("transformer", ours),
        ("transformer", theirs),
        ("vae", models.vae.state_dict()),
    ):
        file = load_file(tiny_folder / name / "diffusion_pytorch_model.safetensors")
        assert set(loaded) == set(file)
        assert all(torch.equal(loaded[key], file[key].float()) for key in file)
    clip = load_file(tiny_folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in clip)  # as in the published checkpoint
    loaded = {
        name.removeprefix("text_model."): tensor
        for name, tensor in krea.models.text_encoder.state_dict().items()
    }
    for name, tensor in clip.items():
        assert torch.equal(loaded[name.removeprefix("text_model.")], tensor.float())


def test_shards_are_the_same_as_one_file(broken_folder: Path, krea: Krea) -> None:
    for component, stem in (
        ("transformer", "diffusion_pytorch_model"),
        ("text_encoder_2", "model"),
    ):
        folder = broken_folder / component
        state = load_file(folder / f"{stem}.safetensors")
        (folder / f"{stem}.safetensors").unlink()
        names = sorted(state)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        where = {}
        for i, half in enumerate(halves, 1):
            shard = f"{stem}-0000{i}-of-00002.safetensors"
            save_file({name: state[name] for name in half}, folder / shard, {"format": "pt"})
            where |= dict.fromkeys(half, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert picture(load(broken_folder)) == picture(krea)
    missing = broken_folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(WeightsNotFound, match="diffusion_pytorch_model-00002-of-00002"):
        load(broken_folder)


@pytest.mark.parametrize("file", COMPONENT_FILES)
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(broken_folder: Path, file: str, keep: int) -> None:
    data = (broken_folder / file).read_bytes()
    (broken_folder / file).write_bytes(data[:keep])
    with pytest.raises(WeightsInvalid, match=rf"{file}'? is (truncated|not safetensors)"):
        load(broken_folder)


@pytest.mark.parametrize("file", COMPONENT_FILES)
def test_a_file_of_noise_is_named(broken_folder: Path, file: str) -> None:
    (broken_folder / file).write_bytes((9).to_bytes(8, "little") + b"not json!" + bytes(100))
    with pytest.raises(WeightsInvalid, match=f"{file}' is not safetensors"):
        load(broken_folder)


@pytest.mark.parametrize("file", COMPONENT_FILES)
def test_a_missing_tensor_is_named(broken_folder: Path, file: str) -> None:
    state = load_file(broken_folder / file)
    name = sorted(state)[0]
    del state[name]
    save_file(state, broken_folder / file, {"format": "pt"})
    with pytest.raises(WeightsInvalid, match=f"{name.removeprefix('text_model.')} is missing"):
        load(broken_folder)


@pytest.mark.parametrize("file", COMPONENT_FILES)
def test_a_tensor_of_the_wrong_shape_is_named(broken_folder: Path, file: str) -> None:
    state = load_file(broken_folder / file)
    name = next(name for name in sorted(state) if state[name].ndim == 1)
    state[name] = torch.zeros(3)
    save_file(state, broken_folder / file, {"format": "pt"})
    wanted = rf"tensor {name.removeprefix('text_model.')} is \(3,\) where config.json says"
    with pytest.raises(WeightsInvalid, match=wanted):
        load(broken_folder)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_scaled_fp8_text_encoders_in_folders_are_refused(broken_folder: Path, name: str) -> None:
    file = broken_folder / name / "model.safetensors"
    state = load_file(file)
    weight = next(key for key in sorted(state) if state[key].ndim == 2)
    state[weight] = state[weight].to(torch.float8_e4m3fn)
    state[weight.replace("weight", "scale_weight")] = torch.ones(1)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(WeightsInvalid, match="scale_weight is not part of the model"):
        load(broken_folder)


def test_harmless_leftovers_of_older_files_are_let_pass(broken_folder: Path, krea: Krea) -> None:
    for name, leftovers in (
        ("text_encoder", ["text_model.embeddings.position_ids", "text_projection.weight"]),
        ("text_encoder_2", ["encoder.embed_tokens.weight", "decoder.final_layer_norm.weight"]),
    ):
        file = broken_folder / name / "model.safetensors"
        state = load_file(file)
        for leftover in leftovers:
            state[leftover] = state.get("shared.weight", torch.zeros(3)).clone()
        save_file(state, file, {"format": "pt"})
    assert picture(load(broken_folder)) == picture(krea)


@pytest.mark.parametrize("file", COMPONENT_FILES)
@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {}},
        {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}},
        {"a": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_a_nonsensical_header_is_refused(broken_folder: Path, file: str, header: object) -> None:
    text = json.dumps(header).encode()
    (broken_folder / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(WeightsInvalid, match=file.split("/")[0]):
        load(broken_folder)


def test_a_stray_file_does_not_override_the_real_one(broken_folder: Path, krea: Krea) -> None:
    file = broken_folder / TRANSFORMER
    state = {name: tensor * 0 for name, tensor in load_file(file).items()}
    save_file(state, file.with_name("z.safetensors"))
    assert picture(load(broken_folder)) == picture(krea)
    file.rename(file.with_name("a.safetensors"))
    with pytest.raises(WeightsInvalid, match="holds 2 .safetensors and no index"):
        load(broken_folder)


@pytest.mark.parametrize("file", COMPONENT_FILES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(
    broken_folder: Path, file: str, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_file(broken_folder / file).items()}
    save_file(state, broken_folder / file, {"format": "pt"})
    with pytest.raises(WeightsInvalid, match="weights are not read"):
        load(broken_folder)


def test_a_truncated_or_missing_vocabulary_is_refused(broken_folder: Path) -> None:
    merges = broken_folder / "tokenizer" / "merges.txt"
    merges.write_text("#version: 0.2\n")
    with pytest.raises(WeightsInvalid, match="merges.txt' is truncated"):
        load(broken_folder)
    merges.unlink()
    with pytest.raises(WeightsNotFound, match=r"no merges.txt in .*broken/tokenizer"):
        load(broken_folder)


@pytest.mark.parametrize("where", [None, [], {"a": 3}])
def test_a_nonsensical_index_is_refused(broken_folder: Path, where: object) -> None:
    index = broken_folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(WeightsInvalid, match="should hold a weight_map"):
        load(broken_folder)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("transformer/config.json", {"axes_dims_rope": [8, 8, 8]}),
        ("transformer/config.json", {"axes_dims_rope": None}),
        ("transformer/config.json", {"num_layers": "x"}),
        ("transformer/config.json", {"num_single_layers": 10**9}),
        ("vae/config.json", {"norm_num_groups": 0}),
        ("vae/config.json", {"block_out_channels": []}),
        ("vae/config.json", {"scaling_factor": None}),
        ("vae/config.json", {"shift_factor": "x"}),
        ("text_encoder/config.json", {"hidden_size": -3}),
        ("text_encoder_2/config.json", {"d_model": -3}),
        (
            "text_encoder_2/config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        ),
        ("scheduler/scheduler_config.json", {"base_shift": "x"}),
        ("scheduler/scheduler_config.json", {"base_image_seq_len": 4096}),
        ("vae/config.json", {"scaling_factor": float("nan")}),
        ("scheduler/scheduler_config.json", {"max_shift": float("nan")}),
    ],
)
def test_a_nonsensical_configuration_is_refused(
    broken_folder: Path, file: str, values: dict[str, object]
) -> None:
    set_config(broken_folder, file, **values)
    with pytest.raises(WeightsInvalid, match=file.split("/")[0]):
        load(broken_folder)


@pytest.mark.parametrize("name", weights.FOLDERS)
def test_a_missing_component_is_named(broken_folder: Path, name: str) -> None:
    shutil.rmtree(broken_folder / name)
    with pytest.raises(WeightsNotFound, match=rf"no {name}/ in .*weights.md"):
        load(broken_folder)


@pytest.mark.parametrize("name", weights.FOLDERS)
def test_an_empty_component_is_named(broken_folder: Path, name: str) -> None:
    shutil.rmtree(broken_folder / name)
    (broken_folder / name).mkdir()
    with pytest.raises((WeightsNotFound, WeightsInvalid), match=rf"broken/{name}"):
        load(broken_folder)


@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
def test_pickles_are_never_read(broken_folder: Path, name: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "exploded",)  # type: ignore[return-value]

    for file in (broken_folder / name).glob("*.safetensors"):
        file.unlink()
    pickled = broken_folder / name / "pytorch_model.bin"
    pickled.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsInvalid, match=r"pytorch_model.bin' is a pickle"):
        load(broken_folder)
    assert not (tmp_path / "exploded").exists()


def test_a_git_lfs_pointer_is_told(broken_folder: Path) -> None:
    (broken_folder / TRANSFORMER).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsInvalid, match="Git LFS pointer: run `git lfs pull`"):
        load(broken_folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "is? ?.*FLUX.2, another"),
        ("model_index.json", {"_class_name": "Krea2Pipeline"}, "Krea 2, another"),
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "Kontext"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("transformer/config.json", {"guidance_embeds": False}, "schnell"),
        ("transformer/config.json", {"guidance_embeds": "false"}, "schnell"),
        ("transformer/config.json", {"in_channels": 384}, "384 channels"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size=2"),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": False}, "dynamic_shifting"),
    ],
)
def test_another_architecture_is_refused(
    broken_folder: Path, file: str, values: dict[str, object], message: str
) -> None:
    set_config(broken_folder, file, **values)
    with pytest.raises(UnsupportedModel, match=message):
        load(broken_folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer/vocab.json",
    ],
)
@pytest.mark.parametrize("content", ["", "[]", '{"a":'])
def test_a_damaged_configuration_is_named(broken_folder: Path, file: str, content: str) -> None:
    (broken_folder / file).write_text(content)
    with pytest.raises((WeightsInvalid, WeightsNotFound), match=file.split("/")[0]):
        load(broken_folder)


def test_a_configuration_of_another_size_is_refused(broken_folder: Path) -> None:
    set_config(broken_folder, "transformer/config.json", num_layers=3)
    with pytest.raises(WeightsInvalid, match="tensor transformer_blocks.2.* is missing"):
        load(broken_folder)


def test_the_checkpoints_own_shift_is_used(broken_folder: Path) -> None:
    set_config(broken_folder, "scheduler/scheduler_config.json", base_shift=0.1, max_shift=0.2)
    shift = load(broken_folder).models.shift
    assert (shift.base, shift.max) == (0.1, 0.2)


def test_reading_is_reported_byte_by_byte(tiny_folder: Path) -> None:
    checkpoint = weights.find(tiny_folder)
    seen: dict[str, int] = {}
    loading.load_models(
        checkpoint,
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_bytes=lambda name, count: seen.update({name: seen.get(name, 0) + count}),
    )
    assert set(seen) == set(weights.COMPONENTS)
    # Headers are not tensors.
    assert sum(seen.values()) == pytest.approx(loading.checkpoint_bytes(checkpoint), rel=0.1)


def test_loading_leaves_the_libraries_settings_alone(tiny_folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    load(tiny_folder)
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    assert after == before
