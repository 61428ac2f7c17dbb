"""The output folder: stages that appear whole or not at all, the manifest, and what a killed run resumes from."""

from compress.artifact.store import Artifact

__all__ = ["Artifact"]
