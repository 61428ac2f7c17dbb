"""The served model under load: 24 clients that ask, err, leave and send halves, against one server on this machine.

Every request goes to 127.0.0.1; their number and time are bounded. Answers to valid requests must be those that a
single client gets, memory and file handles must stay what they were, and the server must answer as before afterwards.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.rows import FaultError, Options, Row
from tests.served import MODEL, Server, build, handles, resident, start

CLIENTS = 24
MOST_REQUESTS = 200_000
PATIENCE = 120.0
"""Seconds that no single answer takes."""
MOST_GROWTH = {MODEL: 1.02, f"{MODEL}_lm": 1.02, "tritonserver": 1.1}
"""Memory of each process late in the run, of that early in it."""
MOST_MORE_HANDLES = 8

GREEDY = {"text_input": "The quick brown", "max_tokens": 8}
VALID: tuple[dict[str, Any], ...] = (
    GREEDY,
    {"text_input": "a", "max_tokens": 24},
    {"text_input": "word " * 12, "max_tokens": 4, "logprobs": 2},
    {"text_input": "The mill stands where", "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"text_input": "Numbers 1 2 3", "max_tokens": 12, "temperature": 100.0, "top_k": 40, "seed": 2**64 - 1},
    {"text_input": "The quick", "max_tokens": 16, "repetition_penalty": 10.0, "presence_penalty": 2.0},
    {"text_input": "The quick", "max_tokens": 16, "frequency_penalty": -2.0, "min_tokens": 16, "stop": ["zzz", "qqq"]},
    {"messages": json.dumps([{"role": "user", "content": "héllo"}]), "max_tokens": 6},
)
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"null",
    b"{}",
    b"[" * 10_000,
    b'{"text_input": "a"',
    b'{"text_input": 5}',
    b'{"text_input": ""}',
    b'{"text_input": "\xff\xfe"}',
    b'{"text_input": "\\ud800"}',
    b'{"text_input": ["a", "b"]}',
    b'{"text_input": "a", "messages": "[]"}',
    b'{"text_input": "a", "max_tokens": 0}',
    b'{"text_input": "a", "max_tokens": 1000000}',
    b'{"text_input": "a", "temperature": 1e38, "top_p": 1e-30}',
    b'{"text_input": "a", "repetition_penalty": 1e-40}',
    b'{"text_input": "a", "top_p": 0}',
    b'{"text_input": "a", "stop": [""]}',
    b'{"text_input": "a", "seed": -1}',
    b'{"text_input": "' + b"word " * 2000 + b'"}',
    json.dumps({"messages": "[" * 100_000 + "]" * 100_000}).encode(),
    json.dumps({"messages": '[{"role": "user", "content": "\\ud800"}]'}).encode(),
    json.dumps({"messages": '[{"role": "user", "content": "x", "tool_calls": 5}]'}).encode(),
    json.dumps({"messages": '[{"role": "robot", "content": "x"}]'}).encode(),
)
SECRETS = ("Traceback", "\nAt:", "/lib/", ".py(")
"""What no answer to a client may hold."""


@dataclass
class Load:
    """What came of the requests so far, and how the server looked from outside meanwhile."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)
    handles: dict[str, list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, wrong: str | None) -> int:
        """The number of requests."""
        with self.lock:
            self.done[kind] += 1
            if wrong is not None:
                self.wrong.append(f"{kind}: {wrong}")
            return self.done.total()

    def look(self, processes: dict[str, int]) -> None:
        for name, pid in processes.items():
            self.memory.setdefault(name, []).append(resident(pid))
            self.handles.setdefault(name, []).append(handles(pid))


def run(folder: Path, options: Options) -> list[Row]:
    """Serve a tiny model for `options.minutes` and return what was seen. Raises FaultError where anything is wrong."""
    server = start(build(folder), folder, network=True)
    try:
        return _rows(server, *_loaded(server, options), options)
    finally:
        server.stop()


