"""Tuners: what is trained, block by block, under straight-through rounding."""
