"""Checkpoint buffers: tensors that exporters save although they are no weights."""

# Regular expressions: of buffers that follow from the configuration, and of what a trainer's module
# keeps for itself.
BUFFERS = (
    r"(^|\.)rotary_emb\.",
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|position_ids)$",
    r"(^|\.)(masked_bias|causal_mask|_extra_state)$",
)