def _loaded(server: Server, options: Options) -> tuple[Load, dict[str, int], dict[str, int]]:
    """The load, and each process's file handles before and after it."""
    expected = [_said(server.post(json.dumps(body).encode())) for body in VALID]
    cache = _network(server, 1)
    kinds = _kinds(server, expected, cache)
    for kind in kinds.values():  # once by itself, before anything is measured
        kind(random.Random(0))
    processes, load = server.processes(), Load()
    before = {name: handles(pid) for name, pid in processes.items()}
    deadline = time.monotonic() + 60 * options.minutes

    def client(number: int) -> None:
        chance = random.Random(options.seed * CLIENTS + number)
        while time.monotonic() < deadline:
            name = chance.choice(tuple(kinds))
            if load.count(name, kinds[name](chance)) >= MOST_REQUESTS:
                return

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while not all(c.done() for c in clients):
            time.sleep(max(0.05, 60 * options.minutes / 60))
            if server.processes() != processes:
                load.wrong.append("a process ended, or was started again")
                break
            load.look(processes)
        for c in clients:
            c.result()
    for body, answer in zip(VALID, expected, strict=True):
        load.count("afterwards", _differs(_said(server.post(json.dumps(body).encode())), answer))
    if server.probe().returncode != 0 or server.processes() != processes:
        load.wrong.append("the server does not answer after the load")
    return load, before, _settled(processes, before)


def _settled(processes: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """File handles once the server has noticed that the clients are gone; it has a minute for that."""
    for _ in range(120):
        now = {name: handles(pid) for name, pid in processes.items()}
        if all(now[name] <= before[name] + MOST_MORE_HANDLES for name in now):
            break
        time.sleep(0.5)
    return now


def _kinds(
    server: Server, expected: Sequence[dict[str, Any]], cache: dict[str, Any]
) -> dict[str, Callable[[random.Random], str | None]]:
    """Name -> one request of a kind; it returns what was wrong with the answer."""

    def valid(chance: random.Random) -> str | None:
        number = chance.randrange(len(VALID))
        return _differs(_said(server.post(json.dumps(VALID[number]).encode(), timeout=PATIENCE)), expected[number])

    def streamed(chance: random.Random) -> str | None:
        number = chance.randrange(len(VALID))
        body = json.dumps({**VALID[number], "stream": True}).encode()
        return _differs(_joined(server.post(body, "generate_stream", PATIENCE)), expected[number])

    def malformed(chance: random.Random) -> str | None:
        body = chance.choice(MALFORMED)
        answer = server.post(body, timeout=PATIENCE)
        if answer["status"] < 400:
            return f"{body[:80]!r} was answered"
        return f"{body[:80]!r} got {answer['error']!r}" if any(s in answer["error"] for s in SECRETS) else None

    def cancelled(chance: random.Random) -> str | None:
        body = json.dumps({"text_input": "leave", "max_tokens": 100, "min_tokens": 100, "stream": True}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=PATIENCE)
        connection.request("POST", f"/v2/models/{MODEL}/generate_stream", body)
        answer = connection.getresponse()
        for _ in range(chance.randrange(3)):
            answer.readline()
        answer.close()
        connection.close()
        return None if answer.status == 200 else f"status {answer.status}"

    def half_sent(chance: random.Random) -> str | None:
        body = json.dumps(GREEDY).encode()
        head = f"POST /v2/models/{MODEL}/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        whole = head + body
        with socket.create_connection(("127.0.0.1", server.http), timeout=PATIENCE) as connection:
            connection.sendall(whole[: chance.randrange(1, len(whole))])
            time.sleep(chance.random() * 0.2)
        return None

    def network(chance: random.Random) -> str | None:
        found = _network(server, 1)
        return None if found == cache else f"the network gave {str(found)[:200]}"

    def network_malformed(chance: random.Random) -> str | None:
        answer = _network(server, chance.choice((-1, 10**6)))
        error = str(answer.get("error"))
        return None if "input_ids must be 0 to" in error else f"the network gave {str(answer)[:200]}"

    return {
        "valid": valid,
        "streamed": streamed,
        "malformed": malformed,
        "cancelled": cancelled,
        "half-sent": half_sent,
        "network": network,
        "network, malformed": network_malformed,
    }


def _network(server: Server, token: int) -> dict[str, Any]:
    """One token through the network by itself; the answer, or the error."""
    names = [f"past_key_values.{layer}.{part}" for layer, part in itertools.product(range(3), ("key", "value"))]
    inputs = [
        {"name": name, "shape": [1, 1], "datatype": "INT64", "data": [value]}
        for name, value in (("input_ids", token), ("attention_mask", 1), ("position_ids", 0))
    ]
    inputs += [{"name": name, "shape": [1, 2, 0, 16], "datatype": "FP32", "data": []} for name in names]
    body = json.dumps({"inputs": inputs, "outputs": [{"name": "present.0.key"}]})
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=PATIENCE)
    try:
        connection.request("POST", f"/v2/models/{MODEL}_lm/infer", body)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()


