"""Run in a process of its own: parse one ONNX file with TensorRT-RTX, with --build make a plan; print JSON.
`--plugins LIBRARY` loads a plugin library into the registry first.

A defect in the parser ends the process, and its bindings want their library under an unversioned name on
LD_LIBRARY_PATH before the process starts; both are the caller's business.
"""

import json
import sys

import tensorrt_rtx as trt

PROFILE = ((1, 1, 0), (1, 8, 8), (4, 16, 16))  # least, best, most: (batch, new tokens, past)


def axes(name: str, shape: list[int], batch: int, new: int, past: int) -> list[int]:
    """The shape of one input of an exported decoder."""
    if name.startswith("past_key_values."):
        return [batch, shape[1], past, shape[3]]
    return [batch, new + past if name == "attention_mask" else new]


def build(builder, network) -> int:
    """Size of the plan in bytes, 0 where none could be built."""
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *(axes(tensor.name, list(tensor.shape), *point) for point in PROFILE))
    config.add_optimization_profile(profile)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Fused kernels want half precision and common head sizes; the bindings need the cast by hand.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    plan = builder.build_serialized_network(network, config)
    return 0 if plan is None else plan.nbytes


logger = trt.Logger(trt.Logger.ERROR)
if "--plugins" in sys.argv:
    trt.get_plugin_registry().load_library(sys.argv[sys.argv.index("--plugins") + 1])
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
parsed = parser.parse_from_file(sys.argv[1])
layers = [network.get_layer(i) for i in range(network.num_layers)]
result = {
    "parsed": bool(parsed),
    "errors": [str(parser.get_error(i)) for i in range(parser.num_errors)],
    "layers": sorted({str(layer.type) for layer in layers}),
    "plugins": sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers),
    "outputs": [str(network.get_output(i).dtype) for i in range(network.num_outputs)],
}
if "--build" in sys.argv:
    result["plan_bytes"] = build(builder, network)
print(json.dumps(result))
