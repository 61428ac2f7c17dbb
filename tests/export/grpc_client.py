"""Run by the serving environment's Python, which alone has a Triton client: streams one answer by gRPC, prints JSON.

`grpc_client.py URL MODEL TEXT MAX_TOKENS [LEAVE_AFTER]`: cancels the stream after so many pieces.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as grpc

url, model, text, max_tokens = sys.argv[1:5]
leave_after = int(sys.argv[5]) if len(sys.argv) > 5 else None


def tensor(name, value, kind):
    values = np.array([[value]], dtype=np.object_ if kind == "BYTES" else {"INT32": np.int32, "BOOL": bool}[kind])
    made = grpc.InferInput(name, values.shape, kind)
    made.set_data_from_numpy(values)
    return made


found = queue.Queue()
client = grpc.InferenceServerClient(url)
client.start_stream(callback=lambda result, error: found.put((result, error)))
inputs = [tensor("text_input", text.encode(), "BYTES"), tensor("max_tokens", int(max_tokens), "INT32")]
client.async_stream_infer(model, [*inputs, tensor("stream", True, "BOOL")], enable_empty_final_response=True)
pieces, tokens, error, final = [], [], None, False
while not final and error is None and (leave_after is None or len(pieces) < leave_after):
    result, error = found.get(timeout=120)
    if error is None:
        final = result.get_response().parameters["triton_final_response"].bool_param
        output = result.as_numpy("text_output")
        if output is not None:
            pieces.append(output[0, 0].decode())
            tokens += result.as_numpy("tokens")[0].tolist()
client.stop_stream(cancel_requests=leave_after is not None)
print(json.dumps({"pieces": pieces, "tokens": tokens, "error": None if error is None else str(error)}))
