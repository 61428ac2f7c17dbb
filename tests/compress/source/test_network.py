"""Without a network: an answer at once, from the cache where it can be, and no attempt that takes time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.errors import MissingDependencyError
from compress.source import network
from compress.source.network import unreachable
from compress.source.resolve import resolve
from tests.fake_hub import FakeHub, serve

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were looked up, none of which resolves."""
    names: list[str] = []

    def getaddrinfo(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        names.append(f"{host}:{port}")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub, an empty cache, and the address of the hub in huggingface_hub's constants."""
    import huggingface_hub.constants as constants

    with serve() as fake:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        at(monkeypatch, fake.url)
        yield fake


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that huggingface_hub asked to sleep between its attempts: a clock of its own, nobody waits."""
    seconds: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("name", ["opt-125m", "hf:facebook/opt-125m", "facebook/opt-125m"])
@pytest.mark.usefixtures("hub")
def test_a_name_that_does_not_resolve(
    name: str, asked: list[str], waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "https://hub.invalid")
    with pytest.raises(MissingDependencyError, match=r"hub\.invalid: Name or service not known.*name its folder"):
        resolve(name)
    assert asked == ["hub.invalid:443"]
    assert waited == []


def test_the_cache_is_used_without_a_network(
    hub: FakeHub, tiny_model: Callable[[str], Path], waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/model"] = tiny_model("tiny_opt")
    first = resolve("org/model")
    at(monkeypatch, "https://hub.invalid")

    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert resolve("org/model") == first
    assert waited == []


def test_a_download_that_was_interrupted(
    hub: FakeHub, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.source.hub import download_config

    hub.repositories["org/model"] = tiny_model("tiny_opt")
    download_config("org/model", None, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDependencyError, match="not in the local cache"):
        resolve("org/model")


def test_offline_asks_nobody(hub: FakeHub, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDependencyError, match="HF_HUB_OFFLINE is set"):
        resolve("opt-125m")
    assert asked == []


def test_a_name_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: never.wait(60) and [])
    monkeypatch.setattr(network, "RESOLVE_SECONDS", 0.01)
    try:
        assert unreachable("https://hub.invalid") == "hub.invalid: no name server answered in 0.01 s"
    finally:
        never.set()


def test_a_server_that_is_there(hub: FakeHub) -> None:
    assert unreachable(hub.url) is None


def test_a_port_where_nobody_listens() -> None:
    assert unreachable("http://127.0.0.1:9") == "127.0.0.1:9: Connection refused"


@pytest.mark.parametrize(
    ("environment", "url", "host"),
    [
        ({}, "https://hub.invalid", "hub.invalid:443"),
        ({}, "http://hub.invalid:8080/path", "hub.invalid:8080"),
        ({"HTTPS_PROXY": "http://proxy.invalid:3128"}, "https://hub.invalid", "proxy.invalid:3128"),
        ({"https_proxy": "proxy.invalid:3128"}, "https://hub.invalid", "proxy.invalid:3128"),
        ({"HTTP_PROXY": "http://proxy.invalid:3128"}, "https://hub.invalid", "hub.invalid:443"),
        ({"ALL_PROXY": "socks5://proxy.invalid"}, "https://hub.invalid", "proxy.invalid:1080"),
        ({"HTTPS_PROXY": "http://proxy.invalid", "NO_PROXY": "hub.invalid"}, "https://hub.invalid", "hub.invalid:443"),
    ],
)
def test_the_address_that_decides(
    environment: dict[str, str], url: str, host: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert unreachable(url) is not None
    assert asked == [host]
