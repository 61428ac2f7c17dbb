"""Check in seconds that a server can be reached at all: the hub's own client tries five times before it gives up."""

from __future__ import annotations

import socket
import threading
import urllib.request
from urllib.parse import urlsplit

RESOLVE_SECONDS = 2.5
"""How long a name server may take; without a network some never answer."""
CONNECT_SECONDS = 10.0

_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}


def unreachable(url: str) -> str | None:
    """Why the server of `url`, or the proxy that leads to it, cannot be reached; None when it can.

    The name is resolved and a connection opened and closed; nothing is sent. Proxies are those of the environment, as
    urllib reads them (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY).
    """
    host, port = _address(_proxy(url) or url)
    found = _resolve(host, port)
    if isinstance(found, str):
        return f"{host}: {found}"
    problem = "no address"
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(CONNECT_SECONDS)
                connection.connect(address)
            return None
        except OSError as error:
            problem = error.strerror or str(error)
    return f"{host}:{port}: {problem}"


def _proxy(url: str) -> str | None:
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80)


def _resolve(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]] | str:
    """Addresses for a TCP connection, or why there are none."""
    found: list[list[tuple[int, int, int, str, tuple[object, ...]]] | str] = []

    def look() -> None:
        try:
            found.append([tuple(entry) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])  # type: ignore[misc]
        except (OSError, UnicodeError) as error:
            found.append(getattr(error, "strerror", None) or str(error))

    # A thread, since getaddrinfo takes no time limit; one that never returns must not keep the process alive.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    return found[0] if found else f"no name server answered in {RESOLVE_SECONDS:g} s"
