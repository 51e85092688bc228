"""Distillation: what brings a small or a quantized student closer to its teacher."""
