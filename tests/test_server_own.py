"""The page's own API, and the command that serves it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from PIL import Image
from serving import LONG, SMALL, Server, serving, start

KREA = "fal-ai/flux/krea"
KEY = "0123456789abcdef0123"
RUN = {"prompt": "behind", **SMALL}


@pytest.fixture
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def submit(web: httpx.Client, arguments: dict[str, Any], endpoint: str = KREA) -> dict[str, Any]:
    answer = web.post("/api/jobs", json={"endpoint": endpoint, "arguments": arguments})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def events(web: httpx.Client, job: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in web.get(f"/api/jobs/{job['id']}/events").text.split("\r\n\r\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_the_schema_has_the_fields_own_bounds_and_defaults(web: httpx.Client) -> None:
    schema = web.get("/api/schema").json()
    fields = {one["name"]: one for one in schema["endpoints"][KREA]["fields"]}
    assert fields["num_inference_steps"]["minimum"] == 1
    assert fields["num_inference_steps"]["maximum"] == 50
    assert fields["guidance_scale"]["default"] == 4.5
    assert fields["output_format"]["choices"] == ["jpeg", "png"]
    assert fields["image_size"]["type"] == "size"
    assert fields["seed"]["type"] == "integer"
    assert fields["prompt"]["required"]
    assert "loras" not in fields
    redraw = {one["name"]: one for one in schema["endpoints"][f"{KREA}/image-to-image"]["fields"]}
    assert redraw["strength"]["default"] == 0.95
    assert schema["presets"]["landscape_4_3"] == [1024, 768]


def test_a_job_is_followed_from_the_queue_to_its_picture(web: httpx.Client) -> None:
    job = submit(web, {"prompt": "a fox <b>", **SMALL, "num_inference_steps": 8})
    assert job["state"] == "queued"
    told = events(web, job)
    assert told[-1][0] == "state"
    last = told[-1][1]["job"]
    assert last["state"] == "done"
    assert last["arguments"]["prompt"] == "a fox <b>"
    assert last["seed"] == last["arguments"]["seed"]
    (picture,) = last["pictures"]
    assert picture["url"].startswith("/files/")
    drawn = Image.open(io.BytesIO(web.get(picture["url"]).content))
    assert drawn.size == (picture["width"], picture["height"]) == (128, 128)
    steps = [data for kind, data in told if kind == "progress"]
    for data in steps:
        assert 0 < data["fraction"] <= 1
        assert data["preview"] is None or data["preview"].startswith("data:image/jpeg;base64,")
    assert [one["id"] for one in web.get("/api/jobs?limit=1").json()["jobs"]] == [job["id"]]
    assert web.get(f"/api/jobs/{job['id']}").json() == last


def test_jobs_are_listed_newest_first_in_pages(web: httpx.Client) -> None:
    ids = [submit(web, {"prompt": str(number), **SMALL})["id"] for number in range(3)]
    for id_ in ids:
        events(web, {"id": id_})
    page = web.get("/api/jobs?limit=2").json()
    assert [one["id"] for one in page["jobs"]] == ids[:0:-1]
    assert page["more"]
    older = web.get(f"/api/jobs?limit=1&before={ids[1]}").json()["jobs"]
    assert older[0]["id"] == ids[0]
    for limit in ("0", "201", "x", "-1", "1e3", "٣", "9" * 400):
        assert web.get("/api/jobs", params={"limit": limit}).status_code == 422
    assert web.get("/api/jobs?before=nope").status_code == 200


def test_a_job_is_cancelled_and_deleted(web: httpx.Client) -> None:
    job = submit(web, {"prompt": "long", **LONG})
    place = f"/api/jobs/{job['id']}"
    assert web.delete(place).status_code == 409
    assert web.post(f"{place}/cancel").status_code == 202
    assert events(web, job)[-1][1]["job"]["state"] == "cancelled"
    assert web.post(f"{place}/cancel", json={}).status_code == 409
    assert web.delete(place).status_code == 204
    for answer in (web.get(place), web.delete(place), web.get(f"{place}/events")):
        assert answer.status_code == 404
    done = submit(web, {"prompt": "x", **SMALL})
    picture = events(web, done)[-1][1]["job"]["pictures"][0]["url"]
    assert web.get(picture).status_code == 200
    assert web.delete(f"/api/jobs/{done['id']}").status_code == 204
    assert web.get(picture).status_code == 404


def test_an_uploaded_picture_is_redrawn(web: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "teal").save(buffer, "WEBP")
    upload = web.post("/api/uploads", content=buffer.getvalue()).json()
    assert (upload["width"], upload["height"]) == (96, 64)
    arguments = {"prompt": "x", "image_url": upload["url"], "num_inference_steps": 10}
    job = submit(web, arguments, f"{KREA}/image-to-image")
    last = events(web, job)[-1][1]["job"]
    assert last["state"] == "done", last
    assert last["pictures"][0]["width"] == 96
    assert web.post("/api/uploads", content=b"x").status_code == 422


@pytest.mark.parametrize(
    "body", [[], {}, {"endpoint": KREA}, {"endpoint": 1, "arguments": {}}, {"arguments": {}}]
)
def test_a_body_of_another_shape_is_refused(web: httpx.Client, body: object) -> None:
    assert web.post("/api/jobs", json=body).status_code == 422


def test_the_state_is_told(web: httpx.Client) -> None:
    state = web.get("/api/state").json()
    assert state["ready"]
    assert state["model"] == "krea"
    assert state["endpoints"] == [KREA, f"{KREA}/image-to-image"]
    (worker,) = state["workers"]
    assert worker["device"] == "cpu"
    assert worker["state"] in ("idle", "busy")


def test_prompts_are_not_in_the_log(server: Server, web: httpx.Client) -> None:
    submit(web, {"prompt": "unmistakable-words", **SMALL})
    assert web.get("/api/state").status_code == 200
    server.wait_for('"path": "/api/state"')
    assert not [line for line in server.lines if "unmistakable-words" in line]


def test_a_stopped_server_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with serving(folder=folder) as first:
        web = httpx.Client(base_url=first.url, timeout=300)
        done = submit(web, {"prompt": "done", **SMALL, "seed": 3})
        picture = events(web, done)[-1][1]["job"]["pictures"][0]["url"]
        data = web.get(picture).content
        asked = {**LONG, "num_images": 1}
        waiting = [submit(web, {"prompt": str(n), **asked})["id"] for n in range(3)]
        web.close()
        assert first.end() == 0
    with serving(folder=folder) as second, httpx.Client(base_url=second.url) as web:
        assert web.get(picture).content == data
        states = [web.get(f"/api/jobs/{one}").json()["state"] for one in waiting]
        assert set(states) <= {"queued", "running", "done"}
        assert states[-1] != "done"
        second.process.send_signal(signal.SIGINT)
        second.wait_for("stopping when the pictures under way are done")
        assert second.end(signal.SIGINT) != 1  # the second one at once


def test_who_waits_for_a_server_that_stops_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "stopping"
    with serving(folder=folder) as server, httpx.Client(base_url=server.url, timeout=300) as web:
        submit(web, {"prompt": "ahead", **LONG})
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.post, f"{server.url}/run/{KREA}", json=RUN, timeout=300)
            while len(web.get("/api/jobs").json()["jobs"]) < 2:
                assert not waiting.done()
            server.process.send_signal(signal.SIGTERM)
            answer = waiting.result()
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert server.process.wait(300) == 0
    with serving(folder=folder, ready=False) as server:
        jobs = httpx.get(f"{server.url}/api/jobs").json()["jobs"]
        assert jobs[0]["state"] == "cancelled"  # nobody would ask for it
        assert jobs[1]["state"] in ("queued", "running", "done")


def test_a_key_guards_all_but_the_page(tmp_path: Path) -> None:
    with (
        serving(folder=tmp_path / "key", ready=False, KREA_LOCAL_API_KEY=KEY) as server,
        httpx.Client(base_url=server.url) as web,
    ):
        assert web.get("/api/state").status_code == 401
        assert web.get("/api/state", headers={"authorization": f"Key {KEY}"}).status_code == 200
        assert web.get("/health/live").status_code == 200
        assert server.end() == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "192.0.2.1"], "KREA_LOCAL_API_KEY"),
        (["--port", "99999"], "65535"),
        (["--keep", "soon"], "7d"),
        (["--keep-size", "lots"], "20GB"),
        (["--gpus", "0,0"], "twice"),
        (["--gpus", "0", "--device", "cpu"], "not both"),
        (["--allow-origin", "*"], "https://my.app"),
        (["--allow-origin", "https://my.app/"], "https://my.app"),
        (["--api-key-file", "/nowhere/key"], "cannot be read"),
        (["--max-queue", "0"], "1 or more"),
    ],
)
def test_flags_that_would_do_harm_are_refused(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from krea_local.cli import USAGE, main

    assert main(["serve", *flags]) == USAGE
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_flags_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from krea_local.cli import _parser
    from krea_local.serving import settings_of

    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    parsed = _parser().parse_args(
        "serve --model krea --memory 12GB --acceleration high --gpus 0,1 --host 0.0.0.0 --port 1 "
        f"--api-key-file {key} --allow-host a --allow-host b --allow-origin https://my.app "
        f"--folder {tmp_path} --keep 7d --keep-size 20GB --max-queue 9 --job-time 90s "
        "--low-disk 1GiB --allow-private-urls --allow-private-webhooks "
        "--public-url https://x.example".split()
    )
    settings = settings_of(vars(parsed))
    assert settings.model == "krea"
    assert settings.load == {"memory": "12GB", "acceleration": "high"}
    assert settings.devices == ("cuda:0", "cuda:1")
    assert (settings.host, settings.port, settings.api_key) == ("0.0.0.0", 1, KEY)
    assert settings.hosts == ("a", "b")
    assert settings.origins == ("https://my.app",)
    assert settings.folder == tmp_path
    assert (settings.keep_seconds, settings.keep_bytes) == (7 * 86400, 20 * 10**9)
    assert (settings.max_queue, settings.job_seconds, settings.low_disk) == (9, 90, 2**30)
    assert settings.private_urls
    assert settings.webhook_private_urls
    assert settings.public_url == "https://x.example"


def test_the_help_is_instant_and_needs_no_extra() -> None:
    code = (
        "import sys; from krea_local.cli import main; main(['serve', '--help']); "
        "print(sorted({'fastapi', 'uvicorn', 'torch', 'starlette'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.endswith("[]\n")
    assert "--allow-origin" in answer.stdout


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None; from krea_local.cli import main; "
        "sys.exit(main(['serve', '--model', 'tiny']))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "pip install 'krea_local[server]'" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_tls_speaks_to_who_trusts_the_bundle(tmp_path: Path) -> None:
    import ssl

    folder = tmp_path / "tls"
    with serving("--tls", folder=folder, ready=False) as server:
        assert server.url.startswith("https://127.0.0.1:")
        line = server.wait_for("SSL_CERT_FILE=")
        bundle = line.split("=", 1)[1]
        context = ssl.create_default_context(cafile=bundle)
        for name in ("localhost", "127.0.0.1"):
            url = server.url.replace("127.0.0.1", name)
            assert httpx.get(f"{url}/health/live", verify=context).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health/live")
        for file in (folder / "tls").iterdir():
            assert file.stat().st_mode & 0o077 == 0
        before = {file: file.read_bytes() for file in (folder / "tls").iterdir()}
        assert server.end() == 0
    with serving("--tls", folder=folder, ready=False) as server:
        assert {file: file.read_bytes() for file in (folder / "tls").iterdir()} == before
        environment = {
            **{name: value for name, value in os.environ.items() if "PROXY" not in name.upper()},
            "FAL_KEY": "local",
        }
        names = ("SSL_CERT_FILE", "FAL_RUN_HOST", "FAL_QUEUE_RUN_HOST")
        for name in names:
            environment[name] = server.wait_for(f"{name}=").split("=", 1)[1]
        code = (
            "import fal_client; print(fal_client.run('fal-ai/flux/krea', {'prompt': 'x', 'seed': 5,"
            "'num_inference_steps': 2, 'image_size': {'width': 128, 'height': 128}})['seed']);"
            "print(fal_client.submit('fal-ai/flux/krea', {'prompt': 'x', 'seed': 6,"
            "'num_inference_steps': 2, 'image_size': {'width': 128, 'height': 128}}).get()['seed'])"
        )
        pytest.importorskip("fal_client")
        answer = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert answer.stdout.split() == ["5", "6"], answer.stderr


def test_a_port_that_is_taken_is_told_in_one_line(server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    second = start("--port", port, folder=tmp_path / "second")
    try:
        assert second.process.wait(300) == 1
    finally:
        second.close()
    assert len(second.lines) == 1, second.lines
    assert port in second.lines[0]
