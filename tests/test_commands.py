"""Commands that the documents show: they exist, know every flag shown, and answer --help at once."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "Makefile",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMAND = re.compile(r"python -m ((?:compress|export|trt_plugins|validate)\.[a-z_.]+)((?:[^\n`\\]|\\\n)*)")
MODULES = [
    "compress.run",
    "export.build",
    "trt_plugins.build",
    "validate.latency",
    "validate.quality",
    "validate.run",
    "validate.speed",
    "validate.tasks",
]
HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "matplotlib", "datasets", "pyarrow", "pydantic"}


def shown_commands() -> list[tuple[str, str, str]]:
    """(document, module, arguments) for each command line in the documents."""
    return [
        (document.name, module, arguments.replace("\\\n", " "))
        for document in DOCUMENTS
        for module, arguments in COMMAND.findall(document.read_text())
    ]


def help_of(module: str) -> str:
    """What `--help` prints; fails when a heavy library was imported to print it."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"print('heavy:', sorted({HEAVY} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "heavy: []"
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_help_is_light(module):
    assert "usage:" in help_of(module)


def test_the_documents_show_commands():
    assert {"export.build", "validate.run"} <= {module for _, module, _ in shown_commands()}


@pytest.mark.parametrize("module", sorted({module for _, module, _ in shown_commands()}))
def test_flags_in_the_documents_exist(module):
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(module)))
    for document, shown, arguments in shown_commands():
        if shown == module:
            flags = {word.split("=")[0] for word in shlex.split(arguments, comments=True) if word.startswith("--")}
            assert flags <= known, f"{document} shows flags that {module} does not have: {sorted(flags - known)}"


def test_the_workflow_of_the_documents_is_whole():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/usage.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    workflow = yaml.safe_load(blocks[0])
    steps = workflow["jobs"]["gate"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    gates = [step["run"] for step in steps if "validate.run" in step.get("run", "")]
    assert len(gates) == 1
    assert "--max-ppl-increase" in gates[0]
    # A pip command in it names files that are in this repository.
    for name in re.findall(r"--(?:constraint|requirement) (\S+)", blocks[0]):
        assert (ROOT / name).is_file()


def test_python_in_the_readme_compiles():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_structure_example_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [example] = [block for block in blocks if "registry()" in block]
    names: dict[str, object] = {}
    exec(example, names)
    assert names["y"].shape == (10_000, 512)


def test_the_python_road_of_the_readme_runs(tiny_model, tmp_path, monkeypatch, capsys):
    """Compress, load, generate and export, with a tiny model in the place of the real one."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [example] = [block for block in blocks if "compress.compress(" in block]
    assert example.count("smollm2-135m") == 1
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(4 * tiny.TEXT)
    exec(example.replace("smollm2-135m", str(tiny_model("tiny_llama"))), {})
    assert capsys.readouterr().out.startswith("The capital of France is")
    assert (tmp_path / "out/small/checkpoint/modeling_procrustes.py").is_file()
    assert (tmp_path / "out/small/onnx/model.onnx").is_file()
