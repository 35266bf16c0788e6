"""Make a Llama folder deeper without changing what it computes.

    python scripts/deepen.py assets/pair/target /tmp/deep --layers 32

The result answers as the source does and is as slow as a larger model: vllm_saguaro/benchmark/deepen.py says how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_saguaro.benchmark.deepen import deepen


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a Llama model")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, required=True, help="layers of the result, the source's included")
    parser.add_argument("--seed", type=int, default=0, help="of the new layers' random weights")
    arguments = parser.parse_args()
    print(deepen(arguments.source, arguments.destination, arguments.layers, arguments.seed))


if __name__ == "__main__":
    main()
