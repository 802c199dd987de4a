"""The hosted API's protocol, spoken by its official Python client and by hand."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import inspect
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import LONG, SMALL, Server

pytest.importorskip("fastapi")
fal_client = pytest.importorskip("fal_client")

FalClientHTTPError = fal_client.client.FalClientHTTPError
# `.ci/run` runs this file with 0.10 too, which has no place for these.
TELLS_ERRORS = "error_type" in {field.name for field in dataclasses.fields(fal_client.Completed)}
CHOOSES_REPOSITORY = "repository" in inspect.signature(fal_client.SyncClient.upload).parameters
CHOOSES_TOKEN = "use_jwt" in inspect.signature(fal_client.SyncClient.realtime).parameters

# The official client leaves connections of its uploads open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KREA = "fal-ai/flux/krea"
REDRAW = f"{KREA}/image-to-image"
FOX: dict[str, Any] = {"prompt": "a red fox in fresh snow", "seed": 7, **SMALL}


@pytest.fixture
def pointed(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The official client's module, pointed at the server."""
    from fal_client import client

    monkeypatch.setattr(client, "RUN_URL_FORMAT", f"{server.url}/run/")
    monkeypatch.setattr(client, "QUEUE_URL_FORMAT", f"{server.url}/queue/")
    monkeypatch.setattr(client, "REALTIME_URL_FORMAT", f"{server.url.replace('http', 'ws')}/run/")
    monkeypatch.setattr(client, "REST_URL", f"{server.url}/rest")
    monkeypatch.setattr(client, "CDN_URL", f"{server.url}/cdn")
    yield server
    gc.collect()  # what the client left open warns here, where it is expected


@pytest.fixture
def fal(pointed: Server) -> Any:
    return fal_client.SyncClient(key="local")


