"""ONNX Runtime: sessions that run where they were asked to, prefill, decode with the cache, generation."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.lazy import require
from export.graph.header import session_header
from export.runtime.profiles import Span, Spans
from export.runtime.runner import Ids, Logits, Runner

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

CPU = ("CPUExecutionProvider",)

_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16}


class OrtRunner(Runner):
    """One exported model in ONNX Runtime, with the key-value cache inside: prefill, then decode.

    Raises ArtifactError when the model cannot be loaded, MissingDependencyError when a provider that was asked
    for is not the one that runs (ONNX Runtime falls back to the CPU without an error).
    """

    def __init__(
        self, path: Path, *, threads: int = 1, providers: Sequence[str] = CPU, profile: str | None = None
    ) -> None:
        """threads: of one operator; profile: prefix of a file for ONNX Runtime's own profile, if wanted."""
        self.path = Path(path)
        self.session = _session(self.path, threads, providers, profile)
        self.header = session_header(self.path, self.session)
        self.vocabulary, caches = self.header.vocabulary, self.header.caches
        if caches[0].dtype not in _NUMPY_TYPES:
            raise UsageError(
                f"{path} keeps its cache as {caches[0].dtype}, which numpy does not have; use --dtype float32"
            )
        self.outputs = [output.name for output in self.header.outputs]
        self.metadata = self.header.metadata
        self._caches = [cache.name for cache in caches]
        self._cache_type = _NUMPY_TYPES[caches[0].dtype]
        self._kv_heads, self._head_dim = self.header.cache_sizes
        self._past: list[onnxruntime.OrtValue] = []
        self._mask: Ids = np.zeros((0, 0), np.int64)

    @property
    def length(self) -> int:
        """See `Runner.length`."""
        return int(self._mask.shape[1])

    def reset(self) -> None:
        """See `Runner.reset`."""
        self._past, self._mask = [], np.zeros((0, 0), np.int64)

    def prefill(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """See `Runner.prefill`."""
        ids, mask = self._checked(input_ids, attention_mask)
        self.reset()
        empty = np.zeros((len(ids), self._kv_heads, 0, self._head_dim), self._cache_type)
        past = [_ort_value(empty) for _ in self._caches]
        return self._step(ids, mask, past)

    def decode(self, token_ids: npt.ArrayLike) -> Logits:
        """See `Runner.decode`."""
        ids = self._continued(token_ids, len(self._mask))
        return self._step(ids, np.concatenate([self._mask, np.ones_like(ids)], axis=1), self._past)

    def run_full(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """See `Runner.run_full`."""
        kept = self._past, self._mask
        try:
            return self.prefill(input_ids, attention_mask)
        finally:
            self._past, self._mask = kept

    def _step(self, ids: Ids, mask: Ids, past: list[onnxruntime.OrtValue]) -> Logits:
        """mask: (batch, past + new). Outputs become the next step's inputs as they are, without a copy."""
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": self._positions(mask, ids.shape[1])}
        values = {name: _ort_value(value) for name, value in feeds.items()}
        values |= zip(self._caches, past, strict=True)
        results = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, values), strict=True))
        self._past = [results[name.replace("past_key_values.", "present.")] for name in self._caches]
        self._mask = mask
        return cast(Logits, results["logits"].numpy())


class OrtExecutor:
    """See `device_runner.Executor`: one pass at a time, on the CPU, of any size."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import torch

        runner = OrtRunner(path, threads=threads)
        self.session, self.metadata, self.vocabulary = runner.session, runner.metadata, runner.vocabulary
        self.axes, self.device = runner.header.axes, torch.device("cpu")
        most = int(self.metadata["max_positions"])
        self.spans = Spans(Span(1, 1, sys.maxsize), Span(1, 1, most), Span(1, 1, most))
        kinds = {"int64": torch.int64, "float32": torch.float32, "float16": torch.float16}
        self.types = {value.name: kinds[value.dtype] for value in runner.header.inputs}
        self._outputs = runner.outputs

    def run(self, profile: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`; a pass is of the same graph whatever the profile. Raises RuntimeError for whatever ONNX
        Runtime reports, such as too little memory: its own exceptions are none."""
        import onnxruntime
        import torch

        errors = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            made = self.session.run(self._outputs, {name: value.numpy() for name, value in feeds.items()})
        except (errors.EPFail, errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            raise RuntimeError(str(error).strip()) from error
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, made, strict=True)}


def executed_nodes(path: Path) -> dict[str, int]:
    """op_type -> how many nodes ONNX Runtime runs for a prefill of two tokens, after its own optimisation.

    No function of ours may be among them: every one is inlined. Also a smoke test: the model loads and runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = OrtRunner(path, profile=str(Path(folder) / "profile"))
        runner.prefill([[0, 0]])
        profile = Path(runner.session.end_profiling())
        try:
            events = json.loads(profile.read_text())
        except (OSError, ValueError) as error:  # ONNX Runtime says nothing of writes that fail
            raise ArtifactError(
                f"ONNX Runtime could not write its profile of {path} to {profile} ({error}): free some space there, or "
                f"set TMPDIR to another folder"
            ) from error
    # One event a node and run; shape nodes that were folded away have none.
    nodes = {event["name"]: event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    return dict(sorted(Counter(nodes.values()).items()))


def _session(path: Path, threads: int, providers: Sequence[str], profile: str | None) -> onnxruntime.InferenceSession:
    ort = require("onnxruntime", pip="'onnxruntime>=1.23.2'", purpose="run an exported model")
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run python -m export.build first")
    missing = [p for p in providers if p not in ort.get_available_providers()]
    if missing:
        raise MissingDependencyError(
            f"ONNX Runtime has no {missing[0]} here, only {', '.join(ort.get_available_providers())}; "
            "install the package that has it in place of onnxruntime, whose files it shares (for CUDA: pip uninstall "
            "onnxruntime, then pip install onnxruntime-gpu)"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: they come back as exceptions, with their text
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    errors = ort.capi.onnxruntime_pybind11_state
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except errors.NotImplemented as error:
        raise UsageError(
            f"ONNX Runtime cannot run {path} on {providers[0]}: it lacks an operator for this type, as it does for "
            f"bfloat16 on the CPU ({str(error).strip()}); export it with --dtype float32"
        ) from error
    except (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NoSuchFile,
        errors.RuntimeException,
    ) as error:
        raise ArtifactError(f"ONNX Runtime cannot load {path} ({str(error).strip()}); export it again") from error
    running = session.get_providers()
    if running[: len(providers)] != list(providers):
        raise MissingDependencyError(
            f"ONNX Runtime runs {path.name} on {running[0]} though {', '.join(providers)} was asked for; "
            "check the driver and libraries of that provider"
        )
    return session


def _ort_value(array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
