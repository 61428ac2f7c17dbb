"""python -m trt_plugins.resources: registers, spills and shared memory of every kernel, as the compiler counts them.

No GPU is needed. `--write` renews trt_plugins/resources.json, which the tests hold the kernels against: a change that
makes one spill, or take many more registers, is seen before anybody runs it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.cli.entry import run_cli
from compress.cli.parser import CommandParser
from compress.errors import ArtifactError, MissingDependencyError
from compress.progress import log
from trt_plugins.build import ARCHITECTURES, SOURCES
from trt_plugins.toolchain import find, packages

TABLE = Path(__file__).with_name("resources.json")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NAME = re.compile(r"procrustes::(\w+)<(.*)>\(|procrustes::(\w+)\(")


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture: registers of a thread, bytes of static shared memory of a block, and bytes
    that are spilled to local memory."""

    registers: int
    shared: int
    spilled: int


def measure(architectures: Sequence[str] = ARCHITECTURES) -> dict[str, dict[str, Usage]]:
    """architecture -> kernel -> its usage. Raises MissingDependencyError without a compiler."""
    tools, found = find(), dict[str, dict[str, Usage]]()
    for architecture in architectures:
        log(f"compiling for sm_{architecture}")
        with tempfile.TemporaryDirectory() as scratch:
            command = [str(tools.nvcc), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
            command += ["-ccbin", str(tools.host), str(SOURCES / "ops" / "table.cu"), "-o", f"{scratch}/cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MissingDependencyError(f"the kernels were not compiled: {done.stderr.strip().splitlines()[-1]}")
        found[architecture] = parse(done.stderr)
    return found


def parse(text: str) -> dict[str, Usage]:
    """kernel -> its usage, from what `ptxas -v` printed. Raises ArtifactError where that is not understood."""
    found: dict[str, Usage] = {}
    parts = re.split(r"(?=Compiling entry function)", text)[1:]
    for part, name in zip(parts, _demangled([_must(_ENTRY, part)[1] for part in parts]), strict=True):
        spills, shared = _must(_SPILLS, part), _SHARED.search(part)
        spilled = int(spills[1]) + int(spills[2])
        found[name] = Usage(int(_must(_USED, part)[1]), 0 if shared is None else int(shared[1]), spilled)
    return dict(sorted(found.items()))


def wide_loads(library: Path) -> dict[str, int]:
    """kernel -> loads of 16 bytes from global memory in the machine code of a library, the fewest of any architecture.

    Raises MissingDependencyError where cuobjdump is not there.
    """
    places = [find().cuda / "bin", *packages("nvidia/cu13/bin")]
    cuobjdump = next((str(p / "cuobjdump") for p in places if (p / "cuobjdump").is_file()), shutil.which("cuobjdump"))
    if cuobjdump is None:
        raise MissingDependencyError("there is no cuobjdump: pip install 'procrustes-llm[plugins]'")
    path = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    done = subprocess.run([cuobjdump, "-sass", str(library)], capture_output=True, text=True, check=True, env=path)
    counts: dict[str, list[int]] = {}
    parts = re.split(r"Function : ", done.stdout)[1:]
    for part, name in zip(parts, _demangled([part.split()[0] for part in parts]), strict=True):
        counts.setdefault(name, []).append(len(re.findall(r"LDG\.E\.128", part)))
    return {name: min(found) for name, found in sorted(counts.items())}


def read_table() -> dict[str, dict[str, Usage]]:
    """What trt_plugins/resources.json has."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {a: {name: Usage(**values) for name, values in kernels.items()} for a, kernels in table.items()}


def _must(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.search(text)
    if found is None:
        raise ArtifactError(f"ptxas printed no {pattern.pattern!r}; this is a version that is not known here")
    return found


def _demangled(names: Sequence[str]) -> list[str]:
    """skinny_kernel<__half, 8, 2> of what the compiler made of it."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True) if names else None
    found = []
    for line in [] if done is None else done.stdout.splitlines():
        match = _NAME.search(line)
        if match is None:
            raise ArtifactError(f"{line} is no kernel of this project")
        found.append(match[3] or f"{match[1]}<{match[2]}>")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 3 where a kernel spills, 4 where the compiler is missing."""
    parser = CommandParser(prog="python -m trt_plugins.resources", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    args = parser.parse_args(argv)
    found = measure()
    kernels = sorted({name for usages in found.values() for name in usages})
    print(f"{'registers':52}" + "".join(f"{'sm_' + a:>8}" for a in found))
    for name in kernels:
        print(f"{name:52}" + "".join(f"{usages[name].registers:8}" for usages in found.values()))
    spilling = sorted({f"{n} on sm_{a}" for a, usages in found.items() for n, u in usages.items() if u.spilled})
    if args.write:
        table = {a: {name: asdict(usage) for name, usage in usages.items()} for a, usages in found.items()}
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"FAILED spills: {name}" for name in spilling) or "OK no kernel spills")
    return 3 if spilling else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
