"""OUT/triton without a server: configurations of every backend, container and cluster files, launch.sh, the plan."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.artifact.store import Artifact
from compress.errors import UsageError
from export.build import main
from export.stages import BUILD_INFO, build_info, write_json
from export.tensorrt.options import PLAN
from export.triton import deploy
from export.triton.config import INPUTS, Backend, graph_tensors, network_config, text_config
from export.triton.repository import write_repository
from tests.export.cases import Case, export, kron
from tests.export.helpers import llama
from tests.serve import SERVE, environment
from tests.tools import require_server

NAME = "My.Model_7b"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported model."""
    return export(Case(llama(max_positions=64), kron("explicit")), tmp_path_factory.mktemp("graph"))[1].path


@pytest.fixture
def artifact(graph: Path, tmp_path: Path) -> Artifact:
    """With a graph, and nothing else."""
    made = Artifact(tmp_path / "out")
    with made.stage("onnx") as folder:
        for file in graph.parent.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        write_json(folder / BUILD_INFO, {})
    return made


def with_engine(artifact: Artifact) -> None:
    with artifact.stage("engine", inputs=["onnx"]) as folder:
        (folder / PLAN).write_bytes(b"plan")
        write_json(folder / BUILD_INFO, {"engine": "trt", "versions": {"tensorrt": "11.4.0"}})


