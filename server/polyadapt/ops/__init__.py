"""Tensors: the plan of a step and the gated segmented product that reads it."""
