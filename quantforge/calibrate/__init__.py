"""Calibration: text into token windows, and the statistics of each layer's input."""