def parsed(text: str) -> dict[str, Any]:
    """config.pbtxt as JSON, by the message types of Triton's client: a misspelt field or a wrong type is an error."""
    require_server()
    code = "import sys; from google.protobuf import json_format, text_format; "
    code += "from tritonclient.grpc import model_config_pb2 as m; "
    code += "print(json_format.MessageToJson(text_format.Parse(sys.stdin.read(), m.ModelConfig())))"
    command = [str(SERVE / "bin" / "python"), "-c", code]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_text_config_is_read_back_as_protobuf() -> None:
    found = parsed(text_config(NAME, "ort", {"artifact": "../../..", "sequences": "4"}))
    assert (found["name"], found["backend"], found["maxBatchSize"]) == (NAME, "python", 1)
    assert found["modelTransactionPolicy"] == {"decoupled": True}
    assert found["instanceGroup"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert [value["name"] for value in found["input"]] == [name for name, _, _ in INPUTS]
    assert all(value["optional"] for value in found["input"])
    assert found["parameters"]["sequences"] == {"stringValue": "4"}
    assert set(found["modelWarmup"][0]["inputs"]) == {"text_input", "max_tokens"}
    assert parsed(text_config(NAME, "trt", {}))["instanceGroup"] == [{"count": 1, "kind": "KIND_GPU"}]


@pytest.mark.parametrize("backend", ["python", "onnxruntime", "tensorrt"])
def test_network_config_has_the_inputs_and_outputs_of_the_graph(graph: Path, backend: Backend) -> None:
    import onnxruntime

    found = parsed(network_config(NAME, backend, graph_tensors(graph), {}))
    session = onnxruntime.InferenceSession(str(graph))
    kinds = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    for field, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        expected = [(v.name, kinds[v.type], [str(a) if isinstance(a, int) else "-1" for a in v.shape]) for v in values]
        assert [(v["name"], v["dataType"], v["dims"]) for v in found[field]] == expected
    assert "maxBatchSize" not in found  # 0: the batch is an axis of every tensor
    assert found["backend"] == backend
    if backend == "tensorrt":
        assert found["defaultModelFilename"] == PLAN
        assert found["instanceGroup"] == [{"count": 1, "kind": "KIND_GPU", "profile": ["0", "1"]}]


@pytest.mark.parametrize("engine", ["ort", "trt"])
def test_container_and_cluster_files_agree_with_the_artefact(artifact: Artifact, engine: str) -> None:
    write_repository(artifact, engine=engine, name=NAME)
    folder = artifact.path("triton")
    assert not [p for p in folder.iterdir() if p.is_file() and re.search("@[A-Z_]+@", p.read_text(errors="ignore"))]
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["my-model-7b"]
    assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3", service["build"]["args"]["TRITON_IMAGE"])
    assert f"ARG TRITON_IMAGE={deploy.IMAGE}\n" in (folder / "Dockerfile").read_text()
    (mount,) = service["volumes"]
    assert (folder / mount["source"]).resolve() == artifact.out.resolve()
    assert mount["read_only"] is True
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    inside = Path(service["command"][0]).relative_to(mount["target"])
    assert os.access(artifact.out / inside, os.X_OK)
    assert ("deploy" in service) == (engine == "trt")

    deployment, exposed = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == service["command"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [f"127.0.0.1:{port}:{port}" for port in ports.values()] == service["ports"]
    assert {port["name"]: port["port"] for port in exposed["spec"]["ports"]} == ports
    assert exposed["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    probes = [container[probe]["exec"]["command"] for probe in ("startupProbe", "readinessProbe")]
    assert [service["healthcheck"]["test"][1:]] * 2 == probes  # both ask the models, and not /v2/health/ready alone
    assert (artifact.out / Path(probes[0][-1]).relative_to(mount["target"])).is_file()
    assert all(container[probe]["timeoutSeconds"] > 10 for probe in ("startupProbe", "readinessProbe"))
    assert container["livenessProbe"]["httpGet"]["port"] in ports
    # Who starts a server whose model has died again: the container's policy, which supervise.py leaves it to.
    assert {"name": "RESTARTS", "value": "0"} in container["env"]
    assert (service["environment"]["RESTARTS"], service["restart"]) == ("0", "unless-stopped")
    assert ("limits" in container["resources"]) == (engine == "trt")
    needs = (folder / "requirements.txt").read_text()
    assert ("tensorrt" in needs) == (engine == "trt")
    assert re.search(r"^transformers~=\d+\.\d+\.\d+$", needs, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "expected"), [("Llama_2.7b", "llama-2-7b"), ("7b", "model-7b"), ("a" * 80, "a" * 50), ("-x-", "x")]
)
def test_labels_are_dns_labels(name: str, expected: str) -> None:
    assert deploy.label(name) == expected
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", expected)


def test_the_plan_becomes_the_network_once_it_is_there(artifact: Artifact) -> None:
    """Without a GPU the repository is made without it; another graph's plan is not taken."""
    version = artifact.path("triton") / "network" / "m_lm" / "1"
    write_repository(artifact, engine="trt", name="m")
    assert not version.exists()
    with_engine(artifact)
    write_repository(artifact, engine="trt", name="m")
    assert (version / PLAN).read_bytes() == b"plan"
    assert "tensorrt==11.4.0\n" in (artifact.path("triton") / "requirements.txt").read_text()
    artifact.verify()
    with artifact.stage("onnx") as folder:
        (folder / "model.onnx").write_bytes((artifact.path("onnx") / "model.onnx").read_bytes())
        write_json(folder / BUILD_INFO, {"other": 1})
    write_repository(artifact, engine="trt", name="m")
    assert not version.exists()


def test_the_graph_for_the_onnxruntime_backend_is_whole(artifact: Artifact) -> None:
    from export.runtime.ort import OrtRunner

    write_repository(artifact, engine="ort", name="m", network="onnxruntime")
    copy = artifact.path("triton") / "network" / "m_lm" / "1" / "model.onnx"
    ids = [[1, 2, 3]]
    assert (OrtRunner(copy).prefill(ids) == OrtRunner(artifact.path("onnx") / "model.onnx").prefill(ids)).all()


def test_same_options_are_used_again(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    write_repository(artifact, engine="ort", name="m", sequences=3)
    write_repository(artifact, engine="ort", name="m", sequences=3)
    assert "re-using" in capsys.readouterr().err
    write_repository(artifact, engine="ort", name="m", sequences=4)
    assert build_info(artifact, "triton")["sequences"] == 4
    write_repository(artifact, engine="ort", name="m", network="none")
    assert not (artifact.path("triton") / "network").exists()
    with pytest.raises(UsageError, match="--serve-as"):
        write_repository(artifact, engine="ort", name="a/b")


def test_files_of_another_version_are_written_again(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(artifact, engine="ort", name="m", network="none")
    changed = {name: text + "# new\n" for name, text in deploy.templates().items()}
    monkeypatch.setattr(deploy, "templates", lambda: changed)
    write_repository(artifact, engine="ort", name="m", network="none")
    assert (artifact.path("triton") / "kubernetes.yaml").read_text().endswith("# new\n")


def run_launch(artifact: Artifact, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(artifact.path("triton") / "launch.sh"), *arguments]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)


def test_launch_says_what_is_missing(artifact: Artifact, tmp_path: Path) -> None:
    require_server()
    write_repository(artifact, engine="trt", name="m")
    usual = "/usr/bin:/bin"
    done = run_launch(artifact, usual)
    assert done.returncode == 4
    assert "there is no tritonserver on PATH" in done.stderr
    with_server = f"{Path(environment(tmp_path)['PATH'].split(os.pathsep)[0])}{os.pathsep}{usual}"
    bare = tmp_path / "python"
    bare.mkdir()
    (bare / "python3").write_text("#!/bin/sh\nexec /usr/bin/env -i " + f'{SERVE}/bin/python3 -S "$@"\n')
    (bare / "python3").chmod(0o755)
    done = run_launch(artifact, f"{bare}{os.pathsep}{with_server}")
    assert done.returncode == 4
    assert "lacks" in done.stderr
    assert "transformers" in done.stderr
    done = run_launch(artifact, environment(tmp_path)["PATH"], "--network")
    assert done.returncode == 4
    assert "build_engine.sh" in done.stderr


def test_launch_gives_the_plugins_and_what_else_is_given_to_the_server(artifact: Artifact, tmp_path: Path) -> None:
    """The server's command line, by a stand-in for the server."""
    with_engine(artifact)
    with artifact.stage("plugins") as folder:
        (folder / "libprocrustes_autoload.so").write_bytes(b"library")
    write_repository(artifact, engine="trt", name="m")
    (tmp_path / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "tritonserver").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{SERVE / 'bin'}{os.pathsep}/usr/bin:/bin"
    plain = run_launch(artifact, path, "--http-port", "9000").stdout.splitlines()
    out = artifact.out.resolve()
    assert plain[0] == f"--model-repository={out}/triton/repository"
    assert plain[-2:] == ["--http-port", "9000"]
    assert {"--model-control-mode=none", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"} < set(plain)
    assert "--metrics-address=127.0.0.1" in plain
    both = run_launch(artifact, path, "--network").stdout.splitlines()
    assert f"--model-repository={out}/triton/network" in both
    assert f"--backend-config=tensorrt,plugins={out}/plugins/libprocrustes_autoload.so" in both


def test_serving_flags_that_make_no_sense_are_refused() -> None:
    for flags, message in (
        (["--engine", "trt", "--threads", "2"], "--threads would change nothing with --engine trt"),
        (["--engine", "trt", "--serve-network", "onnxruntime"], "does not run what --engine trt makes"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--sequences", "0"], "--sequences must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            main(["--model", "m", "--out", "o", *flags])
