#!/usr/bin/env bash
# Starts Triton with the model of this folder, on this machine's own address:
#   launch.sh                      @NAME@: text in, text out
#   launch.sh --network            also the network by itself, which needs the memory of its weights a second time
#   launch.sh --http-port 9000     what else is given goes to tritonserver as it is
# LISTEN=0.0.0.0 in the environment: on all addresses, for instance inside a container.
# The models are asked every few seconds whether they answer (probe.py), and the server is started again when one has
# died: RESTARTS=0 in the environment ends launch.sh instead, for instance for the restart policy of a container.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="$(dirname "$here")"
command -v tritonserver > /dev/null || {
  echo "launch.sh: there is no tritonserver on PATH; it is in NVIDIA's container, see $here/Dockerfile" >&2
  exit 4
}
command -v python3 > /dev/null || {
  echo "launch.sh: there is no python3 on PATH, which runs the model: install it, and then $here/requirements.txt" >&2
  exit 4
}
missing="$(python3 -c 'import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' numpy onnx onnxruntime torch transformers)"
[ -z "$missing" ] || {
  echo "launch.sh: $(command -v python3) lacks $missing: pip install -r $here/requirements.txt," \
    "or put the python3 that has them first on PATH" >&2
  exit 4
}
arguments=(--model-repository="$here/repository")
if [ "${1:-}" = --network ]; then
  shift
  [ -e "$here/network/@NETWORK_FILE@" ] || {
    echo "launch.sh: there is no $here/network/@NETWORK_FILE@: made with --serve-network none, or, for TensorRT," \
      "the engine is not built yet ($out/build_engine.sh)" >&2
    exit 4
  }
  arguments+=(--model-repository="$here/network")
  plugins="$out/plugins/libprocrustes_autoload.so"
  [ ! -f "$plugins" ] || arguments+=(--backend-config=tensorrt,plugins="$plugins")
fi
address="${LISTEN:-127.0.0.1}"
exec python3 "$here/supervise.py" tritonserver "${arguments[@]}" --model-control-mode=none --exit-on-error=true \
  --http-address="$address" --grpc-address="$address" --metrics-address="$address" "$@"
