"""The two models that validation compares: an artifact, and the source model that it was made from."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from compress.artifact.store import Artifact
from compress.errors import UsageError
from compress.progress import log
from compress.source.resolve import look_up

if TYPE_CHECKING:
    from compress.checkpoint.reader import CheckpointReader
    from compress.model.decoder import ProcrustesForCausalLM
    from compress.source.model import ModelSource
    from validate.cost import ModelCost


class Baseline:
    """OUT, verified, and its source. As a context it holds OUT's lock and removes what it made beside it.

    `model` names the source, in place of the manifest's entry; `dense` is a dense ONNX export to use.
    Raises ArtifactError when OUT is damaged or the source is not the one that it was made from, UsageError when it is
    not found.
    """

    def __init__(
        self, out: Path, *, model: str | None = None, dense: Path | None = None, trust_remote_code: bool = False
    ) -> None:
        self.artifact = Artifact(out)
        self._model, self._dense, self._trust_remote_code = model, dense, trust_remote_code
        self._stack = ExitStack()

    def __enter__(self) -> Baseline:
        self.manifest = self.artifact.read_manifest()
        # Names first: what follows reads every file of OUT.
        if self._model is not None:
            look_up(self._model)
        self.dense_given()
        self.artifact.verify()
        self.checkpoint = self.artifact.require_stage("checkpoint")
        with ExitStack() as stack:
            stack.enter_context(self.artifact.lock())
            self.artifact.claim("reports")
            self.artifact.clear_finished_state()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def onnx(self) -> Path:
        """OUT's exported model. Raises ArtifactError when there is none, or it is older than the checkpoint."""
        return self.artifact.require_stage("onnx") / "model.onnx"

    @cached_property
    def reader(self) -> CheckpointReader:
        """OUT's checkpoint."""
        from compress.checkpoint.reader import CheckpointReader

        return CheckpointReader(self.checkpoint)

    @cached_property
    def source(self) -> ModelSource:
        """The model that OUT was made from, found again and held against the manifest's hashes."""
        from compress.source.provenance import find_source

        return find_source(self.manifest["source"], self.artifact.out, self._model, self._trust_remote_code)

    @cached_property
    def dense(self) -> ProcrustesForCausalLM:
        """The source in PyTorch, float32, folded and rotated as OUT's checkpoint is, nothing approximated."""
        from compress.checkpoint.rewritten import rewritten_model

        log("folding and rotating the source")
        with self.artifact.scratch("dense") as folder:
            return rewritten_model(self.source, self.checkpoint, folder)

    @cached_property
    def compressed(self) -> ProcrustesForCausalLM:
        """OUT's checkpoint in PyTorch, float32."""
        from compress.checkpoint.loading import load_model

        return load_model(self.checkpoint)

    def release(self) -> None:
        """Forget the PyTorch models; they are loaded again when asked for."""
        self.__dict__.pop("dense", None)
        self.__dict__.pop("compressed", None)

    def costs(self) -> tuple[ModelCost, ModelCost]:
        """Sizes of the dense and of the compressed model."""
        from compress.checkpoint.writer import config_for
        from compress.rewrites.rotations import Rotations
        from validate.cost import ModelCost

        config = self.reader.config
        dense = config_for(self.reader.architecture, {}, Rotations.none())
        return ModelCost.of(dense), ModelCost.of(config)

    def dense_given(self) -> Path | None:
        """The dense export that was given; UsageError when it is none."""
        return None if self._dense is None else dense_export(self._dense)

    def dense_onnx(self) -> Path:
        """The dense model, exported by the same code with the same options; made beside it when not given."""
        given = self.dense_given()
        if given is not None:
            return given
        from compress.checkpoint.rewritten import write_dense
        from export.graph.decoder import export_onnx
        from validate.graphfacts import GraphFacts

        folder = self._stack.enter_context(self.artifact.scratch("dense-baseline"))
        facts = GraphFacts.of(self.onnx)
        log("exporting the dense model as the baseline")
        write_dense(self.source, folder / "checkpoint")
        info = export_onnx(folder / "checkpoint", folder / "onnx", dtype=facts.dtype, logits=facts.logits)
        shutil.rmtree(folder / "checkpoint")
        return info.path


def dense_export(given: Path) -> Path:
    """The ONNX file that --dense names, itself or by its folder. Raises UsageError when it is none."""
    path = given / "model.onnx" if given.is_dir() else given
    if not path.is_file():
        wrong = "has no model.onnx" if given.is_dir() else "is not there"
        raise UsageError(f"--dense {str(given)!r} {wrong}: name an export of the dense model, or leave --dense out")
    return path
