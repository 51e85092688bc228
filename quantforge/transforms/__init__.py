"""Transforms: exact changes to the float model that make it easier to quantize."""
