"""Exit codes and sentences of `run_cli`, and the errors of `require`."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import (
    ArtifactError,
    GateError,
    MissingDependencyError,
    ProcrustesError,
    UsageError,
    run_cli,
)
from compress.lazy import require


def raising(error: BaseException) -> Callable[[object], int]:
    def main(argv: object) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ProcrustesError, 1), (UsageError, 2), (GateError, 3), (MissingDependencyError, 4), (ArtifactError, 5)],
)
def test_each_error_has_its_exit_code(kind, code, capsys):
    assert run_cli(raising(kind("ratio is 7; give one in (0, 1]")), []) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "error: ratio is 7; give one in (0, 1]\n"


def test_success_passes_through():
    assert run_cli(lambda argv: 0, []) == 0
    assert run_cli(lambda argv: len(argv or []), ["a", "b"]) == 2


def test_interrupt_is_130_and_says_how_to_resume(capsys):
    assert run_cli(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG])
def test_refused_writes_are_5_and_name_the_path(code, capsys):
    assert run_cli(raising(OSError(code, os.strerror(code), "out/demo/model.onnx")), []) == 5
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"error: {os.strerror(code)}: 'out/demo/model.onnx'; ")
    assert "Traceback" not in sentence


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda argv: 1 // 0, [])
    with pytest.raises(FileNotFoundError):
        run_cli(raising(FileNotFoundError(errno.ENOENT, "No such file", "x")), [])


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.delenv("PROCRUSTES_DEBUG", raising=False)
    assert run_cli(raising(UsageError("no")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("PROCRUSTES_DEBUG", "1")
    assert run_cli(raising(UsageError("no")), []) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("PROCRUSTES_DEBUG", "0")
    assert run_cli(raising(UsageError("no")), []) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(
        "import sys\n"
        "from compress.errors import run_cli\n"
        "def main(argv):\n"
        "    for line in range(100000):\n"
        "        print(line)\n"
        "    return 0\n"
        "sys.exit(run_cli(main, []))\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141  # what a shell shows for SIGPIPE


def test_require_gives_the_module():
    assert require("json.decoder", pip="nothing", purpose="decode").JSONDecoder is not None


def test_require_names_the_package_and_the_purpose():
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_module.part", pip="'procrustes-llm[trt]'", purpose="build TensorRT engines")
    assert str(caught.value) == (
        "The Python package 'no_such_module.part' is not installed; it is needed to build TensorRT engines. "
        "Run: pip install 'procrustes-llm[trt]'"
    )


def test_require_tells_a_broken_install_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import its_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"cannot be imported \(No module named 'its_missing"):
        require("half_installed", pip="x", purpose="test")


@pytest.mark.parametrize("package", ["compress.errors", "compress.artifact", "export", "validate", "trt_plugins"])
def test_light_modules_import_nothing_heavy(package):
    heavy = "{'torch', 'transformers', 'onnxruntime', 'onnx', 'matplotlib', 'datasets', 'pyarrow'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
