"""Text, tokenizer and prompts of the small trained pair: everything that comes before a gradient.

The text is the Python standard library's own sources, which every Python carries with it, so that nothing has to be
downloaded and the licence is known. Files are held out by a hash of their relative name: the split does not depend on
the order of a directory listing or on a seed.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 4096
HELD_OUT_PERCENT = 6
PROMPT_LENGTHS = (32, 48, 64, 96, 128, 160, 192, 256)
"""Prompt lengths in tokens, taken in turn."""

# Not representative of code a person would write: installed packages, generated character tables, one huge string of
# documentation, files that are broken or oddly encoded on purpose. `_sysconfigdata*` names folders of this machine.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages", "__pycache__", "encodings", "pydoc_data", "idlelib", "lib2to3", "ensurepip", "turtledemo",
        "encoded_modules", "tokenizedata", "cjkencodings", "test_lib2to3", "test_idle", "data",
    }
)  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "bad_", "badsyntax")
_MAXIMUM_BYTES = 400_000


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: its name relative to the library folder (with forward slashes) and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept away from every training step."""
        return is_held_out(self.name)


def is_held_out(name: str) -> bool:
    """Decide the split of a file from nothing but its relative name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def iterate_sources(library: Path) -> Iterator[SourceFile]:
    """Yield the usable ``*.py`` files under ``library`` in sorted order."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith(_SKIPPED_PREFIXES):
            continue
        if not 0 < path.stat().st_size <= _MAXIMUM_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield SourceFile(relative.as_posix(), text)


def read_corpus(library: Path | None = None) -> tuple[list[SourceFile], list[SourceFile]]:
    """Read the standard library and return ``(training files, held-out files)``."""
    library = library or Path(sysconfig.get_paths()["stdlib"])
    files = list(iterate_sources(library))
    return [file for file in files if not file.held_out], [file for file in files if file.held_out]


def train_tokenizer(texts: Sequence[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with ``vocabulary_size`` entries, the one special token included.

    ``<|endoftext|>`` is id 0 and serves as beginning, end and padding: no text needs more than that here.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``.

    The class name is set by hand: newer transformers write a name of their own that older readers do not know.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode_files(tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile]) -> np.ndarray:
    """Return all ``files`` as one stream of token ids, shape ``[tokens]`` (int64), an end token after each file."""
    end = tokenizer.eos_token_id
    encodings = tokenizer.backend_tokenizer.encode_batch([file.text for file in files], add_special_tokens=False)
    return np.concatenate([np.asarray([*encoding.ids, end], dtype=np.int64) for encoding in encodings])


def make_prompts(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile], count: int, seed: int
) -> list[dict[str, str]]:
    """Cut ``count`` prompts of :data:`PROMPT_LENGTHS` tokens from held-out ``files``.

    Library modules come before the library's own tests. Every prompt starts at the start of a line; it may stop
    anywhere, as a person typing does. A file gives at most ``ceil(count / files)`` prompts, so that no module rules.
    """
    generator = random.Random(seed)
    wanted = [file for file in files if file.held_out and len(file.text) > 4000]
    modules = [file for file in wanted if not {"test", "tests"}.intersection(Path(file.name).parts)]
    chosen = modules if len(modules) * 8 >= count else wanted
    if not chosen:
        raise ValueError("no held-out file is long enough for a prompt")
    prompts: list[dict[str, str]] = []
    for index in range(count):
        file = chosen[index % len(chosen)]
        length = PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]
        # 8 characters a token is more than enough to cut `length` tokens from.
        room = max(1, len(file.text) - 8 * max(PROMPT_LENGTHS))
        start = file.text.find("\n", generator.randrange(room)) + 1
        text = file.text[start : start + 8 * length + 64]
        ids = tokenizer.encode(text, add_special_tokens=False)[:length]
        # A cut inside a multi-byte character would decode to a replacement sign.
        prompts.append({"prompt": tokenizer.decode(ids).rstrip("\ufffd"), "source": file.name})
    return prompts


def write_prompts(prompts: Sequence[dict[str, str]], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts), encoding="utf-8")
