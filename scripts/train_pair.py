"""Train the small pair under ``assets/pair``: a target, and a draft distilled from it.

    python scripts/train_pair.py                 # everything; 45 to 60 minutes on one core with AMX
    python scripts/train_pair.py --keep-target   # distil a new draft from the target that is already there
    python scripts/train_pair.py --tiny --output /tmp/pair   # seconds: shows that the script works, nothing more

Speculative decoding is only worth measuring when the draft guesses as a real draft does: right for most tokens, wrong
for some. Random weights agree never or always; this pair agrees on about three greedy tokens in four.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pair_corpus import (
    VOCABULARY_SIZE,
    encode_files,
    make_prompts,
    read_corpus,
    save_tokenizer,
    train_tokenizer,
    write_prompts,
)

REPOSITORY = Path(__file__).resolve().parents[1]
WINDOW = 1024
"""Tokens in one stretch of the stream; a batch is always a whole number of them."""
BATCH_TOKENS = 4 * WINDOW
# Short rows are cheaper (attention) and the long ones only have to teach the later positions.
ROW_LENGTHS = (512, 256, 512, 256, 512, 256, 512, 1024)


@dataclass(frozen=True)
class Budget:
    """How much of everything: tokens to train on, files to read, prompts and tokens to measure with."""

    target_tokens: int = 6_600_000
    draft_tokens: int = 5_000_000
    files: int | None = None
    prompts: int = 96
    measured_prompts: int = 64
    continuation: int = 96
    evaluation_windows: int = 96


TINY = Budget(12_000, 12_000, files=80, prompts=64, measured_prompts=4, continuation=8, evaluation_windows=2)


def make_model(hidden: int, layers: int, intermediate: int) -> LlamaForCausalLM:
    """Make a Llama with heads of 64, tied embeddings and random float32 weights (from torch's global generator)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            head_dim=64,
            max_position_embeddings=2048,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively; emulated, it would be slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def iterate_batches(stream: torch.Tensor, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield ``steps`` batches of shape ``[rows, length]`` with ``rows * length == BATCH_TOKENS``.

    ``stream`` is ``[tokens]``. Each pass over it begins at another offset and visits its windows in another order.
    """
    per_batch = BATCH_TOKENS // WINDOW
    order: list[int] = []
    shift = 0
    for step in range(steps):
        if len(order) < per_batch:
            shift = int(torch.randint(WINDOW, (1,), generator=generator))
            order = torch.randperm((len(stream) - shift) // WINDOW, generator=generator).tolist()
        starts = [shift + WINDOW * order.pop() for _ in range(per_batch)]
        windows = torch.stack([stream[start : start + WINDOW] for start in starts])
        yield windows.view(-1, ROW_LENGTHS[step % len(ROW_LENGTHS)])


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; ``logits`` ``[rows, length, vocabulary]``, ``ids`` ``[rows, length]``."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, argmax_weight: float) -> torch.Tensor:
    """Mean KL(teacher || draft) in nats plus ``argmax_weight`` times the cross-entropy with the teacher's argmax.

    Both are ``[rows, length, vocabulary]``. The second part is there because greedy acceptance asks for nothing but
    the same argmax.
    """
    log_q = F.log_softmax(logits.float().flatten(0, 1), dim=-1)
    log_p = F.log_softmax(teacher.float().flatten(0, 1), dim=-1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return divergence + argmax_weight * F.nll_loss(log_q, log_p.argmax(dim=-1))


def train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    tokens: int,
    peak_rate: float,
    seed: int,
    teacher: LlamaForCausalLM | None = None,
    argmax_weight: float = 0.25,
) -> float:
    """Train ``model`` in place on ``tokens`` tokens of ``stream`` ``[tokens]``; return the last steps' mean loss.

    With a ``teacher`` the loss is :func:`distillation_loss`, otherwise :func:`next_token_loss`.
    """
    steps = max(1, tokens // BATCH_TOKENS)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95), fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    losses: list[float] = []
    name = "target" if teacher is None else "draft"
    bar = tqdm(iterate_batches(stream, steps, torch.Generator().manual_seed(seed)), name, steps, mininterval=5)
    model.train()
    for ids in bar:
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            logits = model(ids, use_cache=False).logits
            if teacher is None:
                loss = next_token_loss(logits, ids)
            else:
                with torch.no_grad():
                    wanted = teacher(ids, use_cache=False).logits
                loss = distillation_loss(logits, wanted, argmax_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        recent = losses[-50:]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


def save_rounded(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Write ``model`` as bfloat16 and return what was written, in float32, without gradients."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return load_rounded(folder)


def load_rounded(folder: Path) -> LlamaForCausalLM:
    """Load the stored bfloat16 weights of ``folder`` as float32, ready to evaluate."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, windows: int) -> float:
    """Perplexity per token over the first ``windows`` windows of :data:`WINDOW` tokens of ``stream`` ``[tokens]``."""
    count = min(windows, len(stream) // WINDOW)
    rows = stream[: count * WINDOW].view(count, WINDOW)
    losses = [next_token_loss(model(row[None], use_cache=False).logits, row[None]) for row in rows]
    return float(torch.stack(losses).mean().exp())


def measure_agreement(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    tokens: int,
    seed: int,
) -> dict[str, float]:
    """Measure acceptance a token as speculative decoding meets it: along the target's own continuations.

    Each prompt is continued by up to ``tokens`` tokens twice. ``greedy_acceptance`` is the share of the greedy
    continuation where the draft's argmax is the target's; ``sampled_acceptance`` is the mean of ``sum(min(p, q))`` at
    temperature 1 along a continuation sampled at temperature 1.
    """
    torch.manual_seed(seed)
    hits: list[torch.Tensor] = []
    overlaps: list[torch.Tensor] = []
    for prompt in tqdm(prompts, "measure", mininterval=5):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for sampled in (False, True):
            chosen = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
            whole = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **chosen)
            # The logits at position i speak about token i + 1.
            p = target(whole).logits[0, ids.shape[1] - 1 : -1]
            q = draft(whole).logits[0, ids.shape[1] - 1 : -1]
            if sampled:
                overlaps.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1))
            else:
                hits.append((p.argmax(-1) == q.argmax(-1)).float())
    return {
        "greedy_acceptance": round(float(torch.cat(hits).mean()), 4),
        "greedy_tokens": sum(map(len, hits)),
        "sampled_acceptance": round(float(torch.cat(overlaps).mean()), 4),
        "sampled_tokens": sum(map(len, overlaps)),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "assets" / "pair", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument("--target-tokens", type=int, default=Budget.target_tokens, help="tokens to train the target on")
    parser.add_argument("--draft-tokens", type=int, default=Budget.draft_tokens, help="tokens to distil the draft on")
    parser.add_argument("--keep-target", action="store_true", help="use the target in --output; make a new draft only")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds that only shows that the script works")
    return parser.parse_args()


def main() -> None:
    """Train, measure and write the pair."""
    arguments = parse_arguments()
    budget = TINY if arguments.tiny else Budget(arguments.target_tokens, arguments.draft_tokens)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    target_folder: Path = arguments.output / "target"
    draft_folder = target_folder / "draft"
    card_path: Path = arguments.output / "card.json"

    training, held_out = read_corpus()
    training = training[: budget.files]
    if arguments.keep_target:
        tokenizer = AutoTokenizer.from_pretrained(target_folder)
        card = json.loads(card_path.read_text(encoding="utf-8"))
    else:
        tokenizer = train_tokenizer([file.text for file in training])
        card = {"text": f"standard library of Python {platform.python_version()} (PSF licence)"}
    stream = torch.from_numpy(encode_files(tokenizer, training))
    unseen = torch.from_numpy(encode_files(tokenizer, held_out))
    prompts = make_prompts(tokenizer, held_out, budget.prompts, arguments.seed)

    if arguments.keep_target:
        target = load_rounded(target_folder)
    else:
        torch.manual_seed(arguments.seed)
        trained = make_model(hidden=320, layers=5, intermediate=864)
        card["target_loss"] = round(train(trained, stream, budget.target_tokens, 2e-3, arguments.seed), 4)
        card["target_tokens"] = budget.target_tokens
        card["target_seconds"] = round(time.monotonic() - began)
        target = save_rounded(trained, target_folder)
        card_path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        write_prompts(prompts, arguments.output / "prompts.jsonl")
        save_tokenizer(tokenizer, target_folder)

    torch.manual_seed(arguments.seed + 1)
    pupil = make_model(hidden=128, layers=2, intermediate=384)
    half_way = time.monotonic()
    card["draft_loss"] = round(train(pupil, stream, budget.draft_tokens, 4e-3, arguments.seed + 1, target), 4)
    card["draft_tokens"] = budget.draft_tokens
    card["draft_seconds"] = round(time.monotonic() - half_way)
    draft = save_rounded(pupil, draft_folder)
    save_tokenizer(tokenizer, draft_folder)

    with torch.inference_mode():
        texts = [prompt["prompt"] for prompt in prompts[: budget.measured_prompts]]
        card["agreement"] = measure_agreement(target, draft, tokenizer, texts, budget.continuation, arguments.seed)
        card["target_perplexity"] = round(perplexity(target, unseen, budget.evaluation_windows), 3)
        card["draft_perplexity"] = round(perplexity(draft, unseen, budget.evaluation_windows), 3)
    card |= {
        "corpus_tokens": len(stream),
        "held_out_tokens": len(unseen),
        "target_parameters": target.num_parameters(),
        "draft_parameters": draft.num_parameters(),
        "budget": asdict(budget),
        "seed": arguments.seed,
        "command": " ".join(["python", "scripts/train_pair.py", *sys.argv[1:]]),
        "autocast": "bfloat16" if cpu_has_bfloat16() else "off",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    card_path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
