"""`vllm-saguaro tune`: what is measured, what follows from it, and the file that keeps it."""
