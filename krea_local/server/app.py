"""The web application: the service behind its wall, and the process that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from krea_local._version import __version__
from krea_local.endpoints import ENDPOINTS, HttpError
from krea_local.errors import KreaError
from krea_local.server import answers, fal, openai, own, realtime, shapes, uploads
from krea_local.server.answers import STOP_SECONDS, Refusal, answer
from krea_local.server.guard import Guard, Keys
from krea_local.server.metrics import CONTENT_TYPE, Metrics
from krea_local.server.proxy import Proxy
from krea_local.server.service import QueueFull, Service, Unavailable
from krea_local.server.settings import Settings
from krea_local.server.web import Web

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
READY_SECONDS = 0.2
BACKLOG = 2048
MAX_HEAD = 2**19  # bytes; one read may bring 256 KiB, the beginning of the body among them
HEAD_SECONDS = 30.0


class Http(HttpToolsProtocol):
    """HTTP whose heads are bounded in size and time; uvicorn's own are not."""

    _head: int | None = 0  # bytes so far; None once the head is whole
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there, and has to begin."""
        super().connection_made(transport)
        # A head and its body are two packets: with Nagle's algorithm the second waits for the
        # client's word on the first, 40 ms. asyncio sees to that for sockets that it binds itself.
        own = transport.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._in_time()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head = 0
        self._in_time()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._head = None
        self._in_time()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """More of it is here."""
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.send_400_response("The request's head is too large.")
                return
        super().data_received(data)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()


class App(FastAPI):
    """FastAPI with the wall around all of it, its answers to what nobody foresaw included.

    Attributes:
        web: what the handlers share.
    """

    web: Web
    keys: Keys

    def build_middleware_stack(self) -> ASGIApp:
        """What a request goes through, from outside in."""
        inner = super().build_middleware_stack()
        return Proxy(Guard(inner, self.web.settings, self.keys))


def create_app(settings: Settings, service: Service | None = None) -> App:
    """The application; its lifespan starts and stops the service.

    Args:
        settings: what it is to be like.
        service: in place of one made from `settings`.
    """
    web = Web(settings, Service(settings) if service is None else service)
    keys = Keys.of(settings.api_key)
    metrics = Metrics(web.service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        web.service.on_finished = metrics.finished
        web.service.payload = functools.partial(answers.payload, web)
        try:
            await web.service.start()
        except KreaError as error:
            web.failure = error
            raise
        stopping = asyncio.create_task(_stop_when_told(web))
        yield
        web.stopping.set()
        await stopping
        if web.background:
            await asyncio.wait(web.background, timeout=1)
        await web.service.close()

    app = App(
        title="krea_local",
        version=__version__,
        description="The hosted API's endpoints, from your own GPU.",
        lifespan=lifespan,
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.web, app.keys = web, keys
    _add_errors(app, web)
    fal.add_routes(app, web)
    realtime.add_routes(app, web)
    uploads.add_routes(app, web, keys)
    openai.add_routes(app, web)
    own.add_routes(app, web)
    _add_health(app, web, metrics)
    _describe(app, web)
    return app


async def _stop_when_told(web: Web) -> None:
    await web.stopping.wait()
    await web.service.wind_down(seconds=STOP_SECONDS)
    web.stopped.set()


def _add_errors(app: FastAPI, web: Web) -> None:
    async def told(request: HttpRequest, error: Exception) -> Response:
        found, headers = answers.error_of(error)
        if found.status == 500:
            logger.error("%s", error, exc_info=error)
        return answers.refused(request.url.path, found, headers)

    async def http(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = HttpError(error.status_code, None, {"detail": error.detail})
        if error.status_code == 404:
            found = fal.not_here(web, request.scope["path"])
        return answers.refused(request.url.path, found, error.headers)

    async def gone(_: HttpRequest, __: Exception) -> Response:
        return Response(status_code=499)

    for kind in (KreaError, Refusal, QueueFull, Unavailable, Exception):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)


def _add_health(app: FastAPI, web: Web, metrics: Metrics) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Response:
        return answer({"status": "ok"})

    @app.get(
        "/health/ready", tags=["health"], responses={503: {"description": "No model is loaded."}}
    )
    async def ready() -> Response:
        if web.service.ready and not web.stopping.is_set():
            return answer({"status": "ok"})
        reasons = [worker.reason for worker in web.service.workers() if worker.reason]
        why = "stopping" if web.stopping.is_set() else "; ".join(reasons) or "loading the model"
        return answer({"status": "unavailable", "detail": why}, 503)

    @app.get("/metrics", include_in_schema=False)
    async def read_metrics() -> Response:
        return Response(metrics.read(), media_type=CONTENT_TYPE)

    @app.get("/.well-known/jwks.json", include_in_schema=False)
    async def jwks() -> Response:
        headers = {"cache-control": "public, max-age=3600"}
        return answer(web.service.jwks(), headers=headers)


def _describe(app: FastAPI, web: Web) -> None:
    """Let the OpenAPI document hold the loaded model's endpoints, and their own schemas."""
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        here = {one.id for one in ENDPOINTS.values() if one.model == web.service.model}
        document["paths"] = {
            path: methods
            for path, methods in document["paths"].items()
            if not path.startswith(("/run/fal-ai", "/queue/fal-ai"))
            or set(methods["post"]["tags"]) <= here
        }
        document.setdefault("components", {}).setdefault("schemas", {}).update(shapes.schemas())
        document["components"]["securitySchemes"] = {
            "key": {
                "type": "apiKey",
                "in": "header",
                "name": "Authorization",
                "description": '"Key …" or "Bearer …", if the server was started with a key.',
            }
        }
        document["security"] = [{}, {"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class _Server(uvicorn.Server):
    """Ends in good order at the first signal, at once at the second."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: App,
        on_listening: Callable[[str], None],
        on_ready: Callable[[str], None],
        on_stopping: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._app = app
        self._on_listening = on_listening
        self._on_ready = on_ready
        self._on_stopping = on_stopping

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            self._app.web.address = _named(address, self._app.web.settings)
            self._on_listening(self._app.web.address)
            self._telling = asyncio.create_task(_tell_when_ready(self._app.web, self._on_ready))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Unlike uvicorn's, a signal that was obeyed is not raised again: ending well exits with 0.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            self._on_stopping()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        done = await super().on_tick(counter)
        if done:
            self._app.web.stopping.set()
        return done


def serve(
    settings: Settings,
    *,
    on_listening: Callable[[str], None],
    on_ready: Callable[[str], None],
    on_stopping: Callable[[], None] = lambda: None,
    certificate: tuple[str, str] | None = None,
) -> None:
    """Serve until a signal says otherwise.

    Args:
        settings: what the server is to be like.
        on_listening: called with the address once it listens.
        on_ready: called with a sentence once a model is loaded, or cannot be.
        certificate: files of a certificate and its key, for HTTPS.

    Raises:
        OSError: the address cannot be listened on.
        KreaError: the service cannot start; its folder is in use, for instance.
    """
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",  # what fails in a handler is logged by `_add_errors`
        access_log=False,
        proxy_headers=False,  # whoever asks could name any scheme and address in them
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(STOP_SECONDS) + 5,
        limit_concurrency=None,
        http=Http,
        ssl_certfile=certificate and certificate[0],
        ssl_keyfile=certificate and certificate[1],
    )
    server = _Server(config, app, on_listening, on_ready, on_stopping)

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Bound here, so that a port in use is told before a model is loaded, and in one line.
    with socket.create_server((settings.host, settings.port), family=family) as listening:
        listening.listen(BACKLOG)
        try:
            asyncio.run(server.serve([listening]))
        except SystemExit:  # uvicorn's word for an application that did not start
            if app.web.failure is not None:
                raise app.web.failure from None
            raise


def _named(address: str, settings: Settings) -> str:
    """The address with a name that others can use, where the server listens on all addresses."""
    name = settings.hosts[0] if settings.hosts else "localhost"
    return address.replace("//0.0.0.0:", f"//{name}:").replace("//[::]:", f"//{name}:")


async def _tell_when_ready(web: Web, on_ready: Callable[[str], None]) -> None:
    """Say once that a model is loaded, and each new reason why none is."""
    told = ""
    while not web.service.ready and not web.stopping.is_set():
        reasons = sorted({worker.reason for worker in web.service.workers() if worker.reason})
        if reasons and told != (told := "; ".join(reasons)):
            on_ready(f"no model is loaded: {told}")
        await asyncio.sleep(READY_SECONDS)
    if web.stopping.is_set():
        return
    labels = sorted({worker.model for worker in web.service.workers() if worker.model})
    on_ready(f"ready: {', '.join(labels) or web.service.model}")
