"""Solvers: how codes are chosen. Each is a function of one layer's problem and knows no model."""
