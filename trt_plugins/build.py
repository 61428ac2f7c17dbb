"""python -m trt_plugins.build: compile the TensorRT plugins, on any x86-64 Linux, with or without a GPU."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.artifact.files import may_be_folder
from compress.cli.commands import add_common_arguments, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import MissingDependencyError, UsageError
from compress.progress import log
from trt_plugins.toolchain import find

SOURCES = Path(__file__).resolve().parent / "csrc"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
PLUGINS, AUTOLOAD = "libprocrustes_plugins.so", "libprocrustes_autoload.so"
EXAMPLES = """examples:
  python -m trt_plugins.build                         # for every GPU from Ampere to Blackwell, and PTX for later ones
  python -m trt_plugins.build --arch 90 --out out/plugins
  TENSORRT_INCLUDE_DIR=/opt/tensorrt/include python -m trt_plugins.build
"""


def build(out: Path, architectures: Sequence[str]) -> tuple[Path, Path]:
    """Compile both libraries into `out`; returns (plugin library, autoload library).

    architectures: compute capabilities as nvcc writes them, "90"; the newest is compiled to PTX as well, for GPUs that
    come later. Raises MissingDependencyError where a compiler or a header is missing or does not compile.
    """
    tools, out = find(), out.resolve()
    work = out / "build"
    work.mkdir(parents=True, exist_ok=True)
    newest = max(architectures, key=int)
    targets = [f"{a}-real" for a in architectures] + [f"{newest}-virtual"]
    environment = {**os.environ, "CUDACXX": str(tools.nvcc), "CXX": str(tools.host)}
    environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(tools.libraries), os.environ.get("LIBRARY_PATH")]))
    configure = [
        *(str(tools.cmake), "-S", str(SOURCES), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}",
        f"-DTENSORRT_INCLUDE_DIR={tools.tensorrt}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
    ]
    if tools.pip:
        configure.append(f"-DCMAKE_CUDA_FLAGS=-L{tools.libraries}")
    log(f"compiling the plugins for {', '.join(architectures)}; this takes minutes, and happens once")
    log(f"CUDA compiler {tools.nvcc}, TensorRT headers {tools.tensorrt}")
    _run(configure, environment, work / "configure.log")
    _run([str(tools.cmake), "--build", str(work), "--parallel"], environment, work / "build.log")
    return out / PLUGINS, out / AUTOLOAD


def _run(command: list[str], environment: dict[str, str], log_file: Path) -> None:
    log(f"running {Path(command[0]).name} {' '.join(command[1:3])}, output in {log_file}")
    with log_file.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = [line for line in log_file.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
        raise MissingDependencyError(
            f"the plugins were not built ({(errors or lines or ['no output'])[0].strip()}); see {log_file}"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description = "Compile the TensorRT plugins of the ops in an exported model. No GPU is needed."
    p = command_parser("trt_plugins.build", description, EXAMPLES)
    p.add_argument("--out", type=Path, default=Path("out/plugins"), help="where to (default: %(default)s)")
    p.add_argument(
        "--arch",
        default=",".join(ARCHITECTURES),
        metavar="A,B",
        help="compute capabilities without their dot (default: %(default)s)",
    )
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 built, 2 usage, 4 a compiler or a header is missing."""
    args = parser().parse_args(argv)
    architectures = [a.strip().replace(".", "") for a in args.arch.split(",")]
    unknown = [a for a in architectures if not a.isdigit() or int(a) < 80]
    if unknown:
        raise UsageError(f"--arch {unknown[0]!r} is no compute capability of 8.0 or later: give 90, or 80,86,90")
    if not may_be_folder(args.out):
        raise UsageError(f"--out {args.out} is not, or is not in, a folder; choose another one")
    plugins, autoload = build(args.out, architectures)
    lines = (
        f"plugin library    {plugins}   (registry.load_library, polygraphy, export)",
        f"autoload library  {autoload}   (Triton's backend, trtexec --plugins)",
        f"OK {args.out}",
    )
    result = {"plugins": str(plugins), "autoload": str(autoload), "architectures": architectures}
    tell(args, result, lambda: "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
