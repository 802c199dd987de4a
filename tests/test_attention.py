from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from krea_local import attention
from krea_local.attention import CUDNN, DEFAULT, FLASH3, Attention

CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def works(*_: object, **__: object) -> None:
    """In place of `attention.check`."""


def test_torchs_own_attention_is_attention() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        attention.check(DEFAULT, torch.device("cpu"), dtype, head_dim=32)
    query, key, value = torch.randn(3, 2, 5, 3, 16).unbind()
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / 4
    wanted = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)
    torch.testing.assert_close(DEFAULT.run(query, key, value), wanted)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda q, k, v: DEFAULT.run(q, k, 1.1 * v), "differs by 1.0e-01"),
        (lambda q, k, v: DEFAULT.run(q, k, v).transpose(1, 2), r"shape \(1, 2, 200, 32\)"),
        (lambda q, k, v: DEFAULT.run(q, k, v) * torch.nan, "differs by nan"),
    ],
)
def test_what_is_not_attention_is_refused(run: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention.check(Attention("wrong", run), torch.device("cpu"), torch.float32, head_dim=32)


def test_the_cpu_and_float32_get_torchs() -> None:
    cpu = torch.device("cpu")
    assert attention.choose(cpu, torch.bfloat16, head_dim=128) == (DEFAULT, None)
    assert attention.choose(CUDA, torch.float32, head_dim=128) == (DEFAULT, None)


def test_each_generation_has_its_candidates() -> None:
    assert attention.candidates((9, 0)) == (FLASH3, CUDNN, DEFAULT)
    assert attention.candidates((12, 0)) == (CUDNN, DEFAULT)
    assert attention.candidates((8, 9)) == (DEFAULT,)


@pytest.mark.usefixtures("hopper")
def test_hopper_gets_cudnn_and_nothing_is_said_of_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "check", works)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert attention.choose(CUDA, torch.bfloat16, head_dim=128) == (CUDNN, None)


@pytest.mark.usefixtures("hopper")
def test_hopper_gets_flash_attention_3_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fa3_fwd_interface.py").write_text("def flash_attn_func(q, k, v): return q + 1, 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fa3_fwd_interface", raising=False)
    monkeypatch.setattr(attention, "check", works)
    chosen, notice = attention.choose(CUDA, torch.bfloat16, head_dim=128)
    assert (chosen, notice) == (FLASH3, None)
    zeros = torch.zeros(1, 2, 3, 4)
    assert torch.equal(FLASH3.run(zeros, zeros, zeros), zeros + 1)  # it may return a pair
    del sys.modules["fa3_fwd_interface"]


@pytest.mark.usefixtures("hopper")
def test_a_half_installed_flash_attention_3_is_named_and_the_next_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "fa3_fwd_interface.py").write_text("raise ImportError('undefined symbol: aoti')")
    monkeypatch.syspath_prepend(tmp_path)
    tried = []

    def check(one: Attention, *_: object, **__: object) -> None:
        tried.append(one.name)
        if one is FLASH3:
            one.run(*[torch.zeros(1, 2, 3, 4)] * 3)

    monkeypatch.setattr(attention, "check", check)
    chosen, notice = attention.choose(CUDA, torch.bfloat16, head_dim=128)
    assert chosen is CUDNN
    assert notice is not None
    assert "attention fa3 does not work here" in notice
    assert "undefined symbol: aoti" in notice
    assert tried == ["fa3", "cudnn"]
    assert "attention fa3 is not used" in caplog.text


@pytest.mark.usefixtures("hopper")
def test_all_that_failed_is_named_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(one: Attention, *_: object, **__: object) -> None:
        raise RuntimeError(f"{one.name} is broken" + 900 * "!")

    monkeypatch.setattr(attention, "check", check)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
    chosen, notice = attention.choose(CUDA, torch.bfloat16, head_dim=128)
    assert chosen is DEFAULT
    assert notice is not None
    assert "fa3 is broken" in notice
    assert "cudnn is broken" in notice
    assert len(notice) < 600


def test_choosing_changes_no_setting_of_the_process() -> None:
    def state() -> list[bool]:
        names = ("flash", "mem_efficient", "math", "cudnn")
        return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]

    before = state()
    attention.choose(torch.device("cpu"), torch.float32, head_dim=16)
    query = torch.zeros(1, 2, 3, 4)
    DEFAULT.run(query, query, query)
    assert state() == before


@pytest.mark.gpu
def test_every_candidate_of_this_gpu_is_attention() -> None:
    for one in attention.candidates(torch.cuda.get_device_capability()):
        if one is FLASH3 and attention.importlib.util.find_spec("fa3_fwd_interface") is None:
            continue
        attention.check(one, CUDA, torch.bfloat16, head_dim=128)
