#!/usr/bin/env bash
# The OpenAI-compatible server with saguaro. All that follows goes to `vllm serve`.
#   examples/server.sh                                      the pair of this repository
#   MODEL=Qwen/Qwen3-8B examples/server.sh --port 8001      the draft is chosen by the plugin
#   MODEL=TARGET DRAFT=DRAFT examples/server.sh
# Then, from another terminal: python examples/client.py
set -euo pipefail
cd "$(dirname "$0")/.."
command -v vllm > /dev/null || export PATH="$PWD/.venv/bin:$PATH"

speculation=saguaro
if [ -n "${DRAFT:-}" ]; then
  speculation='{"method": "saguaro", "model": "'"$DRAFT"'"}'
fi
exec vllm serve "${MODEL:-assets/pair/target}" --speculative-config "$speculation" "$@"
