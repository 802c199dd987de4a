"""HTTP to addresses that others name, and to no others than may be dialled.

Every address that a name resolves to is judged, and a judged address is dialled: there is no second
resolution between. Neither proxies nor anything else is taken from the environment. Knows nothing
of what is fetched or sent.

Source of the networks: IANA's registries of special-purpose addresses.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpcore
import httpx

if TYPE_CHECKING:
    from httpcore import SOCKET_OPTION

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a host name, as text."""

CONNECT_SECONDS = 10.0
MAX_URL = 8192


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


NEVER = _networks(
    # This host, link-local (cloud metadata), protocol assignments, documentation, benchmarking,
    # AS112, AMT, 6to4 relays, Azure's wire server, multicast, reserved.
    *(
        "0.0.0.0/8",
        "169.254.0.0/16",
        "192.0.0.0/24",
        "100.100.100.200/32",
        "192.0.2.0/24",
        "192.31.196.0/24",
    ),
    *("192.52.193.0/24", "192.88.99.0/24", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "168.63.129.16/32", "224.0.0.0/4", "240.0.0.0/4"),
    # IPv4 in IPv6, by which a gateway may reach inside: compatible, NAT64, 6to4, Teredo, ISATAP's
    # kin. Mapped addresses (::ffff:0:0/96) are judged as what they stand for.
    *("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/23", "2002::/16"),
    # Discard, dummy, documentation, AS112, SRv6, link-local, site-local, multicast; AWS's metadata.
    *("100::/64", "100:0:0:1::/64", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20", "5f00::/16"),
    *("fe80::/10", "fec0::/10", "ff00::/8", "fd00:ec2::/32", "fd20:ce::254/128"),
)
"""Networks that are dialled in no case, though ::1 within one of them may be; see PRIVATE."""

PRIVATE = _networks(
    *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
    *("::1/128", "fc00::/7"),
)
"""This machine, home networks, and those of providers and virtual private networks."""


class Refused(Exception):
    """A URL or address that is not dialled; says why."""


@dataclass(frozen=True)
class Rules:
    """Where may be dialled.

    Attributes:
        private: private addresses too, this machine's among them.
        resolve: finds the addresses of names; by default as the system does.
        network: dials addresses; by default as the system does.
    """

    private: bool = False
    resolve: Resolver | None = None
    network: httpcore.AsyncNetworkBackend | None = None


@dataclass(frozen=True)
class Answer:
    """The head of an HTTP answer, and its body as it arrives.

    Attributes:
        status: of HTTP.
        headers: by their names in lower case.
        body: in pieces.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


def may_dial(text: str, *, private: bool) -> bool:
    """Whether an address may be dialled."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        address = address.ipv4_mapped or address
    if address == ipaddress.IPv6Address("::1"):  # lies in ::/96
        return private
    if any(address in network for network in NEVER):  # metadata services, in private ranges too
        return False
    if any(address in network for network in PRIVATE):
        return private
    return address.is_global


def parse_url(url: str, base: str | None = None) -> httpx.URL:
    """A URL that may be asked for, if its host's addresses may be dialled.

    Args:
        url: as given.
        base: what it is relative to, for a redirect.

    Raises:
        Refused: not http or https, with credentials, or no URL at all.
    """
    if len(url) > MAX_URL:
        raise Refused("the URL is too long")
    if any(ord(character) <= 32 or character in "\\\x7f" for character in url):
        # Where parsers disagree on the host, somebody is being fooled.
        raise Refused("the URL holds a space, a backslash or a control character")
    try:
        parsed = httpx.URL(url) if base is None else httpx.URL(base).join(url)
        host = parsed.raw_host
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise Refused(f"is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https"):
        raise Refused("only http and https are fetched")
    if parsed.userinfo:
        raise Refused("a URL with a user name or password is not fetched")
    if not host or b"%" in host:
        raise Refused("the URL names no host")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise Refused(f"the URL's port {parsed.port} is none")
    return parsed


@asynccontextmanager
async def ask(
    method: str,
    url: httpx.URL,
    rules: Rules,
    *,
    headers: Mapping[str, str],
    content: bytes = b"",
) -> AsyncIterator[Answer]:
    """Send a request and have the head of its answer; follows no redirect, takes no cookie.

    Nothing here bounds the whole time: wrap it in `asyncio.wait_for`.

    Raises:
        Refused: an address of the host may not be dialled.
        OSError: it cannot be reached, or does not speak HTTP.
    """
    sent = {"Host": url.netloc.decode("ascii"), "User-Agent": "krea-local", **headers}
    if content:
        sent["Content-Length"] = str(len(content))
    dialler = _Dialler(rules)
    try:
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=_ssl_context(), network_backend=dialler, max_connections=1
            ) as pool,
            pool.stream(
                method,
                httpcore.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                ),
                headers=[(name.encode(), value.encode()) for name, value in sent.items()],
                content=content,
                extensions={"timeout": {"connect": CONNECT_SECONDS}},
            ) as response,
        ):
            head = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in response.headers
            }
            yield Answer(response.status, head, response.aiter_stream())
    except (
        httpcore.NetworkError,
        httpcore.TimeoutException,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
    ) as error:
        raise OSError(str(error) or type(error).__name__) from error


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


class _Dialler(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were judged, and to nothing else."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._network = rules.network or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in await judged_addresses(host, self._rules):
            try:
                return await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise Refused("unix sockets are not dialled")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


async def judged_addresses(host: str, rules: Rules) -> list[str]:
    """The addresses of `host`, every one of which may be dialled.

    Raises:
        Refused: one of them may not: a name that leads both ways is no honest one.
        httpcore.ConnectError: it has none.
    """
    resolve = rules.resolve or system_addresses
    found = list(dict.fromkeys(await resolve(host.strip("[]"))))
    if not found:
        raise httpcore.ConnectError(f"{host} has no address")
    for address in found:
        if not may_dial(address, private=rules.private):
            raise Refused(f"{host} is at an address that is not asked from here")
    return found


# A name server that does not answer holds a thread for as long as it likes: not the loop's own.
_resolving = ThreadPoolExecutor(8, thread_name_prefix="name resolution")


async def system_addresses(host: str) -> list[str]:
    """What the system's resolver says."""
    loop = asyncio.get_running_loop()
    look_up = functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        found = await loop.run_in_executor(_resolving, look_up)
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"{host} is not known: {error}") from error
    return [str(one[4][0]) for one in found]
