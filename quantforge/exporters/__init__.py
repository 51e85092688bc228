"""Exporters: how a compressed model is written so that others load it."""
