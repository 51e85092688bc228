"""What can be stored: grids, formats, ranges, packed codes. Imports torch and nothing of ours."""
