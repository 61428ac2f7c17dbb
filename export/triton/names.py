"""What a model may be called in a model repository."""

from __future__ import annotations

import re

from compress.errors import UsageError


def check_name(name: str) -> None:
    """Raise UsageError for a name of --serve-as that is none for Triton, or for a folder."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name) is None:
        raise UsageError(
            f"--serve-as {name!r}: the name of a model begins with a letter or a digit and has up to 200 letters, "
            "digits, '_', '.' and '-'"
        )


def name_of(source: str) -> str:
    """The name for a source's id: ORG/NAME gives NAME, PACKAGE==VERSION gives PACKAGE."""
    last = source.partition("=")[0] if "=" in source else re.split("/", source.rstrip("/"))[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last)[:200].strip("-._") or "model"
