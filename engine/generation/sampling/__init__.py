"""What a step reads of its logits: new tokens, with the logits' adjustments, and logprobs."""
