"""The parts of the table of faults: `scripts/faults.py` is a thin door to them."""
