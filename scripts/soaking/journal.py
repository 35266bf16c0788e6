"""The state of a soak: a file with one JSON object a line, written as things happen, read again to go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vllm_saguaro.benchmark.settings import SettingsError

SCHEMA = 1
Record = dict[str, Any]


class Journal:
    """Appends records and has all of them. The first line says which soak it is; what was half written is dropped."""

    def __init__(self, path: Path, settings: Record) -> None:
        """Go on with the soak in `path`, or begin one. Raises `SettingsError` if it is another soak's."""
        self.path = path
        self._records: dict[str, list[Record]] = {}
        if path.exists() and path.stat().st_size:
            self._read(settings)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
            self.add("soak", schema=SCHEMA, settings=settings)

    def add(self, what: str, **values: Any) -> None:
        """Write a record; it is in the file when this returns."""
        record = {"what": what, **values}
        self._records.setdefault(what, []).append(record)
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._file.flush()

    def of(self, what: str) -> list[Record]:
        """All records of one kind, in the order in which they were written."""
        return self._records.get(what, [])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, settings: Record) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            first = records[0]
            if first["what"] != "soak" or first["schema"] != SCHEMA:
                raise ValueError
            for record in records:
                self._records.setdefault(record["what"], []).append(record)
        except (ValueError, KeyError, IndexError, TypeError):
            raise SettingsError(f"{self.path} is not the state of a soak: name another file with --state") from None
        differing = list(_differences(first["settings"], settings))
        if differing:
            raise SettingsError(f"{self.path} is the state of another soak ({'; '.join(differing)}): name another file")
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _differences(then: Record, now: Record) -> Iterator[str]:
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            yield f"{key} was {json.dumps(then.get(key))}, is {json.dumps(now.get(key))}"
