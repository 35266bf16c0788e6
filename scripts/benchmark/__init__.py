"""The benchmark's parts: `scripts/bench.py` and `scripts/demo.py` are thin doors to them."""
