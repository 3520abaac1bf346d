"""GPU level: the training stage on what GPUs there are.

Inputs: the tiny model of the integration level. Outputs: none. Without enough GPUs every test is skipped, and says so.
"""

from ..integration.conftest import tiny_model_dir

__all__ = ["tiny_model_dir"]
