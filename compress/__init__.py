"""Compression of causal language models: calibrate, rotate, fit structured matrices, write a checkpoint.

Importing this package makes `AutoModelForCausalLM.from_pretrained` accept the checkpoints that it writes. The
registration waits until transformers' auto classes are imported, so that the import itself stays light.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

__distribution__ = "procrustes-llm"


def _register(module: ModuleType) -> None:
    from compress.checkpoint.loading import register

    register()


wrapt.register_post_import_hook(_register, "transformers.models.auto.modeling_auto")
