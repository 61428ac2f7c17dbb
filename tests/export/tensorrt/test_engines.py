"""`--engine trt` and `--engine trt-rtx` from the command line, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress.artifact.files import sha256_of
from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from export.build import main, parser
from export.graph.header import read_header
from export.runtime.profiles import Span, Spans, shape_at
from export.stages import BUILD_INFO, build_info, write_json
from export.tensorrt import build as trt
from export.tensorrt import engine as trt_runner
from export.tensorrt import gpu, jobs, plugins
from export.tensorrt import rtx as trt_rtx
from export.tensorrt.jobs import Job
from export.tensorrt.options import Options
from tests import tiny
from trt_plugins.build import AUTOLOAD, PLUGINS

SIZES = ["--batch", "1,2,4", "--prompt", "1,8,16", "--cache", "1,16,40"]


@pytest.fixture
def command(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small build with Kronecker products into tmp_path/out."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 3)

    def arguments(*more: str) -> list[str]:
        model = ["--model", str(tiny_model("tiny_llama")), "--out", str(tmp_path / "out"), "--structure", "kron"]
        small = ["--rotation", "none", "--ratio", "0.7", "--unit", "8", "--calibration-data", str(text)]
        sizes = [] if "none" in more else SIZES
        return [*model, *small, "--calibration-samples", "2", "--sequence-length", "32", *sizes, *more]

    return arguments


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU and without TensorRT, whatever this one has."""
    monkeypatch.setattr(trt, "find_gpu", lambda: None)
    monkeypatch.setattr(trt, "installed", lambda name: None)


