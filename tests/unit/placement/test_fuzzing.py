"""The decoder, the readers of a mailbox and what comes over the network under a coverage-guided fuzzer, and errors
planted for it to find."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.unit.placement.coverage_fuzzer import CoverageFuzzer, Found
from tests.unit.placement.planted import planted
from tests.unit.placement.soundness import (
    assert_canonical,
    assert_sound_depth,
    assert_sound_q,
    assert_sound_step,
    assert_sound_table,
)
from vllm_saguaro.messages import (
    Admit,
    Noise,
    Outcome,
    Proposals,
    Release,
    Round,
    Sampling,
    Stamp,
    Step,
    Table,
    Want,
    Work,
)
from vllm_saguaro.placement import distribution, frames, mailbox, rounds, wire
from vllm_saguaro.placement.layout import CONTROL_WORDS, MailboxShape
from vllm_saguaro.placement.wire import Limits, encode

LIMITS = Limits(slots=8, num_speculative_tokens=4, frame_bytes=1024)
SHAPE = MailboxShape(slots=1, branches=3, num_speculative_tokens=2, ring_bytes=8, support=4, vocab_size=100)
FAR_INPUTS = 20_000
FAR = dataclasses.replace(SHAPE, slots=2, rounds=4)
INPUTS = 40_000
"""A few seconds. Each planted error is found in less than half of them, with other numbers of chance too."""

FULL = Step(
    [Admit(Stamp(1, 2, 3), Sampling(0.75, 50, 0.5, 0.25, Noise.KEY, -7, 17), (4, 5))],
    [Want(Stamp(2, 3, 4), 1, 13, 2)],
    [Outcome(Stamp(3, 4, 5), 1, 6, 20, (21, 22), 2)],
    [Release(Stamp(4, 5, 6))],
)
FRAMES = [encode(FULL), encode(Step()), encode(Step(wants=FULL.wants * 2)), encode(Step(outcomes=FULL.outcomes * 2))]


def file_of(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)


def decoder(module: ModuleType) -> Callable[[bytes], None]:
    def decode(data: bytes) -> None:
        step = module.decode(data, LIMITS)
        assert_sound_step(step, LIMITS)
        assert_canonical(step, data)

    return decode


def reader(module: ModuleType) -> Callable[[bytes], None]:
    """The target side's reading of a cell and its q in which the bytes lie."""
    box = module.Mailbox(memoryview(bytearray(SHAPE.total_bytes)), SHAPE)
    at = 8 * CONTROL_WORDS
    size = SHAPE.total_bytes - SHAPE.ring_bytes - at

    def read(data: bytes) -> None:
        box._buffer[at : at + size] = data[:size].ljust(size, b"\0")
        table = box.read(0)
        if table is None:
            return
        assert_sound_table(table, 0, SHAPE)
        for branch in range(len(table.bonus)):
            q = box.proposals(table.stamp, table.version, branch, len(table.drafts))
            if q is not None:
                assert_sound_q(q, len(table.drafts), SHAPE)

    return read


def receiver(module: ModuleType) -> Callable[[bytes], None]:
    """The target side's taking of a stream that comes over the network, into a mailbox of its own and out of it."""
    bounds = module.bounds_of_tables(FAR)

    def receive(data: bytes) -> None:
        tables, grown = module.TableFrames(FAR), dict[int, Table]()
        box: mailbox.Mailbox | None = None  # most bytes are no frame, and need none
        for kind, payload in module.FrameReader(bounds).feed(data):
            assert len(payload) <= bounds[kind]
            if kind is module.Kind.TABLE:
                table = tables.decode(payload)
                assert_sound_depth(table, FAR)
                if table.drafts:
                    before = grown[table.stamp.slot]
                    assert (table.stamp, len(table.bonus)) == (before.stamp, len(before.bonus))
                    assert len(table.drafts) == len(before.drafts) + 1
                grown[table.stamp.slot] = table
                box = box or mailbox.Mailbox(memoryview(bytearray(FAR.total_bytes)), FAR)
                box.publish(table)
                read_back(box, table)
            elif kind is module.Kind.ROUND:
                one = module.decode_round(payload, FAR, now=10**15)
                assert one.began <= one.glued <= one.forked <= one.ended == 10**15
                assert 0 <= one.branches <= FAR.branches

    return receive


