"""What the compiler says of the kernels, for every target, and the loads in their machine code. No GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import ArtifactError, MissingDependencyError
from tests.tools import unavailable
from trt_plugins.build import ARCHITECTURES, PLUGINS
from trt_plugins.resources import Usage, measure, parse, read_table, wide_loads

OTHER_COMPILER = 16  # registers that another version of the compiler may take more than the one of the table
MOST = 128  # of a thread: four blocks of 128 threads stay resident on every target

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10procrustes11fill_kernelI6__halfEEvPT_PKS2_i' for 'sm_90'
ptxas info    : Function properties for _ZN10procrustes11fill_kernelI6__halfEEvPT_PKS2_i
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers, 1024 bytes smem
"""


@pytest.fixture(scope="module")
def usages() -> dict[str, dict[str, Usage]]:
    try:
        return measure()
    except MissingDependencyError as missing:
        unavailable(str(missing))


def test_no_kernel_spills_on_any_target(usages: dict[str, dict[str, Usage]]) -> None:
    assert tuple(usages) == ARCHITECTURES
    assert not [(a, name) for a, kernels in usages.items() for name, usage in kernels.items() if usage.spilled]


def test_registers_and_shared_memory_are_those_of_the_table(usages: dict[str, dict[str, Usage]]) -> None:
    table = read_table()
    for architecture, kernels in usages.items():
        assert set(kernels) == set(table[architecture])
        for name, usage in kernels.items():
            known = table[architecture][name]
            assert usage.registers <= min(known.registers + OTHER_COMPILER, MOST), (architecture, name, usage, known)
            assert usage.shared == known.shared == 0  # all of it is asked for at the launch


def test_aligned_kernels_load_16_bytes_at_a_time(libraries: Path) -> None:
    """Each row of W that a warp has in flight is one such load; the kernels for any alignment have none."""
    try:
        loads = wide_loads(libraries / PLUGINS)
    except MissingDependencyError as missing:
        unavailable(str(missing))
    skinny = {name: count for name, count in loads.items() if name.startswith("skinny_kernel")}
    assert len(skinny) == 24
    for name, count in skinny.items():
        width = name.split(",")[1].strip()
        assert count == 0 if width == "1" else count >= 4, (name, count)


def test_what_ptxas_prints_is_read() -> None:
    assert parse(PTXAS) == {"fill_kernel<__half>": Usage(registers=14, shared=1024, spilled=12)}
    with pytest.raises(ArtifactError, match="a version that is not known"):
        parse(PTXAS.replace("Used 14", "Uses 14"))
