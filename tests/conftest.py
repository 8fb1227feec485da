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


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Fail whatever asks for another machine; loopback and Unix sockets stay.

    Python's sockets of this process: not those of subprocesses, nor of C++ (torch.distributed).
    """

    def local(host: Any) -> bool:
        host = host.decode() if isinstance(host, bytes) else host
        return host in (None, "", "localhost", "::1") or str(host).startswith("127.")

    def guarded(name: str, host_of: Any) -> Any:
        original = getattr(socket if name.startswith("get") else socket.socket, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not local(host_of(*args, **kwargs)):
                pytest.fail(f"{name}{args}: a test asked for the network")
            return original(*args, **kwargs)

        return call

    def peer(sock: socket.socket, address: Any) -> Any:
        return None if isinstance(address, (str, bytes)) else address[0]  # a Unix socket's path

    def host(host: Any, *args: Any, **kwargs: Any) -> Any:
        return host

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(name, peer))
        for name in ("getaddrinfo", "gethostbyname"):
            patch.setattr(socket, name, guarded(name, host))
        yield


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """Seven float32 nets with BatchNorm and dropout, in memory, and data they are good at."""
    return make_zoo(7, seed=0)


@pytest.fixture(scope="session")
def zoo64() -> Zoo:
    """Five float64 nets without buffers: for comparisons to 1e-8."""
    return make_zoo(5, seed=1, dtype=torch.float64, batch_norm=False)
