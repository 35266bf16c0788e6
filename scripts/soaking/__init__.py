"""The soak's parts: `scripts/soak.py` is a thin door to them."""
