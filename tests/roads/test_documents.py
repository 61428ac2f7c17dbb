"""The commands of the documents and of --help run as they stand there, with tiny models in place of the real ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.roads.commands import Done, command_module, run
from tests.roads.documents import GUIDE, ROOT, Shown, all_shown, shown_in
from validate.tasks.data import Example, Task

MODELS = {
    "smollm2-135m": "tiny_llama_tied",
    "opt-13b": "tiny_opt",
    "facebook/opt-1.3b": "tiny_opt_untied",
    "my-model": "tiny_llama",
    "my-llama": "tiny_llama3rope",
}
"""Folders in the working folder, which are taken for the models that the documents name -> tiny models."""
TEXTS = ("notes.txt", "wiki.test.raw", "held-out.txt")
FIT = "--calibration-samples 4 --sequence-length 32"
SMALL = {
    "compress.run": f"{FIT} --set rotation_iterations=2 --set sensitivity_samples=2",
    "export.build": f"{FIT} --set rotation_iterations=2 --set sensitivity_samples=2",
    "validate.run": "--sequence-length 64 --max-windows 2 --prefill 16 --past 8 --batch-sizes 1,2 --seconds 0.02",
    "validate.tasks": "--limit 2",
    "validate.latency": "--seconds 0.001 --working-set 1",
    "validate.quality": f"{FIT} --window 64 --max-windows 2",
    "compress.methods.paper.compare": f"{FIT} --gd-iterations 5 --position 3",
}
"""Module -> what is said after the command's own words, which the last word overrides: sizes of tiny models."""
DATA = {"validate.run": "--data held-out.txt", "validate.quality": "--data held-out.txt"}
"""Module -> the text, where the command itself names none and would take one from the demo's packages."""
GATES = ("--max-ppl-increase", "--min-speedup")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that has every model and text which the documents name."""
    torch.set_num_threads(1)
    for name, model in MODELS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_model(model))
    for name in TEXTS:
        (tmp_path / name).write_text(tiny.TEXT)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny.TEXT.split("\n\n")))
    (tmp_path / "recipe.yaml").write_text("structure: kron\nratio: 0.9\n")
    questions = [Example((("The mill stands", " where"), ("The mill stands", " by")), 0, (5, 2))] * 2
    monkeypatch.setattr(Task, "load", lambda task, limit=None: questions[:limit])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def broken(commands: Iterable[Shown], run: Callable[[str, list[str]], Done] = run) -> list[str]:
    """Run them in turn, each once, in the working folder; what is said of those that fail."""
    found, seen = list[str](), set[str]()
    for shown in commands:
        if shown.reason is not None or shown.text in seen:
            continue
        seen.add(shown.text)
        module = str(shown.module)
        words = [*shown.arguments, *SMALL[module].split()]
        if module in DATA and "--data" not in words:
            words += DATA[module].split()
        elif module not in ("validate.run", "validate.tasks", "validate.latency") and "--calibration-data" not in words:
            words += ["--calibration-data", "notes.txt"]
        done = run(module, words)
        # Random weights hold no gate; that a gate was measured and not held is a result.
        if done.code != 0 and not (done.code == 3 and set(GATES) & set(words)):
            found.append(f"{shown.document}: {shown.text}\n{done}")
    return found


def test_every_command_is_run_or_listed() -> None:
    unknown = [s for s in all_shown() if s.reason is None and s.module not in SMALL]
    assert not unknown, "run these or list them in tests/roads/documents.py, with the reason"


def test_every_command_parses() -> None:
    shown = [s for s in all_shown() if s.module is not None and "alone, in a sentence" not in str(s.reason)]
    assert len(shown) > 30
    for command in shown:
        if str(command.module).startswith("tests."):
            continue
        module = command_module(str(command.module))
        words = [word.replace("P", "3") if word == "P" else word for word in command.arguments]
        try:
            module.parser().parse_args(words)
        except SystemExit as stop:
            pytest.fail(f"{command.document}: {command.text}: exit {stop.code}")


def test_documents_that_are_made_up(tmp_path: Path) -> None:
    """What the reading of the documents finds, so that it cannot pass over a command in silence."""
    text = """
Text with `python -m compress.run --model x --out y` and `make demo`.

    python -m export.build --model x \\
        --out y    # why
    out/demo/triton/launch.sh --network
    unheard-of command

```yaml
    - run: pip install x
    - name: python
```
"""
    found = [shown.text for shown in shown_in("made-up", text)]
    assert found[:2] == ["python -m compress.run --model x --out y", "make demo"]
    assert found[2:4] == ["python -m export.build --model x --out y", "out/demo/triton/launch.sh --network"]


def of_the_guide() -> list[Shown]:
    """The commands of README and docs/usage.md, in that order."""
    return [shown for name in GUIDE for shown in shown_in(name, (ROOT / name).read_text())]


def test_the_demo_of_the_makefile_is_the_documents() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [recipe] = re.findall(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    values = dict(re.findall(r"^(\w+) \?= (.*)$", makefile, re.MULTILINE))
    lines = [re.sub(r"^.*\$\(bin\)/", "", line) for line in recipe.splitlines()]
    wanted = [re.sub(r"\$\((\w+)\)", lambda variable: values[variable[1]], line) for line in lines]
    assert wanted
    assert set(wanted) <= {s.text for s in of_the_guide()}


def test_the_guide_runs(folder: Path) -> None:
    """Its commands for the CPU, in its order."""
    main = [s for s in of_the_guide() if s.module != "validate.quality"]
    assert len([s for s in main if s.reason is None]) >= 6
    assert not (problems := broken(main)), "\n\n".join(problems)
    assert (folder / "out" / "mine" / "reports" / "summary.md").is_file()


@pytest.mark.slow
def test_the_guide_runs_in_processes_of_its_own(folder: Path) -> None:
    """As a user runs it: a fresh interpreter for each command, nothing left over from the one before."""

    def process(module: str, words: list[str]) -> Done:
        command = [sys.executable, "-m", module, *words]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
        )
        return Done(shlex.join(command), done.returncode, done.stdout, done.stderr)

    main = [s for s in of_the_guide() if s.module in ("export.build", "validate.run", "compress.run")]
    assert not (problems := broken(main, process)), "\n\n".join(problems)


@pytest.mark.slow
def test_all_documents_run(folder: Path) -> None:
    """README first, then docs/ and the examples of --help, which go on with what it made."""
    assert not (problems := broken(all_shown())), "\n\n".join(problems)
    assert (folder / "out" / "quality" / "quality.md").is_file()
