"""The benchmark's parts: `vllm-saguaro bench`, `scripts/bench.py` and `scripts/demo.py` are thin doors to them."""
