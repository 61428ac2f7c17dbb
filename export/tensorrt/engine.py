"""A TensorRT engine loaded for this GPU, after the checks that an executable file calls for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact.files import sha256_of
from compress.artifact.store import Artifact
from compress.errors import ArtifactError, MissingDependencyError
from compress.lazy import require
from compress.progress import log
from export.graph.decoder import MODEL_NAME
from export.graph.header import read_header
from export.runtime.device import DeviceRunner
from export.runtime.profiles import DECODE, PREFILL, Span, Spans
from export.stages import build_info
from export.tensorrt.gpu import find_gpu
from export.tensorrt.options import PLAN, installed, plugin_library

TIMED_STEPS = 50


def check_engine(artifact: Artifact, *, trust: bool = False) -> dict[str, Any]:
    """Before a plan is loaded, which is as good as running a program: build.json of OUT/engine, or ArtifactError.

    The plan must be the file that manifest.json vouches for, made from the present graph by the TensorRT and for the
    kind of GPU that are here, with the present plugin library. `trust` logs what is wrong and goes on.
    """
    wrong = []
    try:
        artifact.require_stage("engine")
        artifact.verify(["engine"])
    except ArtifactError as error:
        wrong.append(str(error))
    info = build_info(artifact, "engine")
    if info.get("engine") != "trt":
        raise ArtifactError(f"{artifact.path('engine')} is for {info.get('engine')!r}; build it with --engine trt")
    version, gpu = installed("tensorrt"), find_gpu()
    if version is not None and info["versions"].get("tensorrt") != version:
        wrong.append(f"the plan is of TensorRT {info['versions'].get('tensorrt')}, and {version} is installed")
    if gpu is not None and info["gpu"]["capability"] != gpu.capability:
        wrong.append(
            f"the plan is for compute capability {info['gpu']['capability']}, and {gpu.name} has {gpu.capability}"
        )
    if info["plugin"] == "cpp":
        library = plugin_library(artifact)
        if library is None or sha256_of(library) != info["plugin_sha256"]:
            wrong.append("the plugin library is not the one that the plan was built with")
    for reason in wrong:
        if not trust:
            raise ArtifactError(f"{reason}; build the engine again, or give --trust-engine to load it all the same")
        log(f"--trust-engine: {reason}")
    return info


def load_engine(artifact: Artifact, *, trust: bool = False, graphs: bool = True) -> DeviceRunner:
    """OUT's TensorRT engine as a runner. See `check_engine`; MissingDependencyError without a GPU or TensorRT."""
    info = check_engine(artifact, trust=trust)
    library = plugin_library(artifact) if info["plugin"] == "cpp" else None
    onnx, spans = artifact.require_stage("onnx") / MODEL_NAME, spans_of(info)
    return DeviceRunner(TrtExecutor(artifact.path("engine") / PLAN, onnx, spans, library), graphs=graphs)


def spans_of(info: Mapping[str, Any]) -> Spans:
    """What the profiles of a build.json allow."""
    prefill, decode = (info["profiles"][index]["attention_mask"] for index in (PREFILL, DECODE))
    prompt = [shape[1] for shape in info["profiles"][PREFILL]["input_ids"]]
    return Spans(Span(*(shape[0] for shape in prefill)), Span(*prompt), Span(*(shape[1] - 1 for shape in decode)))


class TrtExecutor:
    """See `device_runner.Executor`. One execution context for each profile, so that none waits for a change."""

    def __init__(self, plan: Path, onnx: Path, spans: Spans, library: Path | None) -> None:
        trt = require("tensorrt", pip="'procrustes-llm[gpu]'", purpose="run a TensorRT engine")
        if not torch.cuda.is_available():
            raise MissingDependencyError(
                "running a TensorRT engine needs an NVIDIA GPU and a PyTorch built for CUDA; this one sees none"
            )
        self.device, self.spans = torch.device("cuda"), spans
        header = read_header(onnx)
        self.axes, self.metadata, self.vocabulary = header.axes, header.metadata, header.vocabulary
        if library is not None and trt.get_plugin_registry().load_library(str(library)) is None:
            raise ArtifactError(f"TensorRT {trt.__version__} does not load {library}; build the plugins again")
        self._logger = trt.Logger(trt.Logger.WARNING)  # kept: the runtime refers to it
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"TensorRT {trt.__version__} does not load {plan}; build the engine again")
        kinds = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
        }
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.types = {name: kinds[self._engine.get_tensor_dtype(name)] for name in names}
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._contexts = []
        for profile in range(self._engine.num_optimization_profiles):
            context = self._engine.create_execution_context()
            if context is None:
                raise MissingDependencyError("the GPU has no memory left for an execution context of this engine")
            context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
            self._contexts.append(context)
        torch.cuda.synchronize()
        self._nothing = torch.empty(256, dtype=torch.uint8, device=self.device)  # the address of empty tensors

    def run(self, profile: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`. Raises ArtifactError when TensorRT refuses a shape or reports a failure."""
        context = self._contexts[profile]
        for name, value in feeds.items():
            address = value.data_ptr() if value.numel() else self._nothing.data_ptr()
            if not (context.set_input_shape(name, tuple(value.shape)) and context.set_tensor_address(name, address)):
                raise ArtifactError(f"the engine takes no {name} of shape {tuple(value.shape)} in profile {profile}")
        outputs = {}
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self.types[name], device=self.device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ArtifactError("the engine failed; what TensorRT said of it is above")
        return outputs


def seconds_at(plan: Path, onnx: Path, spans: Spans, library: Path | None) -> dict[str, float]:
    """Median seconds of a prefill and of a decode step at the usual sizes, by CUDA events. Needs the GPU."""
    import numpy as np

    runner = DeviceRunner(TrtExecutor(plan, onnx, spans, library))
    generator = np.random.default_rng(0)
    prompt, cached = (
        generator.integers(0, runner.vocabulary, (spans.batch.best, length))
        for length in (spans.prompt.best, min(spans.prompt.most, spans.cache.best))
    )

    def median(call: Any) -> float:
        times = []
        for _ in range(TIMED_STEPS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return float(np.median(times[5:]))

    found = {"prefill": median(lambda: runner.prefill(prompt))}
    runner.prefill(cached)
    found["decode"] = median(lambda: runner.decode(cached[:, :1]))
    return found
