"""Prompts for the parity ladder."""

from __future__ import annotations

from validate.parity.ladder import (
    make_prompts,
)

PROMPTS = make_prompts(300, 24)
