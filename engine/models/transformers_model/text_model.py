"""Text model: the language model of a family that sees images, with a head of its own.

transformers has such a family whole, tower for images included, and its text model without a head.
Text alone needs the latter and the head, a matrix without bias.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

# Model types of text models -> those of the families, by which transformers names the tensors.
# Listed are those whose logits are the head's product with the hidden states.
FAMILY_OF = {"glm4v_moe_text": "glm4v_moe", "qwen3_vl_moe_text": "qwen3_vl_moe"}
# Tensors of the other parts.
OTHER_PARTS = (r"^(model\.)?(visual|vision_tower|multi_modal_projector)\.",)


def text_class(hf_config: Any) -> Any:
    """Return a class of causal language models for the configuration of a text model, or None."""
    if getattr(hf_config, "model_type", None) not in FAMILY_OF:
        return None
    return _with_head(type(hf_config))


@cache
def _with_head(config_class: type) -> Any:
    import transformers
    from transformers.modeling_outputs import CausalLMOutput

    text: Any = transformers.MODEL_MAPPING[config_class]
    family: Any = text.__mro__[1]

    class TextModel(family):
        """A text model and its head."""

        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, inputs_embeds: Any, **_: Any) -> Any:
            hidden = self.model(inputs_embeds=inputs_embeds).last_hidden_state
            return CausalLMOutput(logits=self.lm_head(hidden))

    TextModel.__name__ = f"{text.__name__}WithHead"
    TextModel.config_class = config_class
    return TextModel
