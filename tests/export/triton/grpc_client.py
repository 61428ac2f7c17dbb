"""Run by the serving environment's Python, which alone has a Triton client: asks by gRPC, prints what came as JSON.

`grpc_client.py URL MODEL BODY [LEAVE_AFTER]`: BODY is a JSON object of inputs; cancels the stream after so many pieces.
"""

import json
import os
import queue
import sys

import numpy as np
import tritonclient.grpc as grpc

KINDS = {"max_tokens": ("INT32", np.int32), "min_tokens": ("INT32", np.int32), "seed": ("UINT64", np.uint64)}
url, model, body = sys.argv[1:4]
leave_after = int(sys.argv[4]) if len(sys.argv) > 4 else None


def tensor(name, value):
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str):
        kind, values = "BYTES", np.array([[text.encode() for text in values]], np.object_)
    else:
        by_type = ("BOOL", bool) if isinstance(values[0], bool) else ("FP32", np.float32)
        kind, dtype = KINDS.get(name, by_type)
        values = np.array([values], dtype)
    made = grpc.InferInput(name, values.shape, kind)
    made.set_data_from_numpy(values)
    return made


found = queue.Queue()
client = grpc.InferenceServerClient(url)
client.start_stream(callback=lambda result, error: found.put((result, error)))
inputs = [tensor(name, value) for name, value in json.loads(body).items()]
client.async_stream_infer(model, inputs, enable_empty_final_response=True)
pieces, tokens, error, final = [], [], None, False
outputs = {"num_input_tokens": [], "num_output_tokens": []}
while not final and error is None and (leave_after is None or len(pieces) < leave_after):
    result, error = found.get(timeout=500)
    if error is None:
        final = result.get_response().parameters["triton_final_response"].bool_param
        output = result.as_numpy("text_output")
        if output is not None:
            pieces.append(output[0, 0].decode())
            tokens += result.as_numpy("tokens")[0].tolist()
            for name, values in outputs.items():
                values.append(int(result.as_numpy(name)[0, 0]))
client.stop_stream(cancel_requests=leave_after is not None)
error = None if error is None else str(error)
print(json.dumps({"pieces": pieces, "tokens": tokens, "outputs": outputs, "error": error}))
sys.stdout.flush()
os._exit(0)  # threads of gRPC have kept an interpreter from ending