def read_back(box: mailbox.Mailbox, table: Table) -> None:
    """What the speculator finds of a depth that has come; nothing, where it says that it took hours."""
    assert box.sampling_c is None or 0 <= box.sampling_c <= 1
    found = box.read(table.stamp.slot)
    if found is None:
        assert table.seconds > 3600
        return
    assert_sound_table(found, table.stamp.slot, FAR)
    assert (found.stamp, len(found.drafts)) == (table.stamp, len(table.drafts))
    for branch in range(len(found.bonus)):
        q = box.proposals(found.stamp, found.version, branch, len(found.drafts))
        if q is not None:
            assert_sound_q(q, len(found.drafts), FAR)


Q = Proposals(np.array([[5, 6, 7, 8]] * 3, np.int32), np.array([[0.5, 0.25, 0.25, 0.0]] * 3, np.float32))


def streams() -> list[bytes]:
    """What a healthy draft side sends: tables with and without q, each depth by depth, and a round."""
    keys, rows = Table(Stamp(1, 5, 6), [0, 1, 2], [90, 91, 92], [], 0.5, sampling_c=0.7), [[10, 11, 12], [20, 21, 22]]
    grown = [dataclasses.replace(keys, drafts=rows[:depth]) for depth in (1, 2)]
    sampled = [dataclasses.replace(table, newest=Q) for table in grown]
    round_ = frames.encode_round(Round(Work.ROUND, 1_000, 1_200, 1_300, 1_900, 3, FAR.branches))
    return [b"".join(map(frames.encode_table, [keys, *depths])) for depths in (grown, sampled)] + [round_]


def cells() -> list[bytes]:
    """Cells as they are with tables of several depths and with q."""
    found = []
    for depth in range(SHAPE.num_speculative_tokens + 1):
        box = mailbox.Mailbox(memoryview(bytearray(SHAPE.total_bytes)), SHAPE)
        for d in range(depth + 1):
            rows = [[10, 11, 12], [20, 21, 22]][:d]
            box.publish(Table(Stamp(0, 5, 6), [0, 1, 2], [90, 91, 92], rows, newest=Q if d else None))
        found.append(bytes(box._buffer[8 * CONTROL_WORDS : SHAPE.total_bytes - SHAPE.ring_bytes]))
    return found


RECEIVING = [file_of(frames), file_of(rounds)]


def random_bytes(
    target: Callable[[bytes], None], refusals: tuple[type[Exception], ...], least: int, inputs: int = INPUTS
) -> Found | None:
    """The same number of inputs, of random bytes alone, at least so many in each."""
    chance = random.Random(0)
    for number in range(inputs):
        data = chance.randbytes(chance.randint(least, 600))
        try:
            target(data)
        except refusals:
            continue
        except Exception as error:
            return Found(data, number, error)
    return None


def assert_nothing_is_found(fuzzer: CoverageFuzzer, seeds: list[bytes], inputs: int = INPUTS) -> None:
    found = fuzzer.run(inputs)
    assert found is None, f"{found}"
    assert len(fuzzer.corpus) > 2 * len(seeds), "it was not guided by anything"


def assert_guidance_alone_finds_it(
    target: Callable[[bytes], None],
    paths: list[Path],
    seeds: list[bytes],
    refusals: tuple[type[Exception], ...] = (),
    least: int = 0,
    inputs: int = INPUTS,
) -> None:
    """A planted error: random bytes, at least so many in each, do not find it, and what is found fails again."""
    assert random_bytes(target, refusals, least, inputs) is None
    found = CoverageFuzzer(target, paths, seeds, refusals).run(inputs)
    assert found is not None
    with pytest.raises(type(found.error)):
        target(found.data)


def test_no_bytes_get_past_the_decoder() -> None:
    fuzzer = CoverageFuzzer(decoder(wire), [file_of(wire)], FRAMES, (wire.WireError,))
    assert_nothing_is_found(fuzzer, FRAMES)


def test_no_bytes_get_past_the_reader_of_a_cell() -> None:
    fuzzer = CoverageFuzzer(reader(mailbox), [file_of(mailbox), file_of(distribution)], cells())
    assert_nothing_is_found(fuzzer, cells())


