"""The run of all benchmarks: what it leaves out, what it keeps, and that its commands are ones."""

from __future__ import annotations

import json
import os
import time
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import everything
from benchmarks.everything import LOG, RESULTS, STAGES, Stage, main
from benchmarks.peers import PEERS


def stage(name: str, code: str, seconds: int = 1) -> Stage:
    """That runs `code`, whose `out` is the file of its lines."""
    whole = f"import json, sys, time; out = open(sys.argv[-1], 'a'); {code}"
    return Stage(name, seconds, ("-c", whole), ("-c", whole))


WRITE = "print(json.dumps({'kind': 'latency', 'seconds': 2}), file=out, flush=True)"


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def test_each_stage_leaves_its_lines_and_what_it_printed(tmp_path: Path) -> None:
    stages = [stage("one", f"{WRITE}; print('hello')"), stage("two", "sys.exit(3)")]
    assert main([str(tmp_path)], stages=stages) == 1
    lines = results(tmp_path)
    assert [(line["stage"], line["kind"]) for line in lines] == [
        ("one", "latency"),
        ("one", "stage"),
        ("two", "stage"),
    ]
    assert [line["code"] for line in lines if line["kind"] == "stage"] == [0, 3]
    assert "hello" in (tmp_path / LOG).read_text()
    assert {file.name for file in tmp_path.iterdir()} == {RESULTS, LOG}


def test_what_is_done_is_not_done_again_and_what_failed_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    fails_once = f"import pathlib; p = pathlib.Path({str(flag)!r}); e = p.exists(); p.touch(); "
    stages = [stage("one", WRITE), stage("two", f"{fails_once} sys.exit(0 if e else 1)")]
    folder = tmp_path / "folder"
    assert main([str(folder)], stages=stages) == 1
    assert main([str(folder)], stages=stages) == 0
    assert "one: done before" in capsys.readouterr().out
    names = [line["stage"] for line in results(folder) if line["kind"] == "stage"]
    assert names == ["one", "two", "two"]


def test_a_stage_that_does_not_fit_is_left_out_and_one_that_takes_too_long_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    # It starts a process of its own, which must not outlive it.
    spawns = (
        f"{WRITE}; out.write('{{\"cut'); out.flush(); import subprocess; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    monkeypatch.setattr(everything, "SHORTEST", 6)
    stages = [stage("long", WRITE, seconds=9999), stage("hangs", spawns, seconds=0)]
    folder = tmp_path / "folder"
    assert main([str(folder), "--minutes", "5"], stages=stages) == 1
    said = capsys.readouterr().out
    assert "long: left out" in said
    assert "hangs: 6 s, ended, out of time" in said
    assert [line["kind"] for line in results(folder)] == ["latency", "stage"]
    assert results(folder)[-1]["code"] is None
    pid = int(child.read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        status = Path(f"/proc/{pid}/stat").read_text().split()[2]
        if status == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process of the stage is still there")


def test_lines_of_a_run_that_was_killed_are_kept(tmp_path: Path) -> None:
    (tmp_path / "current.jsonl").write_text('{"kind": "latency", "seconds": 1}\n{"cut')
    (tmp_path / RESULTS).write_text('{"stage": "two", "kind": "latency"}\n{"cut')
    assert main([str(tmp_path)], stages=[stage("one", WRITE)]) == 0
    assert main([str(tmp_path)], stages=[stage("one", WRITE)]) == 0
    lines = (tmp_path / RESULTS).read_text().splitlines()
    assert lines.pop(1) == '{"cut'
    names = [json.loads(line)["stage"] for line in lines]
    assert names == ["two", "unfinished", "one", "one"]


def test_its_commands_are_ones(capsys: pytest.CaptureFixture[str]) -> None:
    known = {peer.engine for peer in PEERS}
    helps: dict[str, str] = {}
    for one in STAGES:
        for command in (one.command, one.rehearsal):
            module, options = command[1], command[2:]
            if module == "pytest":
                assert all(Path(option).is_file() for option in options if "/" in option)
                continue
            if module not in helps:
                with pytest.raises(SystemExit):
                    import_module(module).main(["--help"])
                helps[module] = capsys.readouterr().out
            flags = [option for option in options if option.startswith("--")]
            assert [flag for flag in flags if flag not in helps[module]] == [], one.name
            assert not one.output or "--output" in helps[module], one.name
            assert {name for name in options if name.startswith("diffusers:")} <= known
    assert len(helps) == 6
