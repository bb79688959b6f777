"""What a conversion has done so far, for the next run to go on: JSON lines beside what is being written."""

import json
import os
import pathlib


class Journal:
    """Lines that are on disk when `add` returns.

    The first one is `identity`, text that stands for the source and the options; a journal of another identity is
    emptied. `entries` are the other lines as they were found, up to one that a crash has cut.
    """

    def __init__(self, path: pathlib.Path, identity: str):
        self.path = path
        lines = _read(path) if path.exists() else []
        self.found = lines[:1] == [{"identity": identity}]
        self.entries = lines[1:] if self.found else []
        self._file = path.open("w")
        for line in [{"identity": identity}, *self.entries]:
            self._write(line)
        self._flush()

    def add(self, entry: dict) -> None:
        self._write(entry)
        self._flush()

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _read(path: pathlib.Path) -> list[dict]:
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
