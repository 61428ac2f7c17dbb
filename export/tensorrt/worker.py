"""Builds one engine in a process of its own: `python -m export.tensorrt.worker JOB.json RESULT.json`.

NVIDIA's libraries end the process on some defects, and read LD_LIBRARY_PATH when it starts: both are why this is no
function call. Progress goes to stdout, a JSON object a line, among what polygraphy and TensorRT say there and on
stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from export.tensorrt.jobs import Job


def main(job_file: str, result_file: str) -> int:
    """0 and a result, or another code after TensorRT's own words."""
    job = Job.from_json(Path(job_file).read_text(encoding="utf-8"))
    if job.rtx:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # polygraphy reads it when it is imported
    started = time.monotonic()
    result = _build(job)
    result["seconds"] = time.monotonic() - started
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _build(job: Job) -> dict[str, Any]:
    import polygraphy
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    trt = importlib.import_module("tensorrt_rtx" if job.rtx else "tensorrt")
    G_LOGGER.module_severity = {"": G_LOGGER.WARNING}
    for library in job.plugins:
        if trt.get_plugin_registry().load_library(library) is None:
            raise RuntimeError(f"TensorRT {trt.__version__} does not load {library}")
    _say(phase="parsing", step=0, of=1, whole=True)
    # TensorRT 11 knows no other kind of network, and may lose the flag that asks for it.
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, parser = network_from_onnx_path(job.onnx, strongly_typed=typed)
    _let_attention_decompose(trt, network)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    plan = engine_bytes_from_network((builder, network, parser), config=_config(job, trt), **_timing(job))
    size = Path(job.plan).write_bytes(plan)
    if job.layers is not None:
        Path(job.layers).write_text(_layers(trt, plan), encoding="utf-8")
    return {
        "version": trt.__version__,
        "polygraphy": polygraphy.__version__,
        "plan_bytes": size,
        "network_layers": len(layers),
        "plugin_layers": plugins,
    }


def _layers(trt: Any, plan: Any) -> str:
    """What the engine is made of, with the tactic of each layer, as TensorRT's own JSON. Needs the GPU."""
    logger = trt.Logger(trt.Logger.ERROR)  # has to outlive what refers to it
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(bytes(plan))
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Fused attention wants half precision and usual head sizes; elsewhere TensorRT may take it apart."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):  # versions before it have no such layers
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True


def _config(job: Job, trt: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for given in job.profiles:
        profile = Profile()
        for name, (least, best, most) in given.items():
            profile.add(name, min=tuple(least), opt=tuple(best), max=tuple(most))
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "builder_optimization_level": job.optimization,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": _monitor(trt),
    }
    if job.workspace is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job.workspace}
    if job.rtx:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX(compute_capabilities=[divmod(c, 10) for c in job.capabilities] or None, **options)
    if job.timing_cache is not None:
        options["load_timing_cache"] = job.timing_cache  # locked by polygraphy while it is read, and written below
    return CreateConfig(**options)


def _timing(job: Job) -> dict[str, Any]:
    return {} if job.rtx or job.timing_cache is None else {"save_timing_cache": job.timing_cache}


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Each step as it is completed; `whole`: of the build itself, and not of a phase inside it."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[str, int] = {}
            self.outermost: set[str] = set()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.sizes[phase] = steps
            if parent is None:
                self.outermost.add(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            _say(phase=phase, step=step + 1, of=self.sizes.get(phase, 0), whole=phase in self.outermost)
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            self.sizes.pop(phase, None)

    return Monitor()


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
