"""Throughput of a served model against the dense one, both in one running Triton server.

Clients stream answers of a fixed number of tokens. For each number of clients both models are asked in turn, dense,
compressed, dense, ..., and the speed-up is the median of the ratios of neighbours: what else the machine does meanwhile
falls on both. Written to OUT/reports/serving.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress.cli.commands import add_common_arguments, check_at_least, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import ArtifactError, GateError, MissingDependencyError, UsageError
from compress.progress import log

EXAMPLES = """examples:
  python -m export.build --model smollm2-135m --structure dense --engine ort --out out/dense --serve-as dense
  out/demo/triton/launch.sh --model-repository=out/dense/triton/repository
  python -m validate.serving out/demo --baseline out/dense --min-speedup 1.1

make serve-table runs these with the server from a package, on the CPU.
"""
TEXT = """\
The harbour lies where the river meets the sea, and for most of its history the town behind it has lived from both.
Boats bring fish in the morning and leave with timber at noon; in between, the people on the quay argue about prices,
about the weather, and about whose turn it is to repair the old crane. Visitors are often surprised by how quiet the
evenings are. When the last train has gone, the lamps along the water are switched off one after the other, and a
single watchman walks from the lighthouse to the bridge and back. He keeps a notebook in which he writes the time, the
height of the tide, and whatever else he thinks that somebody may want to know in a hundred years: the first swallow,
a ship that nobody had expected, the smell of tar after rain. The library has the older volumes, and lends them to
anyone who asks politely.
"""
"""What prompts are cut from, by default."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds until the first token, and until each further one; tokens in all."""

    first: float
    gaps: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Round:
    """Some clients at once, each with some requests one after the other."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all clients together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


Ask = Callable[[str, str, int], Answer]
"""model, prompt, tokens -> the answer."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("validate.serving", __doc__, EXAMPLES)
    p.add_argument("out", type=Path, metavar="OUT", help="the artefact whose model is measured")
    p.add_argument("--baseline", type=Path, required=True, metavar="OUT", help="the dense model's, in the same server")
    p.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    p.add_argument("--clients", default="1,4,16", metavar="N,...", help="at once (default: 1,4,16)")
    p.add_argument("--tokens", type=int, default=32, metavar="N", help="of each answer (default: 32)")
    p.add_argument("--requests", type=int, default=2, metavar="N", help="of each client in a round (default: 2)")
    p.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="pairs, after one that is not counted (default: 5)"
    )
    p.add_argument("--prompts", type=Path, metavar="FILE", help="text that prompts are cut from (default: a paragraph)")
    p.add_argument("--min-speedup", metavar="X", help="exit with 3 where any number of clients gains less")
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write the report, print the table; 3 where a speed-up is below --min-speedup."""
    args = parser().parse_args(argv)
    check_at_least(args, 1, "tokens", "requests", "rounds")
    from compress.artifact.store import Artifact
    from validate.gates import Gate, failures, parse_batch_sizes, parse_speedup
    from validate.report.files import add_report
    from validate.report.machine import machine_facts

    counts = parse_batch_sizes(args.clients, "--clients")
    least = None if args.min_speedup is None else parse_speedup(args.min_speedup)
    prompts = cut_prompts(TEXT if args.prompts is None else _text(args.prompts), max(counts) * args.requests)
    artifact, baseline = Artifact(args.out), Artifact(args.baseline)
    models = (served_name(baseline), served_name(artifact))
    if models[0] == models[1]:
        raise UsageError(f"both models are served as {models[0]!r}: build one of them again with --serve-as")
    server = _server(args.url, models)
    ask = http_client(args.url)
    cases = [compare(ask, models, prompts, n, args.requests, args.tokens, args.rounds) for n in counts]
    report = {
        "dense": models[0],
        "compressed": models[1],
        "server": server,
        "tokens_per_answer": args.tokens,
        "requests_per_client": args.requests,
        "prompt_words": [min(len(p.split()) for p in prompts), max(len(p.split()) for p in prompts)],
        "cases": cases,
        "machine": machine_facts(),
    }
    add_report(artifact, "serving.json", report)
    tell(args, report, lambda: table(report))
    if least is not None:
        failed = failures(Gate(f"min-speedup-{c['clients']}-clients", c["speedup"], least, True) for c in cases)
        for sentence in failed:
            log(f"FAILED {sentence}")
        if failed:
            return GateError.exit_code
    log(f"OK {args.out / 'reports' / 'serving.json'}")
    return 0


def compare(
    ask: Ask, models: tuple[str, str], prompts: Sequence[str], clients: int, requests: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """models: (dense, compressed), asked in turn `rounds` times after a first turn that is not counted."""
    found: tuple[list[Round], list[Round]] = ([], [])
    for number in range(rounds + 1):
        for model, kept in zip(models, found, strict=True):
            made = one_round(ask, model, prompts, clients, requests, tokens)
            kept.extend([made] if number else [])
        if number:
            dense, compressed = (rounds_[-1].tokens_per_second for rounds_ in found)
            log(f"{clients} clients, round {number} of {rounds}: {dense:.1f} and {compressed:.1f} tokens a second")
    return case(clients, *found)


def case(clients: int, dense: Sequence[Round], compressed: Sequence[Round]) -> dict[str, Any]:
    """The figures of one number of clients: medians over rounds, and of their ratios pair by pair."""
    from validate.speed.timing import Quartiles

    pairs = zip(dense, compressed, strict=True)
    ratio = Quartiles.of([b.tokens_per_second / a.tokens_per_second for a, b in pairs])
    figures: dict[str, Any] = {"clients": clients, "rounds": len(dense), "speedup": ratio.median}
    figures["speedup_quartiles"] = [ratio.q1, ratio.q3]
    for name, made in (("dense", dense), ("compressed", compressed)):
        answers = [answer for round_ in made for answer in round_.answers]
        figures[f"tokens_per_second_{name}"] = statistics.median(r.tokens_per_second for r in made)
        figures[f"first_token_seconds_{name}"] = statistics.median(answer.first for answer in answers)
        gaps = [gap for answer in answers for gap in answer.gaps]
        figures[f"between_tokens_seconds_{name}"] = statistics.median(gaps) if gaps else None
    return figures


def one_round(ask: Ask, model: str, prompts: Sequence[str], clients: int, requests: int, tokens: int) -> Round:
    """Each client has prompts of its own, the same in every round and for every model."""

    def client(number: int) -> list[Answer]:
        return [ask(model, prompts[number * requests + i], tokens) for i in range(requests)]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    return Round(time.perf_counter() - start, tuple(answers))


def http_client(url: str) -> Ask:
    """By Triton's generate_stream extension."""

    def ask(model: str, prompt: str, tokens: int) -> Answer:
        body = {"text_input": prompt, "max_tokens": tokens, "min_tokens": tokens, "stream": True}
        request = urllib.request.Request(f"{url}/v2/models/{model}/generate_stream", json.dumps(body).encode())
        start, times, made = time.perf_counter(), list[float](), 0
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                for line in response:
                    if line.startswith(b"data: "):
                        piece = json.loads(line[6:])
                        if "error" in piece:
                            raise ArtifactError(f"{model} answers with an error: {piece['error']}")
                        times.append(time.perf_counter())
                        made += piece["num_output_tokens"]
        except urllib.error.HTTPError as error:
            raise ArtifactError(f"{model} answers with an error: {error.read().decode(errors='replace')}") from error
        except OSError as error:
            raise ArtifactError(f"the server at {url} broke off ({error}); see its log") from error
        if made != tokens:
            raise ArtifactError(f"{model} answered with {made} tokens where {tokens} were asked for")
        return Answer(times[0] - start, tuple(b - a for a, b in pairwise(times)), made)

    return ask


