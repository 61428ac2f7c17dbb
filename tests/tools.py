"""What some tests need beside Python: NVIDIA's compiler and libraries, which `make test` installs on x86-64 Linux."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

import pytest

from tests.serve import SERVE, installed


def unavailable(reason: str) -> NoReturn:
    """Skip the test and say why; fail it where all of them have to run, which is in continuous integration."""
    if os.environ.get("REQUIRE_NVIDIA_TOOLS"):
        pytest.fail(f"REQUIRE_NVIDIA_TOOLS is set, and {reason}")
    pytest.skip(reason)


def require_server() -> None:
    """The Triton server of a package, and its client, in an environment of their own."""
    if not installed():
        unavailable(f"{SERVE} is not there: make test makes it, with a Triton server from a package")


@contextmanager
def triton_utilities(utilities: ModuleType) -> Iterator[None]:
    """`utilities` in the place of the module that only Triton has; what imports it is imported anew, here and after."""
    name = "triton_python_backend_utils"
    users = [f"export.triton.{module}" for module in ("answers", "model", "network")]
    before = {module: sys.modules.pop(module) for module in (name, *users) if module in sys.modules}
    sys.modules[name] = utilities
    try:
        yield
    finally:
        for module in (name, *users):
            sys.modules.pop(module, None)
        sys.modules.update(before)
