"""Graphs through NVIDIA's parser, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.architecture import Architecture
from compress.structures import Structure
from tests.export.cases import Chooser

SCRIPT = Path(__file__).with_name("rtx_parse.py")


def parse(path: Path, environment: dict[str, str], *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "said": done.stderr}


def selecting(arch: Architecture, choose: Callable[[Architecture, int, str], Structure | None]) -> Chooser:
    return lambda name, *_: choose(arch, int(name.split(".")[1]), name.split(".", 2)[2])