def test_no_bytes_get_past_what_takes_them_from_the_network() -> None:
    fuzzer = CoverageFuzzer(receiver(frames), RECEIVING, streams(), (frames.FrameError,))
    assert_nothing_is_found(fuzzer, streams(), FAR_INPUTS)


DECODER_ERRORS = {
    "noise": ("if noise >= len(_NOISES):", "if noise < 0:"),
    "the last noise": ("if noise >= len(_NOISES):", "if noise > len(_NOISES):"),
    "slot": ("if not 0 <= slot < slots:", "if slot < 0:"),
    "round": ("if generation < 0 or round_ < 0:", "if generation < 0:"),
    "announced": ("if count < 0 or end > len(data):", "if count < 0:"),
    "negative tokens": ("if values and min(values) < 0:", "if values and values[0] < 0:"),
    "depth": ("0 <= depth <= most", "depth >= 0"),
    "accepted": ("0 <= accepted <= verified <= most", "0 <= accepted and verified <= most"),
    "min_p": ("0 <= min_p <= 1", "not min_p > 1"),
    "rest": ("if at != len(data):", "if at > len(data):"),
}


@pytest.mark.parametrize("name", DECODER_ERRORS)
def test_an_error_in_the_decoder_is_found_that_random_bytes_do_not_find(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, path = planted(wire, DECODER_ERRORS[name], tmp_path, monkeypatch)
    assert_guidance_alone_finds_it(decoder(variant), [path], FRAMES, (variant.WireError,))


def test_it_is_the_guidance_that_finds_the_way_from_a_step_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the header alone to a request with a noise that is none: a dozen conditions, one after the other."""
    variant, path = planted(wire, DECODER_ERRORS["noise"], tmp_path, monkeypatch)
    target, refusals, seeds = decoder(variant), (variant.WireError,), [encode(Step())]
    assert CoverageFuzzer(target, [path], seeds, refusals, guided=False).run(INPUTS) is None
    assert CoverageFuzzer(target, [path], seeds, refusals).run(INPUTS) is not None


READER_ERRORS = {
    "depth": (" and 0 <= depth <= shape.num_speculative_tokens)", ")"),
    "tokens": ("largest(tokens, axis=None, initial=0) >= shape.vocab_size", "False"),
    "accepted": ("largest(accepted, axis=None, initial=0) > shape.num_speculative_tokens", "False"),
    "nanoseconds": ("0 <= nanoseconds <= _LONGEST_ROUND", "True"),
    "round": ("round_ >= GONE", "True"),
    "q": ("return found if is_distribution(found, self.shape.vocab_size) else None", "return found"),
}
"""(Counts of branches are not among them: a slice of an array never goes beyond it.)"""


@pytest.mark.parametrize("name", READER_ERRORS)
def test_an_error_in_the_reader_is_found_that_random_bytes_do_not_find(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, path = planted(mailbox, READER_ERRORS[name], tmp_path, monkeypatch)
    assert_guidance_alone_finds_it(reader(variant), [path], cells(), least=8 * SHAPE.cell_words)


RECEIVER_ERRORS = {
    "slot": ("if not (0 <= slot < shape.slots and", "if not (slot < shape.slots and"),
    "generation": ("generation >= 0 and", ""),
    "round": ("and round_ >= GONE", ""),
    "time": ("if not 0 <= seconds < 1e6:", "if seconds < 0:"),
    "size": ("if len(payload) != _TABLE.size + rest or (width and not depth):", "if width and not depth:"),
    "stamp": ("(table.stamp, table.count, table.depth + 1) != (stamp, ", "(table.count, table.depth + 1) != ("),
    "not begun": ("table is None or ", "table is not None and "),
    "q": ("if not ((q >= 0) & (q <= 1.001)).all():", "if (q < 0).any():"),
    "tokens": ("values.min() >= 0 and ", ""),
    "a round": ("if one is None:", "if False:"),
}


@pytest.mark.parametrize("name", RECEIVER_ERRORS)
def test_an_error_in_what_takes_frames_is_found_that_random_bytes_do_not_find(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, path = planted(frames, RECEIVER_ERRORS[name], tmp_path, monkeypatch)
    target, paths = receiver(variant), [path, *RECEIVING[1:]]
    assert_guidance_alone_finds_it(target, paths, streams(), (variant.FrameError,), inputs=FAR_INPUTS)
