"""A signal while `validate.quality` waits for a command that it has started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compress.cli.entry import TerminatedError
from validate.quality import run as quality_run


def test_sigterm_ends_the_command_that_it_waits_for_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches both processes, SIGTERM the first alone."""

    class Stream:
        def write(self, text: str) -> None:
            raise TerminatedError

    monkeypatch.setattr(sys, "stderr", Stream())
    script = (
        "import pathlib, signal, sys; signal.alarm(60);"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[1]).write_text('told'));"
        "print('begun', file=sys.stderr, flush=True); signal.pause()"
    )
    with pytest.raises(TerminatedError):
        quality_run._run([sys.executable, "-c", script, str(tmp_path / "end")], [])
    assert (tmp_path / "end").read_text() == "told"
