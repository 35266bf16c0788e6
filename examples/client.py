"""Ask a server, print the text as it comes, and what the draft had to do with it. Standard library only.

python examples/client.py
python examples/client.py --url http://localhost:8001 --temperature 0.7 --seed 1 "def read_lines(path):"
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

COUNTED = ("hits", "misses")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("prompt", nargs="?", default="def read_lines(path):\n")
    found.add_argument("--url", default="http://localhost:8000", help="(default: %(default)s)")
    found.add_argument("--max-tokens", type=int, default=128, help="(default: %(default)s)")
    found.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    found.add_argument("--seed", type=int, help="the same text each time, also with a temperature")
    return found


def get(url: str) -> str:
    """The text behind an address."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed completion."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            text = line.decode().strip().removeprefix("data: ")
            if text and text != "[DONE]":
                yield json.loads(text)


def total(exposition: str, name: str) -> float:
    """A counter of `/metrics`, over all its labels; 0 where there is none."""
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:_total)?(?:{{.*}})? (\S+)$", exposition, re.MULTILINE)))


def main() -> None:
    """One completion between two looks at the metrics."""
    arguments = parser().parse_args()
    url = arguments.url.rstrip("/")
    try:
        model = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
        before = get(f"{url}/metrics")
        body = {
            "model": model,
            "prompt": arguments.prompt,
            "max_tokens": arguments.max_tokens,
            "temperature": arguments.temperature,
            "seed": arguments.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        print(arguments.prompt, end="", flush=True)
        began, first, tokens = time.perf_counter(), 0.0, 0
        for event in stream(url, body):
            for choice in event["choices"]:
                first = first or time.perf_counter()
                print(choice["text"], end="", flush=True)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        ended, after = time.perf_counter(), get(f"{url}/metrics")
    except (urllib.error.URLError, ConnectionError) as error:
        raise SystemExit(f"client.py: no answer from {url}: {error}") from None
    found = {name: total(after, f"vllm:saguaro_{name}") - total(before, f"vllm:saguaro_{name}") for name in COUNTED}
    print(f"\n\n{tokens} tokens, the first after {first - began:.2f} s, all after {ended - began:.2f} s")
    print(f"{found['hits']:.0f} outcomes were predicted, {found['misses']:.0f} were not")


if __name__ == "__main__":
    main()
