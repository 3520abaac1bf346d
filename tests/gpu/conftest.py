"""GPU level: the training stage on what GPUs there are.

Inputs: tiny models of the integration level. Outputs: none. Without enough GPUs every test is skipped, and says so.
"""

from pathlib import Path

import pytest

from ..integration.conftest import save_tiny_encoder_decoder, tiny_model_dir

__all__ = ["tiny_model_dir"]


@pytest.fixture(scope="session")
def encoder_decoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose narrowest layer has the 64 inputs of one block of 4-bit weights: for fewer bitsandbytes warns."""
    return save_tiny_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder"), head_width=16)
