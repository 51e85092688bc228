"""Corrections: what is added to a result to make up for its error."""