@pytest.fixture
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def picture(color: str = "teal", size: tuple[int, int] = (96, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def wait_until(web: httpx.Client, job_id: str, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    while (job := web.get(f"/api/jobs/{job_id}").json())["state"] not in states:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return job


def test_run_gives_the_hosted_apis_output(fal: Any, web: httpx.Client) -> None:
    output = fal.run(KREA, FOX)
    assert sorted(output) == ["has_nsfw_concepts", "images", "prompt", "seed", "timings"]
    assert output["seed"] == 7
    assert output["prompt"] == FOX["prompt"]
    assert output["has_nsfw_concepts"] == [False]
    assert output["timings"]["inference"] > 0
    (image,) = output["images"]
    assert (image["width"], image["height"]) == (128, 128)
    assert image["content_type"] == "image/jpeg"
    drawn = Image.open(io.BytesIO(web.get(image["url"]).content))
    assert (drawn.format, drawn.size) == ("JPEG", (128, 128))


def test_subscribe_tells_of_the_queue_and_the_log(fal: Any) -> None:
    seen: list[Any] = []
    ids: list[str] = []
    output = fal.subscribe(
        KREA, FOX, with_logs=True, on_queue_update=seen.append, on_enqueue=ids.append
    )
    assert output["seed"] == 7
    assert isinstance(seen[-1], fal_client.Completed)
    assert seen[-1].metrics["inference_time"] > 0
    assert getattr(seen[-1], "error", None) is None
    assert len(ids) == 1
    for line in seen[-1].logs:
        assert set(line) == {"message", "level", "source", "timestamp"}
    assert seen[-1].logs


def test_a_submitted_job_is_the_same_picture_as_a_run(fal: Any, web: httpx.Client) -> None:
    handle = fal.submit(KREA, {**FOX, "num_images": 2, "output_format": "png"})
    output = handle.get()
    assert isinstance(handle.status(with_logs=True), fal_client.Completed)
    assert output == fal.result(KREA, handle.request_id)
    other = fal.run(KREA, {**FOX, "seed": 8, "output_format": "png"})
    second, again = (web.get(one["images"][-1]["url"]).content for one in (output, other))
    assert second == again
    assert output["images"][0]["content_type"] == "image/png"


def test_a_job_that_runs_and_one_that_waits_are_cancelled(fal: Any, web: httpx.Client) -> None:
    running = fal.submit(KREA, {"prompt": "long", **LONG})
    wait_until(web, running.request_id, "running")
    waiting = fal.submit(REDRAW.replace("/image-to-image", ""), {"prompt": "later", **LONG})
    status = waiting.status()
    assert isinstance(status, fal_client.Queued)
    assert status.position == 0
    for handle in (waiting, running):
        handle.cancel()
        wait_until(web, handle.request_id, "cancelled")
        ended = handle.status()
        assert isinstance(ended, fal_client.Completed)
        assert not TELLS_ERRORS or ended.error_type == "client_cancelled"
        with pytest.raises(FalClientHTTPError) as raised:
            handle.get()
        assert raised.value.status_code == 499
        assert not TELLS_ERRORS or raised.value.error_type == "client_cancelled"
        assert raised.value.response.headers["x-fal-error-type"] == "client_cancelled"
        with pytest.raises(FalClientHTTPError) as raised:
            handle.cancel()
        assert raised.value.status_code == 400
        assert raised.value.response.json() == {"status": "ALREADY_COMPLETED"}
    assert fal.run(KREA, FOX)["seed"] == 7


def test_stream_shows_the_picture_as_it_comes(fal: Any, web: httpx.Client) -> None:
    events = list(fal.stream(KREA, {**FOX, "num_inference_steps": 8, "num_images": 3}))
    assert len(events) >= 2
    for event in events:
        assert sorted(event) == ["has_nsfw_concepts", "images", "prompt", "seed", "timings"]
        assert len(event["images"]) == 1
        assert event["seed"] == 7
    assert events[0]["images"][0]["url"].startswith("data:image/jpeg;base64,")
    assert web.get(events[-1]["images"][0]["url"]).status_code == 200


def test_the_asynchronous_client_does_all_of_it(pointed: Server) -> None:
    async def all_of_it() -> None:
        fal = fal_client.AsyncClient(key="local")
        output = await fal.run(KREA, FOX)
        assert output["seed"] == 7
        seen: list[Any] = []
        again = await fal.subscribe(KREA, FOX, with_logs=True, on_queue_update=seen.append)
        assert again["images"][0]["width"] == 128
        assert isinstance(seen[-1], fal_client.Completed)
        events = [event async for event in fal.stream(KREA, FOX)]
        assert events[-1]["seed"] == 7
        handle = await fal.submit(KREA, FOX)
        assert (await handle.get())["seed"] == 7
        url = await fal.upload_image(picture(), "png")
        redrawn = await fal.run(
            REDRAW, {"prompt": "x", "image_url": url, "num_inference_steps": 10, "strength": 0.2}
        )
        assert redrawn["images"][0]["width"] == 96
        client = fal._client
        await (await client if inspect.isawaitable(client) else client).aclose()

    asyncio.run(all_of_it())


@pytest.mark.parametrize("repository", ["fal_v3", "fal"] if CHOOSES_REPOSITORY else [None])
def test_uploads_come_back_and_can_be_redrawn(
    fal: Any, web: httpx.Client, tmp_path: Path, repository: str | None
) -> None:
    data = png(picture())
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    where = {} if repository is None else {"repository": repository}
    urls = [
        fal.upload(data, "image/png", **where),
        fal.upload_file(path, **where),
        fal.upload_image(picture(), "png", **where),
    ]
    for url in urls:
        assert web.get(url).content == data
    arguments = {"prompt": "x", "num_inference_steps": 10, "strength": 0.2, "seed": 1}
    outputs = [
        fal.run(REDRAW, {**arguments, "image_url": url})
        for url in (urls[0], fal_client.encode_image(picture(), "png"))
    ]
    pictures = [web.get(one["images"][0]["url"]).content for one in outputs]
    assert pictures[0] == pictures[1]


def test_a_file_over_the_limit_is_refused(web: httpx.Client) -> None:
    def trickle() -> Iterator[bytes]:
        for _ in range(51):
            yield b"\x89PNG\r\n\x1a\n" + bytes(2**20)

    answer = web.post("/cdn/files/upload", content=trickle(), headers={"content-type": "image/png"})
    assert answer.status_code == 413
    answer = web.post("/cdn/files/upload/multipart", headers={"content-type": "image/png"})
    assert answer.status_code == 413
    answer = web.post("/rest/storage/upload/initiate-multipart", json={})
    assert answer.status_code == 413


def test_what_is_no_image_is_not_kept(web: httpx.Client) -> None:
    for data in (b"", b"<script>alert(1)</script>", b"GIF89a", png(picture())[:40]):
        answer = web.post("/cdn/files/upload", content=data, headers={"content-type": "image/png"})
        assert answer.status_code == 422, data
    assert web.put("/rest/storage/upload/" + "0" * 32, content=b"x").status_code == 404


def test_an_argument_that_is_wrong_is_named(fal: Any) -> None:
    with pytest.raises(FalClientHTTPError) as raised:
        fal.run(KREA, {"prompt": "x", "num_inference_steps": 99, "unknown": 1})
    assert raised.value.status_code == 422
    (fault,) = raised.value.response.json()["detail"]
    assert fault["loc"] == ["body", "num_inference_steps"]
    assert fault["type"] == "less_than_equal"
    with pytest.raises(FalClientHTTPError) as raised:
        fal.submit(KREA, {"prompt": "x" * 10_001})
    assert raised.value.response.json()["detail"][0]["type"] == "string_too_long"


def test_other_endpoints_say_how_to_have_them(fal: Any, web: httpx.Client) -> None:
    with pytest.raises(FalClientHTTPError) as raised:
        fal.run("fal-ai/flux/dev", FOX)
    assert raised.value.status_code == 404
    assert "krea-local serve --model dev" in str(raised.value)
    for path in ("/run/fal-ai/flux/schnell", "/queue/fal-ai/nothing", "/fal-ai/flux/krea/redux"):
        answer = web.post(path, json=FOX)
        assert answer.status_code == 404
        assert "fal-ai/flux/krea" in answer.json()["detail"]
    assert web.get("/x").json() == {"detail": "Path /x not found"}
    assert web.post("/x/y", json={}).json() == {"detail": "Path /x/y not found"}


def test_status_is_202_until_it_is_200_and_the_result_waits(
    server: Server, web: httpx.Client
) -> None:
    told = web.post(f"/queue/{KREA}", json={"prompt": "long", **LONG}).json()
    assert told["status"] == "IN_QUEUE"
    assert told["logs"] is None
    assert told["metrics"] == {}
    place = f"{server.url}/queue/fal-ai/flux/requests/{told['request_id']}"
    assert told["response_url"] == place
    answer = web.get(told["status_url"], params={"logs": "1"})
    assert answer.status_code == 202
    assert answer.headers["x-fal-request-id"] == told["request_id"]
    wait_until(web, told["request_id"], "running")
    status = web.get(told["status_url"] + "/").json()  # the other slash form
    assert status["status"] == "IN_PROGRESS"
    assert status["logs"] is None
    assert isinstance(web.get(f"{place}/status?logs=true").json()["logs"], list)
    answer = web.get(told["response_url"])
    assert answer.status_code == 400
    assert answer.json()["detail"] == "Request is still in progress"
    answer = web.put(told["cancel_url"])
    assert (answer.status_code, answer.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    wait_until(web, told["request_id"], "cancelled")
    assert web.get(told["status_url"]).status_code == 200


def test_requests_that_are_not_there_are_not_found(web: httpx.Client) -> None:
    job_id = web.post(f"/queue/{KREA}", json=FOX).json()["request_id"]
    for place in ("fal-ai/flux/requests/nope", f"fal-ai/flux-1/requests/{job_id}"):
        assert web.get(f"/queue/{place}").status_code == 404
        assert web.get(f"/queue/{place}/status").status_code == 404
        answer = web.put(f"/queue/{place}/cancel")
        assert (answer.status_code, answer.json()) == (404, {"status": "NOT_FOUND"})
    wait_until(web, job_id, "done")
    assert web.get(f"/queue/fal-ai/flux/requests/{job_id}/response").json()["seed"] == 7
    # A path with all of the endpoint's name is understood too.
    assert web.get(f"/queue/{KREA}/requests/{job_id}/status").json()["status"] == "COMPLETED"


def test_the_status_stream_tells_each_line_once_and_ends(web: httpx.Client) -> None:
    job_id = web.post(f"/queue/{KREA}", json={**FOX, "num_inference_steps": 8}).json()["request_id"]
    place = f"/queue/fal-ai/flux/requests/{job_id}/status"
    told = [
        json.loads(line.removeprefix("data: "))
        for line in web.get(f"{place}/stream?logs=1").text.splitlines()
        if line.startswith("data: ")
    ]
    assert told[-1]["status"] == "COMPLETED"
    lines = [line["message"] for status in told for line in status.get("logs") or []]
    assert lines == [line["message"] for line in web.get(f"{place}?logs=1").json()["logs"]]
    (only,) = [
        json.loads(line.removeprefix("data: "))
        for line in web.get(f"{place}/stream").text.splitlines()
        if line.startswith("data: ")
    ]
    assert only["status"] == "COMPLETED"
    assert only["logs"] is None


def test_sync_mode_gives_the_same_bytes_inline(web: httpx.Client) -> None:
    inline = web.post(f"/run/{KREA}", json={**FOX, "sync_mode": True}).json()["images"][0]["url"]
    by_url = web.post(f"/{KREA}/", json=FOX).json()["images"][0]["url"]
    head, _, data = inline.partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) == web.get(by_url).content


def test_who_hangs_up_cancels_the_run(server: Server, web: httpx.Client) -> None:
    body = json.dumps({"prompt": "hang up", **LONG}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(
            f"POST /run/{KREA} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json"
            f"\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        deadline = time.monotonic() + 300
        while True:
            newest = web.get("/api/jobs?limit=1").json()["jobs"][0]
            if newest["arguments"]["prompt"] == "hang up" and newest["state"] == "running":
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
    job = wait_until(web, newest["id"], "cancelled", "done")
    assert job["state"] == "cancelled"


def test_who_hangs_up_a_stream_cancels_it_too(server: Server, web: httpx.Client) -> None:
    arguments = {"prompt": "stream", **LONG}
    with web.stream("POST", f"/run/{KREA}/stream", json=arguments) as answer:
        job_id = answer.headers["x-fal-request-id"]
        next(answer.iter_lines())
    assert wait_until(web, job_id, "cancelled", "done")["state"] == "cancelled"


def test_a_run_that_cannot_start_in_time_fails_as_the_user_asked(web: httpx.Client) -> None:
    ahead = [web.post(f"/queue/{KREA}", json={"prompt": "ahead", **LONG}).json() for _ in range(2)]
    answer = web.post(f"/run/{KREA}", json=FOX, headers={"X-Fal-Request-Timeout": "1.1"})
    assert answer.status_code == 504
    assert answer.headers["x-fal-error-type"] == "request_timeout"
    assert answer.headers["x-fal-request-timeout-type"] == "user"
    for one in ahead:
        web.put(one["cancel_url"])
        wait_until(web, one["request_id"], "cancelled")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        *(("X-Fal-Request-Timeout", one) for one in ("", "x", "0", "-1", "nan", "inf", "1e99")),
        ("X-Fal-Queue-Priority", "high"),
    ],
)
def test_headers_that_mean_nothing_are_refused(web: httpx.Client, header: str, value: str) -> None:
    answer = web.post(f"/queue/{KREA}", json=FOX, headers={header: value})
    assert answer.status_code == 400
    assert answer.headers["x-fal-error-type"] == "bad_request"


@pytest.mark.parametrize("url", ["", "x", "ftp://a/b", "http://", "http://[", "file:///etc/passwd"])
def test_a_webhook_is_a_url(web: httpx.Client, url: str) -> None:
    answer = web.post(f"/queue/{KREA}", json=FOX, params={"fal_webhook": url})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "fal_webhook"]


def test_low_priority_waits_for_the_others(web: httpx.Client) -> None:
    ahead = web.post(f"/queue/{KREA}", json={"prompt": "ahead", **LONG}).json()
    wait_until(web, ahead["request_id"], "running")
    low = {"X-Fal-Queue-Priority": "low"}
    last = web.post(f"/queue/{KREA}", json=FOX, headers=low).json()
    first = web.post(f"/queue/{KREA}", json=FOX).json()
    positions = [web.get(one["status_url"]).json()["queue_position"] for one in (first, last)]
    assert positions == [0, 1]
    web.put(ahead["cancel_url"])
    for one in (first, last):
        wait_until(web, one["request_id"], "done")


def test_the_javascript_clients_proxy_is_served(web: httpx.Client) -> None:
    def through(method: str, target: str, **options: Any) -> httpx.Response:
        return web.request(method, "/proxy", headers={"x-fal-target-url": target}, **options)

    assert through("POST", f"https://fal.run/{KREA}", json=FOX).json()["seed"] == 7
    told = through("POST", f"https://queue.fal.run/{KREA}", json=FOX).json()
    wait_until(web, told["request_id"], "done")
    place = f"https://queue.fal.run/fal-ai/flux/requests/{told['request_id']}"
    assert through("GET", f"{place}/status?logs=1").json()["logs"]
    assert through("GET", place).json()["seed"] == 7
    upload = through(
        "POST",
        "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3",
        json={"content_type": "image/png", "file_name": "a.png"},
    ).json()
    data = png(picture())
    for _ in range(2):  # a retry does no harm
        assert web.put(upload["upload_url"], content=data).status_code == 200
    assert web.get(upload["file_url"]).content == data


def test_a_file_is_served_as_what_it_is_and_nothing_more(web: httpx.Client) -> None:
    data = png(picture())
    name = b'../../"evil\r\n.html'.decode("latin-1").replace("\r\n", "")
    headers = {"content-type": "text/html", "x-fal-file-name": name}
    url = web.post("/cdn/files/upload", content=data, headers=headers).json()["access_url"]
    answer = web.get(url)
    assert answer.content == data
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"].startswith("inline")
    assert "/" not in answer.headers["content-disposition"]
    assert "immutable" in answer.headers["cache-control"]
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = web.head(url)
    assert head.status_code == 200
    assert head.headers["content-length"] == str(len(data))
    part = web.get(url, headers={"range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, data[1:4])
    for job_id in ("nope", "0" * 32, "..%2F..%2Fetc%2Fpasswd", "%00", "%E2%80%AE"):
        assert web.get(f"/files/{job_id}").status_code == 404


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1:1/x.png",
        "http://[::1]/x.png",
        "data:,",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,!",
        "http://[",
        "https://",
        "http://localhost/files/00000000000000000000000000000000",
        "ftp://a/b.png",
        "",
    ],
)
def test_an_image_that_may_not_or_cannot_be_read_is_the_callers_fault(
    web: httpx.Client, url: str
) -> None:
    answer = web.post(f"/run/{REDRAW}", json={"prompt": "x", "image_url": url})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "image_url"]


def test_the_server_tells_how_it_is(web: httpx.Client) -> None:
    assert web.get("/health/live").status_code == 200
    assert web.get("/health/ready").status_code == 200
    web.post(f"/run/{KREA}", json=FOX)
    text = web.get("/metrics").text
    assert 'krea_local_jobs_total{endpoint="fal-ai/flux/krea",state="done"}' in text
    assert 'krea_local_stage_seconds_count{stage="denoise"}' in text
    assert "krea_local_queue_length 0.0" in text
    assert "krea_local_ready 1.0" in text


def test_the_openapi_document_describes_what_is_here(web: httpx.Client) -> None:
    document = web.get("/openapi.json").json()
    assert f"/run/{KREA}" in document["paths"]
    assert "/run/fal-ai/flux/dev" not in document["paths"]
    body = document["paths"][f"/queue/{REDRAW}"]["post"]["requestBody"]["content"]
    name = body["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = document["components"]["schemas"][name]
    assert schema["properties"]["strength"]["default"] == 0.95
    assert schema["properties"]["guidance_scale"]["default"] == 4.5
    assert set(schema["required"]) == {"prompt", "image_url"}
    for reference in {one.split('"')[0] for one in json.dumps(document).split('"#/')[1:]}:
        found: Any = document
        for part in reference.split("/"):
            found = found[part]


def test_realtime_draws_call_after_call(fal: Any) -> None:
    pytest.importorskip("msgpack")
    pytest.importorskip("websockets")
    for token in [{"use_jwt": True}, {"use_jwt": False}] if CHOOSES_TOKEN else [{}]:
        with fal.realtime(KREA, **token) as connection:
            for seed in (7, 8):
                connection.send({**FOX, "seed": seed})
                output = connection.recv()
                assert output["seed"] == seed
                assert output["images"][0]["url"].startswith("data:image/jpeg;base64,")
            connection.send({"prompt": "x", "num_images": 9})
            with pytest.raises(fal_client.client.RealtimeError, match="num_images"):
                connection.recv()
            connection.send(FOX)
            assert connection.recv()["seed"] == 7
    with fal.realtime(KREA) as connection:
        connection.send({**FOX, "num_inference_steps": 50})
        connection.send(FOX)
        connection.send({**FOX, "prompt": "x" * 2**21})
        with pytest.raises(fal_client.client.RealtimeError, match="2 calls|1 calls"):
            connection.recv()
        assert connection.recv()["seed"] == 7
    with fal.realtime("fal-ai/flux/dev") as connection:
        connection.send(FOX)
        with pytest.raises(fal_client.client.RealtimeError, match="--model dev"):
            connection.recv()