def run_of(path: Path, which: str) -> list[str]:
    """The command of one case of build_engine.sh, as the shell would run it."""
    folder = path.parent / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("python", "trtexec"):
        (folder / name).write_text('#!/bin/sh\nfor a in "$0" "$@"; do printf "%s\\n" "$a"; done\n')
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(path), which], capture_output=True, text=True, check=True, env=environment)
    return [Path(done.stdout.splitlines()[0]).name, *done.stdout.splitlines()[1:]]


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_all_but_the_engine_is_made(
    command: Callable[..., list[str]], libraries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command("--engine", "trt", "--plugin-libraries", str(libraries))
    assert run_cli(main, arguments) == 4
    said = capsys.readouterr().err
    for needed in ("NVIDIA GPU", "procrustes-llm[gpu]", "polygraphy", "build_engine.sh"):
        assert needed in said.splitlines()[-1]
    artifact = Artifact(out)
    artifact.verify()
    assert build_info(artifact, "onnx")["dtype"] == "float16"
    assert {p.name for p in artifact.require_stage("plugins").iterdir()} == {PLUGINS, AUTOLOAD, BUILD_INFO}
    assert not artifact.has_stage("engine")
    (config,) = artifact.require_stage("triton").glob("repository/*/config.pbtxt")
    assert "KIND_GPU" in config.read_text()
    assert 'key: "sequences" value: { string_value: "4" }' in config.read_text()

    # Again: nothing is made anew.
    before = artifact.read_manifest()
    assert run_cli(main, arguments) == 4
    assert capsys.readouterr().err.count("re-using") == 4
    assert artifact.read_manifest() == before


@pytest.mark.usefixtures("no_gpu")
def test_the_script_holds_the_exact_commands(
    command: Callable[..., list[str]], libraries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands as bash runs them: ours parses and resumes, trtexec's has every input in every profile."""
    more = ["--plugin-libraries", str(libraries), "--opt-level", "4", "--workspace", "512"]
    assert run_cli(main, command("--engine", "trt", *more)) == 4
    script = tmp_path / "out" / "build_engine.sh"
    assert os.access(script, os.X_OK)
    ours = run_of(script, "python")
    assert ours[:3] == ["python", "-m", "export.build"]
    args = parser().parse_args(ours[3:])
    assert (args.resume, args.engine, str(args.out)) == (True, "trt", ".")
    assert (args.batch, args.prompt, args.cache, args.plugin) == ("1,2,4", "1,8,16", "1,16,40", "auto")
    assert (args.opt_level, args.workspace) == (4, 512)
    capsys.readouterr()
    resumed = [str(tmp_path / "out") if part == "." else part for part in ours[3:]]
    assert run_cli(main, resumed) == 4
    assert "re-using" in capsys.readouterr().err

    name, *flags = run_of(script, "trtexec")
    values = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags if not flag.startswith("--profile"))
    assert name == "trtexec"
    assert values["onnx"] == "onnx/model.onnx"
    assert values["dynamicPlugins"] == f"plugins/{PLUGINS}"
    assert values["builderOptimizationLevel"] == "4"
    assert values["memPoolSize"] == "workspace:512M"
    assert {"stronglyTyped", "skipInference"} <= set(values)
    axes = read_header(tmp_path / "out" / "onnx" / "model.onnx").axes
    starts = [i for i, flag in enumerate(flags) if flag.startswith("--profile=")]
    assert [flags[i] for i in starts] == ["--profile=0", "--profile=1"]
    sizes = {0: ((1, 1, 0), (2, 8, 0), (4, 16, 40)), 1: ((1, 1, 1), (2, 1, 16), (4, 1, 40))}
    for profile, start in enumerate(starts):
        for offset, (kind, point) in enumerate(zip(("min", "opt", "max"), sizes[profile], strict=True), start=1):
            flag, _, shapes = flags[start + offset].partition("=")
            assert flag == f"--{kind}Shapes"
            found = dict(shape.split(":") for shape in shapes.split(","))
            assert found == {n: "x".join(map(str, shape_at(a, *point))) for n, a in axes.items()}

    done = subprocess.run(["bash", str(script), "other"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_native_needs_no_plugins(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert run_cli(main, command("--engine", "trt", "--plugin", "native")) == 4
    assert not (tmp_path / "out" / "plugins").exists()
    assert "--dynamicPlugins" not in (tmp_path / "out" / "build_engine.sh").read_text()


@pytest.mark.usefixtures("no_gpu")
def test_without_a_compiler_the_rest_is_made(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert run_cli(main, command("--engine", "trt")) == 4
    assert "has no bin/nvcc" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "build_engine.sh").is_file()
    assert not (tmp_path / "out" / "plugins").exists()
    assert run_cli(main, command("--engine", "trt", "--plugin", "cpp")) == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rtx_engines_are_built_ahead_of_time(
    dtype: str,
    command: Callable[..., list[str]],
    libraries: Path,
    rtx_environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real engine, of the function bodies and with plugins; the plugin layers are the custom nodes."""
    out = tmp_path / "out"
    native = command("--engine", "trt-rtx", "--compute-capability", "8.9,12.0", "--json", "--dtype", dtype)
    assert run_cli(main, native) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["plugin"], result["plugin_layers"]) == ("native", 0)
    artifact = Artifact(out)
    artifact.verify()
    info = build_info(artifact, "engine")
    assert info["compute_capabilities"] == [89, 120]
    assert info["plan_bytes"] == (out / "engine" / "model.plan").stat().st_size > 100_000
    assert not artifact.has_stage("plugins")

    assert run_cli(main, native) == 0
    assert "re-using" in capsys.readouterr().err

    resumed = ["--resume", "--out", str(out), "--engine", "trt-rtx", "--plugin", "cpp", *SIZES]
    assert run_cli(main, [*resumed, "--plugin-libraries", str(libraries), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    nodes = onnx.load(str(out / "onnx" / "model.onnx"), load_external_data=False).graph.node
    assert result["plugin"] == "cpp"
    assert result["plugin_layers"] == sum(node.domain == "procrustes" for node in nodes) > 0


def test_what_tensorrt_refuses_is_told_in_its_words(
    command: Callable[..., list[str]],
    rtx_environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A graph that was damaged after it was checked: exit 5, no engine, and the older engine is still there."""
    assert run_cli(main, command("--engine", "none", "--dtype", "float16")) == 0
    artifact = Artifact(tmp_path / "out")
    path = artifact.path("onnx") / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    del model.functions[:]
    broken = path.with_name("broken.onnx")
    broken.write_bytes(model.SerializeToString())
    spans = Spans(Span(1, 1, 1), Span(1, 2, 4), Span(1, 2, 4))
    job = Job(str(broken), str(tmp_path / "plan"), tuple(spans.profiles(read_header(path).axes)), rtx=True)
    with pytest.raises(ArtifactError, match=r"TensorRT-RTX built no engine.*Kronecker"):
        trt_rtx.run_job(job)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--engine trt --batch 1,2", "MIN,OPT,MAX"),
        ("--engine trt --batch 2,1,4", "must rise"),
        ("--engine trt --prompt 0,1,4", "must rise"),
        ("--engine trt --cache 1,2,100000", "positions"),
        ("--engine trt-rtx --compute-capability 9.0", "TensorRT-RTX builds for"),
        ("--engine trt --compute-capability 9.0", "for --engine trt-rtx"),
        ("--engine trt --workspace 0", "at least 1 MiB"),
        ("--engine trt --plugin native --plugin-libraries x", "uses no"),
        ("--resume --engine trt", "leave out --model"),
    ],
)
def test_wrong_flags(
    flags: str, message: str, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(*flags.split())
    assert run_cli(main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resume_needs_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, ["--resume", "--engine", "trt", "--out", str(tmp_path / "out")]) == 5
    assert "build" in capsys.readouterr().err
    assert run_cli(main, ["--engine", "trt", "--out", str(tmp_path / "out")]) == 2


def test_requirements_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = gpu.Gpu("H100", 90, 13000)
    monkeypatch.setattr(trt, "find_gpu", lambda: here)
    versions = {"tensorrt": "10.9.0", "polygraphy": "0.53.6"}
    monkeypatch.setattr(trt, "installed", versions.get)
    with pytest.raises(MissingDependencyError, match=r"TensorRT 10\.15 or later in place of 10\.9\.0$"):
        trt.require()
    versions["tensorrt"] = "11.4.0.106"
    assert trt.require() == here


def test_default_sizes_fit_the_model() -> None:
    assert Spans.parse(None, None, None, 64) == Spans(Span(1, 1, 8), Span(1, 64, 64), Span(1, 63, 63))
    assert Spans.parse(None, None, None, 8192) == Spans()
    with pytest.raises(UsageError, match="--cache"):
        Spans.parse(None, None, "1,2", 64)


@pytest.mark.parametrize("faster", ["native", "cpp"])
def test_auto_keeps_the_engine_with_the_shorter_decode_step(
    faster: str,
    command: Callable[..., list[str]],
    libraries: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a stand-in for TensorRT and the GPU: what is built, timed, kept and written down."""
    jobs: list[Job] = []

    def build(job: Job) -> dict[str, Any]:
        jobs.append(job)
        Path(job.plan).write_bytes(b"cpp" if job.plugins else b"native")
        Path(str(job.layers)).write_text("{}")
        return {"version": "11.4.0", "plan_bytes": 3, "plugin_layers": len(job.plugins), "seconds": 1.0, "warnings": []}

    times = {"native": {"decode": 2e-3, "prefill": 1e-2}, "cpp": {"decode": 2e-3, "prefill": 2e-2}}
    times[faster]["decode"] = 1e-3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trt, "find_gpu", lambda: gpu.Gpu("H100", 90, 13000))
    monkeypatch.setattr(trt, "installed", lambda name: "11.4.0")
    monkeypatch.setattr(trt, "run_job", build)
    monkeypatch.setattr(trt, "_timed", lambda folder, ways, onnx, spans: {way: times[way] for way in ways})
    arguments = command("--engine", "trt", "--plugin-libraries", str(libraries), "--json")
    assert run_cli(main, arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["plugin"] == faster
    assert f"keeping {faster}: against" in printed.err
    assert "decode 2.00x" in printed.err
    assert [bool(job.plugins) for job in jobs] == [False, True]
    assert {job.timing_cache for job in jobs} == {str(tmp_path / "cache" / "procrustes-llm" / "tensorrt-11.4.0.cache")}
    artifact = Artifact(tmp_path / "out")
    artifact.verify()
    assert {p.name for p in artifact.path("engine").iterdir()} == {"model.plan", "layers.json", BUILD_INFO}
    assert (artifact.path("engine") / "model.plan").read_bytes() == faster.encode()
    (served,) = (artifact.path("triton") / "network").glob("*_lm/1/model.plan")
    assert served.read_bytes() == faster.encode()
    info = build_info(artifact, "engine")
    assert info["seconds_by_plugin"] == times
    assert info["gpu"] == {"name": "H100", "capability": 90, "driver": 13000}
    assert Options.of(info["flags"]).flags() == info["flags"]
    assert str(trt_runner.spans_of(info).cache) == "1,16,40"
    monkeypatch.setattr(trt_runner, "installed", lambda name: "11.4.0")
    monkeypatch.setattr(trt_runner, "find_gpu", lambda: gpu.Gpu("H100", 90, 13000))
    assert trt_runner.check_engine(artifact) == info

    assert run_cli(main, arguments) == 0
    assert "re-using" in capsys.readouterr().err
    assert len(jobs) == 2


# --- an engine is a program: what is checked before it is loaded


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """An artefact with a plan that manifest.json vouches for; the plan itself is never loaded here."""
    artifact = Artifact(tmp_path / "out")
    with artifact.stage("onnx") as folder:
        (folder / "model.onnx").write_bytes(b"graph")
    with artifact.stage("plugins") as folder:
        (folder / PLUGINS).write_bytes(b"library")
    library = artifact.path("plugins") / PLUGINS
    spans = Spans(Span(1, 1, 8), Span(1, 64, 64), Span(1, 32, 63))
    info = {
        "engine": "trt",
        "versions": {"tensorrt": "11.4.0"},
        "gpu": {"name": "H100", "capability": 90, "driver": 13000},
        "plugin": "cpp",
        "plugin_sha256": sha256_of(library),
        "profiles": spans.profiles({"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total_sequence"]}),
    }
    with artifact.stage("engine", inputs=["onnx", "plugins"]) as folder:
        (folder / "model.plan").write_bytes(b"plan")
        write_json(folder / BUILD_INFO, info)
    monkeypatch.setattr(trt_runner, "installed", lambda name: "11.4.0")
    monkeypatch.setattr(trt_runner, "find_gpu", lambda: gpu.Gpu("H100", 90, 13000))
    assert trt_runner.spans_of(info) == spans
    return artifact


@pytest.mark.parametrize(
    ("code", "said", "kind", "says"),
    [
        (-9, [], MissingDependencyError, "its process was killed, as Linux does when memory runs out; end other"),
        (-9, ["[W] slow"], MissingDependencyError, "was killed"),
        (1, ["Traceback", "MemoryError"], MissingDependencyError, r"ran out of memory \(MemoryError\)"),
        (-6, ["terminate called after throwing 'std::bad_alloc'"], MissingDependencyError, "ran out of memory"),
        (1, ["ImportError: no libnvinfer"], MissingDependencyError, "cannot be loaded"),
        (-11, [], ArtifactError, "was ended by SIGSEGV; it said nothing"),
        (1, ["[W] 2 GB of memory", "[E] no such op"], ArtifactError, "ended with code 1; no such op"),
    ],
)
def test_how_a_build_process_ended(code: int, said: list[str], kind: type[Exception], says: str) -> None:
    """A lack of memory is the environment's (exit 4), and not a damaged graph (5)."""
    with pytest.raises(kind, match=says):
        raise jobs._failure(code, said, Job("model.onnx", "plan", ()))


def test_what_compiles_is_looked_for_before_it_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with Artifact(tmp_path / "out").lock(), pytest.raises(MissingDependencyError, match="has no bin/nvcc"):
        plugins.build_plugins(Artifact(tmp_path / "out"))
    assert "compiling" not in capsys.readouterr().err


def test_a_sound_engine_passes(engine: Artifact) -> None:
    assert trt_runner.check_engine(engine)["plugin"] == "cpp"


def test_a_changed_plan_is_not_loaded(engine: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    (engine.path("engine") / "model.plan").write_bytes(b"evil")
    with pytest.raises(ArtifactError, match=r"model\.plan is changed.*--trust-engine") as caught:
        trt_runner.check_engine(engine)
    assert caught.value.exit_code == 5
    assert trt_runner.check_engine(engine, trust=True)
    assert "--trust-engine: " in capsys.readouterr().err


def test_an_engine_of_another_version_gpu_library_or_graph_is_not_loaded(
    engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trt_runner, "installed", lambda name: "10.15.1")
        with pytest.raises(ArtifactError, match=r"of TensorRT 11\.4\.0, and 10\.15\.1"):
            trt_runner.check_engine(engine)
    with monkeypatch.context() as patch:
        patch.setattr(trt_runner, "find_gpu", lambda: gpu.Gpu("A100", 80, 13000))
        with pytest.raises(ArtifactError, match="capability 90, and A100 has 80"):
            trt_runner.check_engine(engine)
    with engine.stage("onnx") as folder:
        (folder / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(ArtifactError, match="made from another onnx"):
        trt_runner.check_engine(engine)
    assert trt_runner.check_engine(engine, trust=True)


def test_engines_of_other_kinds_are_not_loaded(engine: Artifact) -> None:
    with engine.stage("engine", inputs=["onnx"]) as folder:
        write_json(folder / BUILD_INFO, {"engine": "ort", "versions": {}})
    with pytest.raises(ArtifactError, match="is for 'ort'"):
        trt_runner.check_engine(engine, trust=True)


def test_flags_of_the_options_are_those_of_the_command() -> None:
    options = Options(Spans(), "cpp", 3, 1 << 30)
    args = parser().parse_args(["--out", "x", *options.flags()])
    assert (args.plugin, args.opt_level, args.workspace) == ("cpp", 3, 1024)
    assert Spans.parse(args.batch, args.prompt, args.cache, 4096) == Spans()
    assert shlex.join(options.flags()).count("--") == 6
