"""Run by the serving environment's Python: greedy decoding by a client, with the cache going over the wire.

`network_client.py URL MODEL IDS COUNT`: prints the tokens, and what a contradictory request is answered with, as JSON.
"""

import json
import sys

import numpy as np
import tritonclient.grpc as grpc

url, model, ids, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
client = grpc.InferenceServerClient(url)
inputs = {t.name: t for t in client.get_model_metadata(model).inputs}
types = {"INT64": np.int64, "FP32": np.float32}


def step(feeds):
    tensors = []
    for name, value in feeds.items():
        made = grpc.InferInput(name, value.shape, inputs[name].datatype)
        made.set_data_from_numpy(value.astype(types[inputs[name].datatype]))
        tensors.append(made)
    return client.infer(model, tensors)


past = {
    name: np.zeros([1, t.shape[1], 0, t.shape[3]], np.float32)
    for name, t in inputs.items()
    if name.startswith("past_key_values.")
}
tokens, new, seen = [], np.array([ids]), 0
while len(tokens) < count:
    seen += new.shape[1]
    places = np.arange(seen - new.shape[1], seen)[None]
    feeds = {"input_ids": new, "attention_mask": np.ones((1, seen)), "position_ids": places, **past}
    result = step(feeds)
    tokens.append(int(result.as_numpy("logits")[0, -1].argmax()))
    past = {name: result.as_numpy(name.replace("past_key_values.", "present.")) for name in past}
    new = np.array([[tokens[-1]]])
try:
    step({**feeds, "attention_mask": np.ones((1, 1))})
    refused = "answered"
except grpc.InferenceServerException as error:
    refused = f"error: {error}"
print(json.dumps({"tokens": tokens, "refused": refused}))
