"""Load and faults, for real: `python -m tests.faults` writes docs/reliability.md."""
