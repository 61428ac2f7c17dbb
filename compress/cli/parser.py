"""The parser of every command: a wrong flag is told in one line, as every other error is."""

from __future__ import annotations

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that does not print 30 lines of usage above what was wrong."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def fraction(text: str) -> float:
    """0.75 of `0.75` or `75%`, for argparse; whether it is in range is the recipe's to say."""
    number = text.removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction: write 0.75, or 75%") from None
    return value / 100 if number != text else value
