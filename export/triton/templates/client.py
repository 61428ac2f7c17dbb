"""python client.py "The capital of France is" [--stream]: text from the model, by HTTP with no package, or --grpc."""

import argparse
import http.client
import json
import queue
import sys
import urllib.error
import urllib.request

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text")
parser.add_argument("--chat", action="store_true", help="as a user's message, by the tokenizer's chat template")
parser.add_argument("--url", default=None, help="http://127.0.0.1:8000, or 127.0.0.1:8001 with --grpc")
parser.add_argument("--model", default="@NAME@")
parser.add_argument("--max-tokens", type=int, default=64)
parser.add_argument("--temperature", type=float, default=0.0)
parser.add_argument("--stream", action="store_true", help="print each piece as it comes")
parser.add_argument("--grpc", action="store_true", help="by gRPC, as a stream; needs tritonclient[grpc]")
args = parser.parse_args()
question = {"text_input": args.text}
if args.chat:
    question = {"messages": json.dumps([{"role": "user", "content": args.text}])}


def by_http():
    """The pieces of the answer, from Triton's generate extension."""
    body = {**question, "max_tokens": args.max_tokens, "temperature": args.temperature, "stream": args.stream}
    way = "generate_stream" if args.stream else "generate"
    server = args.url or "127.0.0.1:8000"
    server = server if "://" in server else f"http://{server}"
    url = f"{server.rstrip('/')}/v2/models/{args.model}/{way}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        for line in response:
            text = line.decode().removeprefix("data: ").strip()
            if text:
                piece = json.loads(text)
                if "error" in piece:
                    sys.exit(piece["error"])
                yield piece["text_output"]


def by_grpc():
    """The pieces of the answer, from one bidirectional stream."""
    try:
        import numpy as np
        import tritonclient.grpc as grpc
    except ImportError as error:
        print(f"client.py: {error}; --grpc needs it: pip install 'tritonclient[grpc]'", file=sys.stderr)
        sys.exit(4)

    def tensor(name, value, kind, dtype):
        made = grpc.InferInput(name, [1, 1], kind)
        made.set_data_from_numpy(np.array([[value]], dtype))
        return made

    inputs = [tensor(name, text.encode(), "BYTES", np.object_) for name, text in question.items()]
    inputs.append(tensor("max_tokens", args.max_tokens, "INT32", np.int32))
    inputs.append(tensor("temperature", args.temperature, "FP32", np.float32))
    inputs.append(tensor("stream", args.stream, "BOOL", bool))
    found = queue.Queue()
    client = grpc.InferenceServerClient(args.url or "127.0.0.1:8001")
    client.start_stream(callback=lambda result, error: found.put((result, error)))
    client.async_stream_infer(args.model, inputs, enable_empty_final_response=True)
    final = False
    while not final:
        result, error = found.get()
        if error is not None:
            sys.exit(str(error))
        final = result.get_response().parameters["triton_final_response"].bool_param
        text = result.as_numpy("text_output")
        if text is not None:
            yield text.reshape(-1)[0].decode()
    client.stop_stream()


def reason_of(error):
    """The reason for which a server, or something before it, refuses a request."""
    content = error.read().decode("utf-8", "replace").removeprefix("data: ")
    try:
        return json.loads(content)["error"]
    except (ValueError, LookupError, TypeError):
        return f"{error}: {content[:200]}"


try:
    for piece in by_grpc() if args.grpc else by_http():
        print(piece, end="", flush=True)
    print()
except KeyboardInterrupt:
    sys.exit(130)
except urllib.error.HTTPError as error:
    sys.exit(reason_of(error))
except urllib.error.URLError as error:
    sys.exit(f"no server answers ({error.reason}): start it with launch.sh")
except (OSError, ValueError, http.client.HTTPException) as error:
    sys.exit(f"the answer broke off ({error or type(error).__name__}): see the server's log")
