"""`python -m quantforge`."""

from quantforge.cli import main

main()
