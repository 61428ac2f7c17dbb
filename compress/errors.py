"""The errors that a user can meet, and the one place where they become exit codes.

Every message is one sentence or two: what was wrong, the value seen, where, and what to do next. Exit codes:
0 ok; 1 a bug; 2 usage; 3 a gate failed; 4 the environment lacks something; 5 an artefact is corrupt, does not
match, or cannot be written; 130 interrupted.
"""

from __future__ import annotations

import re


class ProcrustesError(Exception):
    """A failure that we can put into a sentence. Raised itself only for a bug in this project."""

    exit_code = 1


class UsageError(ProcrustesError):
    """What was asked for cannot be done: a bad flag, an unknown name, an unsupported model."""

    exit_code = 2


class GateError(ProcrustesError):
    """A measured figure is past the limit that the user set."""

    exit_code = 3


class MissingDependencyError(ProcrustesError):
    """The environment lacks a package, a library, a device, memory or file handles."""

    exit_code = 4


class ArtifactError(ProcrustesError):
    """A file is missing, truncated, changed or hostile, does not match another one, or cannot be written."""

    exit_code = 5


_LONG = re.compile(r"[^\s/]{300,}")
"""What is longer than any file name: a number of 400 digits, say, that a message quotes."""


def _cut(found: re.Match[str]) -> str:
    return f"{found[0][:56]}... ({len(found[0]):,} characters)"
