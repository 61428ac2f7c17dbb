"""`python -m tests.faults`: kills, lacks and load, on a tiny model; the table goes to docs/reliability.md."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.cli.entry import run_cli
from compress.errors import UsageError
from tests.faults.rows import Options, Row
from validate.report.machine import machine_facts, machine_text
from validate.report.markdown import markdown_table

GROUPS = {"kills": "Kills", "resources": "Lacks", "serving": "Serving"}
DOCS = Path(__file__).resolve().parents[2] / "docs"

HEAD = """\
# Reliability

What was done to the commands and to a served model, how often, and what came of it. A trial that does not end as
its line says makes the command fail, and nothing is written. `{command}` writes this file (`--only` some
groups: the others keep their lines).
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    p.add_argument("--only", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}, with commas (default: all)")
    p.add_argument("--trials", type=int, default=Options.trials, help="kills in all (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=Options.minutes, help="of load (default: %(default)s)")
    p.add_argument("--seed", type=int, default=Options.seed, help="of what is drawn (default: %(default)s)")
    p.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to (default: docs)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the groups and write the table."""
    args = parser().parse_args(argv)
    chosen = args.only.split(",")
    for name in chosen:
        if name not in GROUPS:
            raise UsageError(f"--only {name!r} is none of {', '.join(GROUPS)}")
    options = Options(args.trials, args.minutes, args.seed)
    fresh = dict[str, Any]()
    for name in chosen:
        module, start = importlib.import_module(f"tests.faults.{name}"), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows: list[Row] = module.run(Path(folder), options)
        fresh[name] = {
            "command": shlex.join(["python", "-m", "tests.faults", "--only", name, *flags(name, options)]),
            "machine": machine_text(machine_facts()),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "rows": [asdict(row) for row in rows],
        }
    args.docs.mkdir(parents=True, exist_ok=True)
    kept = read(args.docs / "reliability.json") | fresh  # read now: another group may have ended meanwhile
    (args.docs / "reliability.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (args.docs / "reliability.md").write_text(document(kept), encoding="utf-8")
    print(f"OK {args.docs / 'reliability.md'}")
    return 0


def flags(name: str, options: Options) -> list[str]:
    """What decides a group's trials."""
    given = {"kills": ["--trials", str(options.trials)], "serving": ["--minutes", f"{options.minutes:g}"]}
    return [*given.get(name, []), "--seed", str(options.seed)]


def read(path: Path) -> dict[str, Any]:
    """The groups of an earlier run; none where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in GROUPS if name in found}


def document(groups: dict[str, Any]) -> str:
    """docs/reliability.md: a table for each group that was run, in the order of `GROUPS`."""
    parts = [HEAD.format(command="python -m tests.faults")]
    for name, title in GROUPS.items():
        if name not in groups:
            continue
        group = groups[name]
        table = markdown_table(
            ("fault", "trials", "result"), [(r["fault"], str(r["trials"]), r["result"]) for r in group["rows"]]
        )
        took = f"`{group['command']}`, {group['minutes']:g} minutes. {group['machine']}"
        parts.append(f"\n## {title}\n\n{took}\n\n{table}\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(run_cli(main))
