"""The draft model on vLLM's parts against Hugging Face transformers, the oracle, on a tiny random Llama in float32."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from vllm_saguaro.drafting.model import Batch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from vllm_saguaro.vllm_hooks.draft_model import VllmDraftModel

pytestmark = pytest.mark.engine

OWN_VOCABULARY, VOCABULARY, BLOCK = 512, 500, 32
LENGTHS = (5, 33, 70)


def make_tiny_llama(folder: Path) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        **shape, head_dim=64, num_hidden_layers=2, vocab_size=OWN_VOCABULARY, max_position_embeddings=256
    )
    config.initializer_range = 0.2  # far from uniform logits: a wrong KV entry must show
    llama = LlamaForCausalLM(config).float().eval()
    llama.save_pretrained(folder)
    return llama


class Texts:
    """A growing text per row, each with blocks of its own, handed out in an order that is not the identity."""

    def __init__(self, model: VllmDraftModel, texts: list[list[int]]) -> None:
        self.model = model
        self.texts = texts
        self.fed = [0] * len(texts)
        self.free = list(np.random.default_rng(1).permutation(model.num_blocks))
        self.blocks: list[list[int]] = [[] for _ in texts]

    def feed(self, counts: list[int]) -> torch.Tensor:
        """Feed the next `counts[row]` tokens of each row (0: the row is left out); logits of every fed token."""
        ids: list[int] = []
        positions: list[int] = []
        lengths, starts, rows = [], [0], []
        for row, count in enumerate(counts):
            if count == 0:
                continue
            start = self.fed[row]
            self.fed[row] += count
            while len(self.blocks[row]) * BLOCK < self.fed[row]:
                self.blocks[row].append(int(self.free.pop()))
            ids += self.texts[row][start : start + count]
            positions += range(start, start + count)
            lengths.append(self.fed[row])
            starts.append(len(ids))
            rows.append(row)
        blocks = np.zeros((len(rows), max(len(self.blocks[row]) for row in rows)), np.int32)
        for place, row in enumerate(rows):
            blocks[place, : len(self.blocks[row])] = self.blocks[row]
        batch = Batch(
            token_ids=np.array(ids, np.int64),
            positions=np.array(positions, np.int64),
            query_start=np.array(starts, np.int32),
            lengths=np.array(lengths, np.int32),
            blocks=blocks,
        )
        hidden = self.model.forward(batch)
        assert hidden.shape == (len(ids), self.model.hidden_size)
        return self.model.logits(hidden)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def oracle(llama_folder: Path) -> LlamaForCausalLM:
    return make_tiny_llama(llama_folder)


@pytest.fixture(scope="module")
def model(oracle: LlamaForCausalLM, llama_folder: Path) -> Iterator[VllmDraftModel]:
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, VllmDraftModel

    config = DraftModelConfig(
        model=str(llama_folder),
        dtype="float32",
        max_length=200,
        max_rows=16,
        max_tokens=128,
        kv_cache_bytes=8 << 20,
        vocab_size=VOCABULARY,
        enforce_eager=True,
    )
    model = VllmDraftModel(config)
    yield model
    model.close()


def random_text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@torch.no_grad()
def expected(oracle: LlamaForCausalLM, text: list[int], first: int = 0) -> torch.Tensor:
    return oracle(torch.tensor([text])).logits[0, first:, :VOCABULARY]


def assert_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_says_what_it_is(model: VllmDraftModel) -> None:
    assert (model.block_size, model.max_length, model.max_rows, model.max_tokens) == (BLOCK, 200, 16, 128)
    assert model.num_blocks == (8 << 20) // (2 * BLOCK * 2 * 64 * 2 * 4)  # layers, tokens, heads, head size, K and V


def test_logits_are_cut_to_the_targets_vocabulary(model: VllmDraftModel) -> None:
    logits = Texts(model, [random_text(4, seed=9)]).feed([4])
    assert model.vocab_size == VOCABULARY < OWN_VOCABULARY
    assert logits.shape == (4, VOCABULARY)
    assert logits.dtype == torch.float32


def test_ragged_chunked_prefill_and_decode_equal_the_oracle(model: VllmDraftModel, oracle: LlamaForCausalLM) -> None:
    steps = 5
    texts = Texts(model, [random_text(length + steps, seed=length) for length in LENGTHS])
    found: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    chunks = [[5, 20, 1], [0, 13, 40], [0, 0, 29], *[[1, 1, 1]] * (steps - 1), [1, 0, 1], [0, 1, 0]]
    for counts in chunks:
        logits = texts.feed(counts)
        for row, part in enumerate(logits.split(counts)):
            found[row].append(part)
    for row, text in enumerate(texts.texts):
        assert texts.fed[row] == len(text)
        assert_close(torch.cat(found[row]), expected(oracle, text))


def test_branches_share_full_blocks_and_own_a_copy_of_the_tail(model: VllmDraftModel, oracle: LlamaForCausalLM) -> None:
    root = random_text(70, seed=3)
    texts = Texts(model, [root])
    texts.feed([70])
    shared, tail = texts.blocks[0][:2], texts.blocks[0][2]
    copies = [int(texts.free.pop()) for _ in range(2)]
    model.copy_blocks([tail, tail], copies)

    continuations = [random_text(4, seed=10), random_text(4, seed=11)]
    branches = Texts(model, [root + continuation for continuation in continuations])
    branches.fed = [70, 70]
    branches.blocks = [[*shared, copy] for copy in copies]
    steps = [branches.feed([1, 1]) for _ in range(4)]
    for row, continuation in enumerate(continuations):
        assert_close(torch.stack([step[row] for step in steps]), expected(oracle, root + continuation, first=70))
    assert not torch.allclose(steps[-1][0], steps[-1][1], atol=1e-2)

    texts.texts[0] = root + random_text(1, seed=12)  # the root's own tail is untouched
    assert_close(texts.feed([1]), expected(oracle, texts.texts[0], first=70))


def test_slots_are_those_of_the_cpu_operator() -> None:
    from vllm_saguaro.vllm_hooks.draft_model import slots_of

    batch = Batch(
        token_ids=np.zeros(6, np.int64),
        positions=np.array([7, 30, 31, 32, 33, 64]),
        query_start=np.array([0, 1, 5, 6], np.int32),
        lengths=np.array([8, 34, 65], np.int32),
        blocks=np.array([[4, 0, 0], [9, 2, 0], [1, 8, 7]], np.int32),
    )
    slots = torch.empty(6, dtype=torch.int64)
    arguments = [torch.from_numpy(array) for array in (batch.query_start, batch.positions, batch.blocks)]
    torch.ops._C.compute_slot_mapping_kernel_impl(*arguments, slots, BLOCK)
    assert slots_of(batch, BLOCK).tolist() == slots.tolist() == [135, 318, 319, 64, 65, 224]


def test_copying_no_block_is_allowed(model: VllmDraftModel) -> None:
    model.copy_blocks([], [])


COMPILED = """
    import dataclasses, os, sys
    import numpy as np, torch
    sys.path.insert(0, {tests!r})
    from test_draft_model import Texts, random_text
    from vllm_saguaro.vllm_hooks.draft_model import DraftModelConfig, VllmDraftModel

    config = DraftModelConfig(
        model={folder!r}, dtype="float32", max_length=200, max_rows=16, max_tokens=128, kv_cache_bytes=1, vocab_size=500
    )
    text = random_text(40, seed=5)
    model = VllmDraftModel(config)
    assert model.num_blocks >= 7  # raised to one text
    if {explicit}:
        model.warm_up([1, 3])
    texts = Texts(model, [text])
    compiled = torch.cat([texts.feed([1]) for _ in range(3)] + [texts.feed([36])] + [texts.feed([1])])

    # More models in the same process, as inline placement has it: environment and first model stay as they are.
    environment = dict(os.environ)
    eager = VllmDraftModel(dataclasses.replace(config, enforce_eager=True))
    assert dict(os.environ) == environment
    import vllm.ir.op
    assert not vllm.ir.op._ENABLE_TORCH_WRAP  # on, RMSNorm would not be compiled
    plain = Texts(eager, [text]).feed([40])
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    again = VllmDraftModel(config)  # compiled as well, of the same class
    torch.testing.assert_close(Texts(again, [text]).feed([40]), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Texts(model, [text]).feed([40]), plain, atol=1e-4, rtol=1e-4)
    for one in (again, eager, model):
        one.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "explicit",
    [pytest.param(True, id="warmed up", marks=pytest.mark.long), pytest.param(False, id="warms itself up")],
)
def test_compiled_with_a_first_forward_of_one_token(
    oracle: LlamaForCausalLM, llama_folder: Path, explicit: bool
) -> None:
    """In a process of its own: what goes wrong here (AMX before its permission, a graph for one token) kills it."""
    tests = str(Path(__file__).parent)
    program = textwrap.dedent(COMPILED.format(tests=tests, folder=str(llama_folder), explicit=explicit))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr[-4000:]
