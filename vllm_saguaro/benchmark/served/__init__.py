"""Servers that run already, asked in turn: `vllm-saguaro bench --against-server`."""
