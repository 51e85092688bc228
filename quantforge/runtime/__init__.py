"""Quantized layers computed from their packed codes by torch's own operators."""
