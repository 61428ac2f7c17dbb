"""The command `python -m tests.faults`: its table, which keeps the groups that are not run; one real kill of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UsageError
from tests.faults import __main__ as faults
from tests.faults import kills, resources
from tests.faults.rows import FaultError, Options, Row


def test_groups_that_are_not_run_keep_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, options: Options) -> list[Row]:
        return [Row("SIGKILL of compress", options.trials, "the same bytes")]

    monkeypatch.setattr(kills, "run", killed)
    monkeypatch.setattr(resources, "run", lambda folder, options: [Row("disk full", 4, "exit 5")])
    arguments = ["--docs", str(tmp_path / "docs"), "--trials", "7"]
    assert faults.main([*arguments, "--only", "resources"]) == 0
    assert faults.main([*arguments, "--only", "kills"]) == 0
    text = (tmp_path / "docs" / "reliability.md").read_text()
    assert "| SIGKILL of compress | 7 | the same bytes |" in text
    assert "| disk full | 4 | exit 5 |" in text
    assert text.index("## Kills") < text.index("## Lacks")
    assert "`python -m tests.faults --only kills --trials 7 --seed 0`" in text
    with pytest.raises(UsageError, match="none of kills, resources, serving"):
        faults.main([*arguments, "--only", "fire"])


def test_a_trial_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(folder: Path, options: Options) -> list[Row]:
        raise FaultError("other bytes")

    monkeypatch.setattr(kills, "run", failing)
    with pytest.raises(FaultError):
        faults.main(["--docs", str(tmp_path), "--only", "kills"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    rows = kills.run(tmp_path, Options(trials=4))
    assert [row.trials for row in rows] == [2, 1, 1]
