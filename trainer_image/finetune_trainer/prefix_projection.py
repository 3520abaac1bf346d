"""A prefix that is learnt through a small network (arXiv:2101.00190, section 4.3) and used without it.

PEFT saves the prefix alone, from which training could not go on. So the network lies beside it, for checkpoints; and
what is saved says that it is a plain prefix, for everybody else.
"""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PrefixTuningConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

WIDTH = 512
"""Of the network's inner layer, as in the paper's experiments; PEFT's default is the model's own width."""
NETWORK = "prefix_network.safetensors"
"""Name of the file that holds the network."""

_CONFIG = "adapter_config.json"


class _ThroughNetwork(PeftModel):
    """Saves and loads what is learnt, and what follows from it."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write the prefix as PEFT reads it, and the network."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        config = json.loads((folder / _CONFIG).read_bytes())
        (folder / _CONFIG).write_text(json.dumps(config | {"prefix_projection": False}, indent=2, sort_keys=True))
        save_file(self.prompt_encoder[self.active_adapter].state_dict(), folder / NETWORK)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Go on from the network in a checkpoint."""
        return self.prompt_encoder[adapter_name].load_state_dict(load_file(Path(model_id) / NETWORK))


class _CausalThroughNetwork(_ThroughNetwork, PeftModelForCausalLM):
    pass


class _Seq2SeqThroughNetwork(_ThroughNetwork, PeftModelForSeq2SeqLM):
    pass


def project_prefix(model: PreTrainedModel, config: PrefixTuningConfig) -> PeftModel:
    """Return ``model`` with a prefix as ``config`` describes it, to be learnt through a network."""
    config.prefix_projection, config.encoder_hidden_size = True, WIDTH
    return (_Seq2SeqThroughNetwork if model.config.is_encoder_decoder else _CausalThroughNetwork)(model, config)
