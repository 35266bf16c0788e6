"""docs/troubleshooting.md has every error and warning that the package can show, and none that it cannot."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.unit.docs.doc_messages import LEAST_LITERAL, messages_in, messages_of, texts_of
from tests.unit.docs.doc_pages import ROOT
from vllm_saguaro.config import REFUSED_KEYS

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = [(row[1].replace("\\|", "|"), row[2]) for row in re.finditer(r"^\| `([^`]+)` \| (.+) \|$", PAGE, re.MULTILINE)]
MESSAGES = list(messages_of(ROOT / "vllm_saguaro"))


def test_every_message_is_on_the_page() -> None:
    shown = [text for text, _ in ROWS]
    missing = {message.where: message.shown for message in MESSAGES if not any(map(message.fits, shown))}
    assert missing == {}, "write an example of each into docs/troubleshooting.md, with its cure"


def test_the_page_has_no_message_that_is_gone() -> None:
    known = [*MESSAGES, *texts_of(ROOT / "vllm_saguaro")]
    assert [text for text, _ in ROWS if not any(message.fits(text) for message in known)] == []


def test_every_message_has_a_cure() -> None:
    assert [text for text, cure in ROWS if len(cure.strip()) < 5] == []


def test_no_message_would_fit_almost_anything() -> None:
    vague = [message for message in MESSAGES if len(message.shown.replace("{}", "")) < LEAST_LITERAL]
    assert [message.where for message in vague] == []


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_every_key_that_is_refused_is_named(key: str) -> None:
    assert f"`{key}`" in PAGE


def test_messages_are_found_wherever_they_are_made() -> None:
    source = """
def _advice(key):
    if key:
        return f"take {key} instead, please"
    return "take another, please"
def f(a):
    raise SaguaroConfigError("one line of " f"{a}, " "and more")
    raise SaguaroConfigError(_advice(a))
    raise SaguaroConfigError(str(error))
    raise WireError("nobody sees this")
    logger.warning("%d drafts share %.1f cores.", 1, 2)
    self._log.error("an error of %s" " here", a)
    init_logger("vllm.x").warning("a warning of %d for people", a)
    logger.info("all is well")
    print(f"an error of {a} for people", file=sys.stderr)
    print(f"vllm-saguaro: tune: {a}", file=sys.stderr)
    print("the answer of the command")
    self.other.warning("not a log")
    raise
"""
    found = list(messages_in(source, "placement/x.py"))
    assert {message.shown for message in found} == {
        "one line of {}, and more",
        "take {} instead, please",
        "take another, please",
        "{} drafts share {} cores.",
        "an error of {} here",
        "a warning of {} for people",
        "an error of {} for people",
    }
    (cores,) = (message for message in found if "cores" in message.shown)
    assert cores.where == "placement/x.py:11"
    assert cores.fits("3 drafts share 1.5 cores.")
    assert not cores.fits("3 drafts share 1.5 coresX")
    assert not cores.fits("3 drafts share cores.")
    assert not cores.fits("3 drafts have 1.5 cores.")
    assert not cores.fits(" drafts share  cores. ")


def test_the_source_is_what_is_looked_at() -> None:
    files = {message.where.partition(":")[0] for message in MESSAGES}
    assert {"config.py", "cores.py", "vllm_hooks/engine_args.py", "vllm_hooks/compatibility.py"} <= files
    assert {"vllm_hooks/draft_choice.py", "vllm_hooks/worker.py", "placement/restarting.py"} <= files
    assert {"cli/main.py", "cli/watch_command.py", "cli/tune_command.py", "tuning/settings.py"} <= files
