from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.train_pair import BATCH_TOKENS, WINDOW, distillation_loss, iterate_batches

REPOSITORY = Path(__file__).resolve().parents[3]


def test_batches_visit_every_window_once_a_pass() -> None:
    stream = torch.arange(9 * WINDOW)
    batches = list(iterate_batches(stream, 2, torch.Generator().manual_seed(0)))
    assert all(batch.numel() == BATCH_TOKENS for batch in batches)
    assert {batch.shape[1] for batch in batches} == {512, 256}
    seen = torch.cat([batch.flatten() for batch in batches])
    assert len(seen.unique()) == len(seen)


def test_distillation_loss_is_zero_at_the_teacher_and_the_argmax_part_is_added() -> None:
    teacher = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(teacher, teacher, 0.0).item() == pytest.approx(0.0, abs=1e-6)
    other = teacher.roll(1, dims=-1)
    assert distillation_loss(other, teacher, 0.0) > 0.1
    expected = -teacher.log_softmax(-1).amax(-1).mean().item()
    assert distillation_loss(teacher, teacher, 1.0).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_tiny_run_writes_a_loadable_pair(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "scripts" / "train_pair.py"), "--tiny", "--output", str(tmp_path)]
    subprocess.run([*script, "--threads", "1"], check=True, timeout=300)
    for folder in (tmp_path / "target", tmp_path / "target" / "draft"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == 4096
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) >= 64
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["agreement"]["greedy_tokens"] > 0
    assert 0 <= card["agreement"]["greedy_acceptance"] <= 1

    before = (tmp_path / "target" / "model.safetensors").read_bytes()
    subprocess.run([*script, "--threads", "1", "--keep-target"], check=True, timeout=300)
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == before
