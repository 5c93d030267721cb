"""Placement: which ranks hold which experts, their homes and copies, and how rows are split."""
