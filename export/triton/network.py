"""The network by itself in Triton's python backend, for servers without the onnxruntime backend. Tensors in and out.

The cache goes over the wire at every step: this is for tests, for perplexity by a client, and for samplers of one's
own. The text model (model.py) does not call it.
"""

from __future__ import annotations

from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils

from compress.progress import log
from export.runtime.ort import OrtRunner
from export.triton.batching import ENGINE_FAILED
from export.triton.failures import Contained, sendable
from export.triton.passes import check_feeds
from export.triton.served import configured, sound_graph

errors = onnxruntime.capi.onnxruntime_pybind11_state


class TritonPythonModel:
    """See the interface of Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph, after a look at its hashes."""
        artifact, parameters = configured(args)
        self.runner = OrtRunner(sound_graph(artifact), threads=int(parameters["threads"]))
        self.inputs = [value.name for value in self.runner.session.get_inputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One pass for each request. One that fails leaves the others alone."""
        responses: list[Any] = []
        for request in requests:
            with Contained(lambda reason: responses.append(_error(reason))):
                responses.append(self._answer(request))
        return responses

    def _answer(self, request: Any) -> Any:
        wanted = [name for name in self.runner.outputs if name in set(request.requested_output_names())]
        feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        check_feeds(feeds, vocabulary=self.runner.vocabulary, positions=self.runner.metadata["max_positions"])
        try:
            made = self.runner.session.run(wanted, feeds)
        except (errors.EPFail, errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:  # such as memory
            log(f"the engine failed: {error}")
            return _error(ENGINE_FAILED)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, value) for name, value in zip(wanted, made, strict=True)]
        )


def _error(reason: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(sendable(reason)))