def cut_prompts(text: str, count: int) -> list[str]:
    """Pieces of 16 to 96 words, each from another place, the same ones each time. UsageError for a short text."""
    words = text.split()
    if len(words) < 96:
        raise UsageError(f"prompts are cut from a text of at least 96 words; this one has {len(words)}")
    lengths = [16 + (37 * i) % 81 for i in range(count)]
    starts = [(53 * i) % (len(words) - length + 1) for i, length in enumerate(lengths)]
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def table(report: dict[str, Any]) -> str:
    """Markdown: a line for each number of clients."""
    from validate.report.markdown import markdown_table

    header = ["clients", "dense, tokens/s", "compressed, tokens/s", "speed-up (quartiles)"]
    header += ["first token, ms: dense", "compressed", "between tokens, ms: dense", "compressed"]
    rows = []
    for c in report["cases"]:
        low, high = c["speedup_quartiles"]
        row = [str(c["clients"]), f"{c['tokens_per_second_dense']:.1f}", f"{c['tokens_per_second_compressed']:.1f}"]
        row.append(f"{c['speedup']:.3f} ({low:.3f} - {high:.3f})")
        for name in ("first_token", "between_tokens"):
            for model in ("dense", "compressed"):
                value = c[f"{name}_seconds_{model}"]
                row.append("" if value is None else f"{1e3 * value:.1f}")
        rows.append(row)
    return markdown_table(header, rows)


def served_name(artifact: Any) -> str:
    """The name of OUT's text model. Raises ArtifactError where OUT has none."""
    from export.stages import build_info

    artifact.require_stage("triton")
    return str(build_info(artifact, "triton")["name"])


def _server(url: str, models: Sequence[str]) -> dict[str, Any]:
    """Name and version of the server. Raises MissingDependencyError where it does not answer, or lacks a model."""
    hint = "start it with OUT/triton/launch.sh --model-repository=BASELINE/triton/repository"
    try:
        with urllib.request.urlopen(f"{url}/v2", timeout=10) as response:
            facts = json.loads(response.read())
        for model in models:
            urllib.request.urlopen(f"{url}/v2/models/{model}/ready", timeout=10).close()
    except urllib.error.HTTPError as error:
        raise MissingDependencyError(f"the server at {url} has no model {model!r} that is ready; {hint}") from error
    except (OSError, ValueError) as error:
        raise MissingDependencyError(f"no Triton server answers at {url} ({error}); {hint}") from error
    return {"name": facts.get("name"), "version": facts.get("version")}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read ({error})") from error


if __name__ == "__main__":
    sys.exit(run_cli(main))
