"""Published measurements on H100s: the worlds that they describe, and the numbers that a simulation must give back.

Sources, as their own readers noted them down (the paper's text has the table, not the pass times):
[paper] Kumar, Dao, May: Speculative Speculative Decoding, appendix B.3: batch 1, greedy, 512 prompts x 512 tokens.
[repo] the reference implementation's README: SD with K = 6, SSD with K = 7 and 3 branches a position (N = 24).
[poc] logs of a reproduction (laviier/ssd): Llama 3.1 70B on four H100s, Llama 3.2 1B on a fifth.
[wl] logs of a reproduction (Weili-0234/ssd-wl): Qwen 3 32B and 0.6B, H100s.
[assumed] by us, with the reason beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vllm_saguaro.algorithm.timing import expected_tokens
from vllm_saguaro.simulation.world import HitCurve, PassTime, World, WorldError, reach_of


@dataclass(frozen=True)
class Published:
    """Tokens a second of one line of a publication; `batch` requests at once, K of SD and of SSD."""

    name: str
    world: str
    plain: float
    sd: float
    ssd: float
    sd_k: int = 6
    ssd_k: int = 7
    batch: int = 1


SD_K: Final = 6
LLAMA_K: Final = 7
QWEN_K: Final = 4
DEEPEST: Final = 16
"""Acceptance is told for so many drafts, so that K can be varied."""

PAPER: Final = (
    Published("HumanEval", "llama-70b", 54.7, 176, 283),
    Published("UltraFeedback", "llama-70b", 54.7, 138, 215),
    Published("Alpaca", "llama-70b", 54.7, 145, 224),
    Published("GSM8K", "llama-70b", 54.7, 188, 301),
    Published("HumanEval", "qwen-32b", 88.8, 146, 222, ssd_k=QWEN_K),
    Published("UltraFeedback", "qwen-32b", 88.8, 122, 174, ssd_k=QWEN_K),
    Published("Alpaca", "qwen-32b", 88.8, 127, 185, ssd_k=QWEN_K),
    Published("GSM8K", "qwen-32b", 88.8, 152, 234, ssd_k=QWEN_K),
)
WL_BY_K: Final = ((4, 210.9), (5, 193.6), (6, 175.3), (7, 158.6))
"""[wl] tokens a second of SSD by K; AR 97.4, SD with K = 6 141.4."""
POC_BY_BATCH: Final = ((1, 286.0), (2, 514.0), (4, 872.0), (8, 1384.0), (16, 1979.0))
"""[poc] tokens a second of SSD, K = 7, by batch."""


def acceptance_from_tokens(tokens: float, drafts: int) -> float:
    """The chance a with 1 + a + ... + a^K = tokens. Raises WorldError where there is none."""
    if not 1 <= tokens <= drafts + 1:
        raise WorldError(f"{tokens:.2f} tokens a round cannot come of {drafts} drafts")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens([middle] * drafts) < tokens else (low, middle)
    return low


_LLAMA_DRAFT_STEP: Final = 2.04e-3
"""[poc] (27.52 - 15.29 ms) / 6: SD's step less its verify pass, a draft step."""
_LLAMA_PER_ROW: Final = 5.2e-6
"""[assumed] fitted to one number, the step of [poc] at batch 16 (43.3 ms): 384 rows in a draft forward."""
_SERVICE: Final = 0.71e-3
"""[wl] the profile at K = 4."""
_FORK: Final = 0.29e-3
"""[wl] glue and fork are 2.83 ms there, of which the glue forward is one of 2.54 ms."""
_QWEN_DRAFT_STEP: Final = 2.54e-3
"""[wl] a tree step; [assumed] also for one row, since so small a model is bound by launches."""

LLAMA_70B: Final = World(
    name="llama-70b",
    target_pass=PassTime(((1, 15.0e-3), (8, 15.0e-3), (16, 15.5e-3), (32, 16.1e-3), (64, 17.6e-3), (128, 20.2e-3))),
    draft_pass=PassTime.linear(_LLAMA_DRAFT_STEP - 24 * _LLAMA_PER_ROW, _LLAMA_PER_ROW),
    reach=(0.870, 0.776, 0.706, 0.648, 0.600, 0.558, 0.523, *(0.523 * 0.93**j for j in range(1, DEEPEST - 6))),
    backup_reach=reach_of(acceptance_from_tokens(4.01, LLAMA_K), DEEPEST),
    hits=HitCurve(((24, 0.88),)),
    fork=_FORK,
    service=_SERVICE,
    jitter=0.03,
    source={
        "target_pass": "[poc] verify by batch at K = 7 (8 tokens a request); AR 66.7 tokens a second",
        "draft_pass": "[poc] SD's step less its verify pass; the part by rows is fitted to batch 16 [assumed]",
        "reach": "[poc] accept lengths on hits, K = 7, 5.68 tokens a round; beyond K = 7 a factor of 0.93 [assumed]",
        "backup_reach": "[poc] 4.01 tokens after a miss, as one chance per draft [assumed]",
        "hits": "[poc] 0.88 with 3 branches a position (N = 24); other N by the power 0.87 [assumed]",
        "fork": "[wl]",
        "service": "[wl]",
        "jitter": "[assumed]",
    },
)
QWEN_32B: Final = World(
    name="qwen-32b",
    target_pass=PassTime(((1, 10.27e-3), (5, 11.5e-3), (40, 11.5e-3), (128, 14.0e-3))),
    draft_pass=PassTime.linear(_QWEN_DRAFT_STEP),
    reach=reach_of(0.78, DEEPEST),
    hits=HitCurve(((24, 0.74), (48, 0.84))),
    fork=_FORK,
    service=_SERVICE,
    jitter=0.03,
    source={
        "target_pass": "[wl] AR 97.4 tokens a second, verify about 11.5 ms; beyond 40 tokens [assumed]",
        "draft_pass": "[wl] tree step 2.54 ms; the same for one row and for many [assumed]",
        "reach": "[assumed] one chance for each draft; the validation solves it from SD's speed",
        "hits": "[poc] of the same pair: 0.74 with 3 branches a position, 0.84 with 6",
        "fork": "[wl]",
        "service": "[wl]",
        "jitter": "[assumed]",
    },
)
WORLDS: Final = {world.name: world for world in (LLAMA_70B, QWEN_32B)}


def paper_world(line: Published) -> World:
    """The world of one line of the paper's table.

    The AR column gives the target's pass: the times of the reproduction's target are stretched to it. The SD column
    gives the acceptance, with the draft steps of the reproduction. Nothing of the SSD column is used.
    """
    base = WORLDS[line.world]
    world = base.replace(target_pass=base.target_pass.times(1 / (line.plain * base.target_pass.at(1))))
    round_seconds = world.target_pass.at(line.sd_k + 1) + line.sd_k * world.draft_pass.at(1)
    chance = acceptance_from_tokens(line.sd * round_seconds, line.sd_k)
    return world.replace(name=f"{line.world}, {line.name}", reach=reach_of(chance, DEEPEST), backup_reach=())