def _said(answer: dict[str, Any]) -> dict[str, Any]:
    """What of an answer must be the same whoever else asks: log-probabilities are rounded by the size of a batch."""
    if answer["status"] != 200:
        return answer
    tokens = answer["tokens"] if isinstance(answer["tokens"], list) else [answer["tokens"]]
    return {"text": answer["text_output"], "tokens": tokens, "finish": answer["finish_reason"]}


def _joined(answer: dict[str, Any]) -> dict[str, Any]:
    """A stream, as if it had come in one."""
    if answer["status"] != 200 or not all("tokens" in piece for piece in answer["pieces"]):
        return answer
    pieces = [_said({"status": 200, **piece}) for piece in answer["pieces"]]
    return {
        "text": "".join(piece["text"] for piece in pieces),
        "tokens": [token for piece in pieces for token in piece["tokens"]],
        "finish": pieces[-1]["finish"],
    }


def _differs(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    return None if found == expected else f"{str(found)[:200]} for {str(expected)[:200]}"


def _rows(server: Server, load: Load, before: dict[str, int], after: dict[str, int], options: Options) -> list[Row]:
    if load.wrong:
        raise FaultError(f"{len(load.wrong)} of {load.done.total()} requests went wrong: {'; '.join(load.wrong[:3])}")
    if "started again" in server.said():
        raise FaultError("the server was started again under the load")
    done, rows = load.done, list[Row]()
    under = f"{CLIENTS} clients for {options.minutes:g} minutes"
    valid = done["valid"] + done["streamed"]
    rows.append(Row(f"{under}: valid requests, half of them streamed", valid, "all equal to those of a single client"))
    rows.append(Row("malformed requests among them", done["malformed"], "each refused by a sentence, without a path"))
    rows.append(Row("streams that their client left", done["cancelled"], "no trace of them"))
    rows.append(Row("requests of which a part was sent", done["half-sent"], "no trace of them"))
    rows.append(Row("passes through the network by itself", done["network"], "all equal"))
    rows.append(Row("malformed passes", done["network, malformed"], "each refused by a sentence"))
    for name, sizes in load.memory.items():
        fifth = max(1, len(sizes) // 5)
        early, late = statistics.median(sizes[fifth : 2 * fifth] or sizes), statistics.median(sizes[-fifth:])
        if late > MOST_GROWTH[name] * early:
            raise FaultError(f"the memory of {name} grew from {early / 2**20:.1f} to {late / 2**20:.1f} MB")
        rows.append(
            Row(f"memory of {name}", len(sizes), f"{early / 2**20:.1f} MB early in the run, {late / 2**20:.1f} MB late")
        )
    for name, now in after.items():
        if now > before[name] + MOST_MORE_HANDLES:
            raise FaultError(f"the file handles of {name} grew from {before[name]} to {now}")
        result = f"{before[name]} before, {max(load.handles[name])} at most, {now} after"
        rows.append(Row(f"file handles of {name}", len(load.handles[name]), result))
    rows.append(Row("the same requests afterwards", done["afterwards"], "all equal; the server is ready, no restart"))
    return rows
