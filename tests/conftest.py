"""Small zoos that every test can afford, and no network for any."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a screen
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # scikit-learn checks inputs of the array API, too

import pytest
import torch
from hypothesis import settings

from .zoo import Zoo, make_zoo

# machines differ in speed: time is never asserted
settings.register_profile("sksoup", deadline=None)
settings.load_profile("sksoup")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def asked() -> Iterator[list[str]]:
    """What asked for another machine, which is refused; loopback and Unix sockets stay.

    Python's sockets of this process: not those of subprocesses, nor of C++ (torch.distributed).
    """
    found: list[str] = []
    near = (None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname())

    def check(host: Any) -> None:
        host = host.decode() if isinstance(host, bytes) else host
        if host not in near and not str(host).startswith("127."):
            found.append(str(host))
            raise OSError(f"a test asked for {host!r}")

    def connection(original: Any) -> Any:
        def connect(sock: socket.socket, address: Any) -> Any:
            # a Unix socket has a path; connecting a datagram socket sends nothing
            if not isinstance(address, (str, bytes)) and sock.type != socket.SOCK_DGRAM:
                check(address[0])
            return original(sock, address)

        return connect

    def look_up(original: Any) -> Any:
        def get(host: Any, *args: Any, **kwargs: Any) -> Any:
            check(host)
            return original(host, *args, **kwargs)

        return get

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, connection(getattr(socket.socket, name)))
        for name in ("getaddrinfo", "gethostbyname"):
            patch.setattr(socket, name, look_up(getattr(socket, name)))
        yield found


@pytest.fixture(autouse=True)
def _no_network(asked: list[str]) -> Iterator[None]:
    """Fail a test that asked for the network, even where its code went on without."""
    yield
    hosts, asked[:] = list(asked), []
    assert not hosts


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """Seven float32 nets with BatchNorm and dropout, in memory, and data they are good at."""
    return make_zoo(7, seed=0)


@pytest.fixture(scope="session")
def zoo64() -> Zoo:
    """Five float64 nets without buffers: for comparisons to 1e-8."""
    return make_zoo(5, seed=1, dtype=torch.float64, batch_norm=False)
