"""No disk, no permission, no file handles, no memory: a sentence, its exit code, and nothing half-written."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from tests.faults.commands import TEXT, Command, Reference, commands
from tests.faults.rows import FaultError, Options, Row, times

FILE_SIZES = (20_000, 60_000, 100_000, 200_000)  # bytes
HANDLES = (3, 4, 5, 6, 7, 8, 10)
MEMORY = (0, 64, 128, 256, 512, 1_024, 4_096, 32_768)  # KiB beyond what is mapped at the start
DISKS = (64, 300, 600, 1_000)  # KiB


def run(folder: Path, options: Options) -> list[Row]:
    """One row for each lack. Raises FaultError for a traceback, another exit code, or another result afterwards."""
    rows = list[Row]()
    *others, parity = commands(folder)
    for command in (*others, _plots(parity), _whole(parity, folder / TEXT)):
        reference = Reference.of(command)
        for fault, code, limits in (
            ("files limited in size (RLIMIT_FSIZE)", 5, [_limit(resource.RLIMIT_FSIZE, n) for n in FILE_SIZES]),
            ("too few file handles (RLIMIT_NOFILE)", 4, [_limit(resource.RLIMIT_NOFILE, n) for n in HANDLES]),
            ("too little memory (RLIMIT_AS)", 4, [_memory(n << 10) for n in MEMORY]),
        ):
            rows.append(_row(command, reference, fault, code, limits))
        rows += _disks(command, reference)
    return rows


def _plots(validate: Command) -> Command:
    """Parity, and the plots: the reports are the most that it writes."""
    argv = tuple(flag for flag in validate.argv if flag != "--no-plot")
    return replace(validate, name="validate (parity, plots)", argv=argv)


def _whole(validate: Command, text: Path) -> Command:
    """All parts: the dense baseline is exported, and memory probed, too."""
    small = ("--sequence-length", "32", "--max-windows", "2", "--prefill", "16", "--past", "8", "--batch-sizes", "1")
    argv = (*validate.argv[:3], "--data", str(text), *small, "--seconds", "0.05")
    return replace(validate, name="validate (all parts)", argv=argv)


def _row(command: Command, reference: Reference, fault: str, code: int, limits: Iterable[Callable[[], None]]) -> Row:
    refused, enough = 0, 0
    for limit in limits:
        command.reset()
        if _refused(command, f"{command.name}, {fault}", code, limit):
            refused += 1
            command.require(f"after {fault}")
        else:
            enough += 1
        reference.require(command, f"after {fault}")
    told = f"{times(refused)} exit {code} and a sentence, then the same bytes without the limit"
    if not refused:
        raise FaultError(f"{command.name}, {fault}: no limit was too low")
    told += f"; {times(enough)} it was enough" if enough else ""
    return Row(f"{command.name}, {fault}", refused + enough, told)


def _refused(command: Command, what: str, code: int, limit: Callable[[], None] | None) -> bool:
    """Whether the command ended with `code` and a sentence; else it must have succeeded."""
    seen = command.finish(limit)
    text = command.log()
    if seen not in (0, code) or "Traceback" in text:
        raise FaultError(f"{what}: exit {seen}\n{text}")
    if seen and not any(line.startswith("error: ") for line in text.splitlines()):
        raise FaultError(f"{what}: exit {seen} without a sentence\n{text}")
    return seen != 0


def _limit(what: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (value, value))


def _memory(more: int) -> Callable[[], None]:
    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * os.sysconf("SC_PAGE_SIZE") + more
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return limit


def _disks(command: Command, reference: Reference) -> list[Row]:
    """A file system that is full, and one that is read-only; where this user may mount one."""
    full, disk = 0, command.folder
    for size in DISKS:
        command.reset()
        before = sum(file.stat().st_blocks * 512 for file in _files(command.out)) if command.before else 0
        if not _mount("-t", "tmpfs", "-o", f"size={size + before // 1024}k", "tmpfs", str(disk)):
            return []
        try:
            command.reset()
            full += _refused(command, f"{command.name} on a disk of {size} KiB", 5, None)
            left = [path.name for path in command.out.iterdir() if path.name.startswith((".tmp", ".pending", ".draft"))]
            if left:
                raise FaultError(f"{command.name} on a disk of {size} KiB left {left}")
            _mount("-o", "remount,size=1g", str(disk))
            command.require("with space on the disk")
            reference.require(command, "with space on the disk")
        finally:
            _unmount(disk)
    told = f"{times(full)} exit 5 and a sentence, then the same bytes once there was space"
    enough = len(DISKS) - full
    told += f"; {times(enough)} it was enough" if enough else ""
    if not full:
        raise FaultError(f"{command.name}: no disk was too small")
    rows = [Row(f"{command.name}, disk full (tmpfs)", len(DISKS), told)]
    _mount("-t", "tmpfs", "tmpfs", str(disk))
    try:
        command.reset()
        _mount("-o", "remount,ro", str(disk))
        if not _refused(command, f"{command.name} on a read-only disk", 5, None):
            raise FaultError(f"{command.name} wrote to a read-only disk")
    finally:
        _unmount(disk)
    return [*rows, Row(f"{command.name}, read-only file system", 1, "exit 5 and a sentence")]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)
