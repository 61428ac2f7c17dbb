"""Peak memory of a stretch of a program, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start the peak anew from the memory in use now. False where the system cannot: the peak is then the process's."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Peak of resident bytes since `reset_peak`, or since the process started; mapped files count."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024
