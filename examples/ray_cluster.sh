#!/usr/bin/env bash
# The draft on another node of a Ray cluster. vLLM and this package with Ray (pip install ".[ray]"),
# in the same versions, must be on both nodes.
#   on the node of the target:   examples/ray_cluster.sh head
#   on the node of the draft:    examples/ray_cluster.sh draft HEAD_ADDRESS
#   on the node of the target:   MODEL=TARGET DRAFT=DRAFT examples/ray_cluster.sh serve
# The draft's node says that it has one "draft_node"; the draft asks for one, so it goes there and nowhere else.
set -euo pipefail
case "${1:-}" in
  head)
    ray start --head --port=6379
    ;;
  draft)
    ray start --address="${2:?write the address of the head}:6379" --resources='{"draft_node": 1}'
    ;;
  serve)
    # MODEL and DRAFT: hub names, or folders that are under the same path on both nodes.
    exec vllm serve "${MODEL:?}" --speculative-config '{
      "method": "saguaro",
      "model": "'"${DRAFT:?}"'",
      "placement": "ray",
      "ray_options": {"address": "auto", "num_cpus": 8, "resources": {"draft_node": 1}}
    }'
    ;;
  *)
    echo "ray_cluster.sh: write head, draft HEAD_ADDRESS, or serve" >&2
    exit 2
    ;;
esac
