"""Peak resident memory of one exported model: run by validate/speed/__main__.py in a process of its own.

python -m validate.speed.memory MODEL.onnx THREADS TOKENS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.cli.entry import run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Load, prefill, decode four tokens, print {"before_load", "peak"} as JSON."""
    argv = sys.argv[1:] if argv is None else argv
    import onnxruntime  # noqa: F401  (loaded before the first reading: the library is not the model)

    from export.memory import peak_rss
    from export.runtime.ort import OrtRunner

    path, threads, tokens = Path(argv[0]), int(argv[1]), int(argv[2])
    before = peak_rss()
    runner = OrtRunner(path, threads=threads)
    room = max(1, min(tokens, int(runner.metadata["max_positions"]) - 4))
    runner.prefill([[index % runner.vocabulary for index in range(room)]])
    for _ in range(4):
        if runner.length < runner.metadata["max_positions"]:
            runner.decode([0])
    print(json.dumps({"before_load": before, "peak": peak_rss()}))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
