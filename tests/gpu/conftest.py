"""GPU level: the training stage on what GPUs there are.

Inputs: tiny models of the integration level. Outputs: none. Without enough GPUs every test is skipped, and says so.
"""

from ..integration.conftest import tiny_encoder_decoder_dir, tiny_model_dir

__all__ = ["tiny_encoder_decoder_dir", "tiny_model_dir"]
