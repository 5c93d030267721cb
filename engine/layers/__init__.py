"""Attention, MLA, rotary embedding and dense MLP, on the flattened tokens of a step."""
