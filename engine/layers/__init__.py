"""Attention, MLA, rotary embedding and dense MLP on flattened tokens; called by `engine.models`."""
