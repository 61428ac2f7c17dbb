"""Proof on an artefact: parity ladder, perplexity, speed, and the report with its gates."""

__distribution__ = "procrustes-llm"
