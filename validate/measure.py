"""Run one of this project's commands and keep its wall time and peak memory: a process of its own, so that both are
those of the command alone.

python -m validate.measure FACTS.json MODULE ARGUMENT...
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from compress.cli.entry import run_cli


def main(argv: list[str]) -> int:
    """The command's exit code; {"seconds", "peak_bytes", "exit_code"} in FACTS.json, whatever becomes of it."""
    from export.memory import peak_rss

    facts, module, *arguments = argv
    start = time.monotonic()
    code = 1
    try:
        code = run_cli(importlib.import_module(module).main, arguments)
    finally:
        seconds = time.monotonic() - start
        Path(facts).write_text(json.dumps({"seconds": seconds, "peak_bytes": peak_rss(), "exit_code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
