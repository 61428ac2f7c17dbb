"""python3 probe.py: exits with 0 if the models of this folder answer, else with 1 and the reason.

For probes of containers and clusters, in place of /v2/health/ready: Triton calls a model ready for as long as it is
loaded, though its process may have ended. This asks the models themselves, and needs Python alone.
"""

import argparse
import http.client
import json
import math
import sys
import urllib.parse

MODEL, NETWORK = "@NAME@", "@NETWORK@"
TIMEOUT = 10.0


class NotReadyError(Exception):
    """With the reason. status: of the answer, None where there is none."""

    def __init__(self, reason, status=None):
        super().__init__(reason)
        self.status = status


def call(url, path, body=None, timeout=TIMEOUT):
    """(status, content) of one request to the server. Raises NotReadyError where there is no answer."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise NotReadyError(f"no answer from {url}{path} ({error or type(error).__name__})") from error
    finally:
        connection.close()


def reason_of(content):
    """What the server says is wrong."""
    try:
        return json.loads(content)["error"]
    except (ValueError, LookupError, TypeError):
        return content[:200].decode("utf-8", "replace")


def ask_text(url, timeout):
    """The text model must answer the question whether it is well."""
    status, content = call(url, f"/v2/models/{MODEL}/generate", b'{"health": true}', timeout)
    if status != 200 or b'"ready"' not in content:
        raise NotReadyError(f"{MODEL}: {reason_of(content)}", status)


def ask_network(url, timeout):
    """The network by itself, where it is loaded: in a process of its own, whose state only an answer shows, it must
    read one token."""
    path = f"/v2/models/{NETWORK}"
    status, content = call(url, path, None, timeout)
    if status != 200:
        return
    known = json.loads(content)
    status, content = call(url, f"{path}/ready", None, timeout)
    if status != 200:
        raise NotReadyError(f"{NETWORK}: {reason_of(content)}", status)
    if json.loads(call(url, f"{path}/config", None, timeout)[1]).get("backend") != "python":
        return
    inputs = []
    for tensor in known["inputs"]:
        cache = tensor["name"].startswith("past_key_values.")
        shape = [1, tensor["shape"][1], 0, tensor["shape"][3]] if cache else [1, 1]
        value = 1 if tensor["name"] == "attention_mask" else 0
        inputs.append({**tensor, "shape": shape, "data": [value] * math.prod(shape)})
    smallest = next(tensor["name"] for tensor in known["outputs"] if tensor["name"] != "logits")
    body = {"inputs": inputs, "outputs": [{"name": smallest}]}
    status, content = call(url, f"{path}/infer", json.dumps(body).encode(), timeout)
    if status != 200:
        raise NotReadyError(f"{NETWORK}: {reason_of(content)}", status)


def ask(url, timeout=TIMEOUT):
    """Raises NotReadyError, with a sentence."""
    ask_text(url, timeout)
    ask_network(url, timeout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each question")
    args = parser.parse_args()
    try:
        ask(args.url, timeout=args.timeout)
    except NotReadyError as reason:
        print(f"probe.py: not ready: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
