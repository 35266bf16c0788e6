"""The traffic: request i is a function of (seed, i) alone, so a run can be gone on with, and any request repeated."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from typing import Any

from scripts.soaking.pair import MAX_MODEL_LENGTH, MODEL_NAME
from scripts.soaking.settings import Settings
from scripts.soaking.structures import STRUCTURES

EPISODE = 16
"""So many requests in a row arrive in the same mood."""
MOODS = ("burst", "steady", "alone", "lull")
STEADY_SECONDS = 0.05
LULL_SECONDS = 1.0
HASTE_SECONDS = 0.6
"""A request that is not streamed is given up after so long at most."""
LONGEST_TEXT = 300
"""Characters, and so tokens at most, of a prompt that is sent as text."""
MOST_TOKENS = 160
STOPS = ("\n\n", ")", ":\n", "self", " return", "the")
SHARED = 96
"""Tokens of a beginning that several prompts share."""


@dataclass(frozen=True)
class Asked:
    """One request. `close_after`: pieces of the stream after which we close the connection; `hold`: seconds after
    which we close one that is not streamed. `refused`: whether the server must say no."""

    index: int
    body: dict[str, Any]
    mood: str
    pause: float = 0.0
    close_after: int | None = None
    hold: float | None = None
    refused: bool = False

    @property
    def comparable(self) -> bool:
        """Whether plain vLLM must say the same: greedy requests, seeded ones, and refusals."""
        return self.refused or self.body["temperature"] == 0 or "seed" in self.body

    @property
    def structure(self) -> dict[str, Any] | None:
        """The structured output asked for."""
        return self.body.get("structured_outputs")

    @property
    def outputs(self) -> int:
        """Texts asked for."""
        return self.body.get("n", 1)

    def to_the_end(self) -> Asked:
        """The same without the closing of its connection, at once: how the plain server is asked."""
        return dataclasses.replace(self, mood="steady", pause=0.0, close_after=None, hold=None)

    def alone(self, logprobs: int) -> Asked:
        """As `to_the_end`, with log-probabilities of so many tokens."""
        end = self.to_the_end()
        return dataclasses.replace(end, body=end.body | {"logprobs": logprobs, "stream": False})


class Traffic:
    """Makes the requests of one soak."""

    def __init__(self, settings: Settings) -> None:
        from tokenizers import Tokenizer

        self._seed = settings.seed
        lines = settings.prompt_path.read_text(encoding="utf-8").splitlines()
        self._prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
        tokenizer = Tokenizer.from_file(str(settings.target / "tokenizer.json"))
        self._tokens: list[int] = [
            token for prompt in self._prompts for token in tokenizer.encode(prompt, add_special_tokens=False).ids
        ]

    def request(self, index: int) -> Asked:
        """Request `index`, always the same."""
        r = random.Random(f"{self._seed}/{index}")
        mood = random.Random(f"{self._seed}/episode {index // EPISODE}").choices(MOODS, (4, 4, 2, 1))[0]
        pause = 0.0
        if mood == "steady":
            pause = r.expovariate(1 / STEADY_SECONDS)
        elif mood == "lull" and index % EPISODE == 0:
            pause = LULL_SECONDS * r.uniform(0.5, 1.5)
        most = r.choices((1, r.randint(2, 8), r.randint(9, 64), r.randint(65, MOST_TOKENS)), (3, 12, 65, 20))[0]
        body: dict[str, Any] = {"model": MODEL_NAME, "prompt": self._prompt(r, most), "max_tokens": most}
        body |= {"stream": r.random() < 0.7, "return_token_ids": True, "ignore_eos": r.random() < 0.3}
        body |= self._sampling(r) | self._extras(r)
        if "structured_outputs" in body:
            body |= {"ignore_eos": False, "max_tokens": max(48, most)}
            if isinstance(body["prompt"], list):  # there must be room for it
                body["prompt"] = body["prompt"][: MAX_MODEL_LENGTH - body["max_tokens"]]
        asked = Asked(index, body, mood, pause)
        fate = r.random()
        if fate < 0.08:
            return self._closed(r, asked)
        if fate < 0.10:
            return self._refused(r, asked)
        return asked

    def _prompt(self, r: random.Random, most: int) -> str | list[int]:
        """Very short, of middle length, almost as long as can be, or with a beginning that others have too."""
        kind = r.choices(("short", "middle", "long", "shared"), (15, 55, 15, 15))[0]
        if kind == "short":
            text = r.choice(self._prompts)
            start = r.randrange(len(text))
            return text[start : start + r.randint(1, 12)]
        if kind == "middle":
            text = r.choice(self._prompts) + "\n" + r.choice(self._prompts)
            start = r.randrange(len(text) // 2)
            return text[start : start + r.randint(40, LONGEST_TEXT)]
        room = MAX_MODEL_LENGTH - most
        if kind == "long":
            length = room - min(int(r.expovariate(0.1)), room // 2)
            start = r.randrange(len(self._tokens) - length)
            return self._tokens[start : start + length]
        start = SHARED * r.randrange(4)
        own = r.randrange(len(self._tokens) - SHARED)
        return self._tokens[start : start + SHARED] + self._tokens[own : own + r.randint(1, SHARED)]

    def _sampling(self, r: random.Random) -> dict[str, Any]:
        temperature = r.choices((0, 0.7, 1), (45, 25, 30))[0]
        found: dict[str, Any] = {"temperature": temperature}
        if temperature:
            if r.random() < 0.5:
                found["seed"] = r.randrange(2**31)
            if r.random() < 0.3:
                found["top_p"] = r.choice((0.5, 0.9, 0.99))
            if r.random() < 0.15:
                found["top_k"] = r.choice((1, 5, 50))
            if r.random() < 0.1:
                found["n"] = 2
        if r.random() < 0.05:
            found["repetition_penalty"] = 1.2
        if r.random() < 0.05:
            found["presence_penalty"] = 0.5
        return found

    def _extras(self, r: random.Random) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if r.random() < 0.12:
            found["structured_outputs"] = r.choice(STRUCTURES)
        elif r.random() < 0.12:
            found["stop"] = r.sample(STOPS, r.randint(1, 2))
        if r.random() < 0.1:
            found["logprobs"] = r.randint(0, 5)
        return found

    def _closed(self, r: random.Random, asked: Asked) -> Asked:
        if asked.body["stream"]:
            return dataclasses.replace(asked, close_after=r.choice((0, 1, 2, r.randint(3, 20))))
        return dataclasses.replace(asked, hold=r.uniform(0, HASTE_SECONDS))

    def _refused(self, r: random.Random, asked: Asked) -> Asked:
        wrong: dict[str, Any] = r.choice(
            (
                {"prompt": self._tokens[: MAX_MODEL_LENGTH + r.randint(0, 40)]},
                {"max_tokens": MAX_MODEL_LENGTH + 1},
                {"temperature": 0, "n": 2},
                {"temperature": -1},
                {"top_p": 1.5},
                {"structured_outputs": {"regex": "(unclosed"}},
                {"model": "another"},
            )
        )
        return dataclasses.replace(asked, body=asked.body | wrong, refused=True)
