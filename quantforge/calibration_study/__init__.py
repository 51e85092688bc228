"""The calibration study: what the choice of calibration data does to one method, and whether it is more than chance."""
