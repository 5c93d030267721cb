"""What a step reads of its logits besides the draw: logits' adjustments, log probabilities."""
