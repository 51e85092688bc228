"""Evaluation: what a compressed model has lost."""
