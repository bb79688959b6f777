"""What a conversion has done so far, for the next run to go on: JSON lines beside what is being written."""

import fcntl
import json
import pathlib


class Journal:
    """What `add` was given is kept if this process dies; one at a time has it open (`BlockingIOError` for others).

    The first line is `identity`, text that stands for the source and the options. `entries` are the others as they were
    found, up to one that a crash has cut; none, and `found` is False, where the journal is new or of another identity.
    """

    def __init__(self, path: pathlib.Path, identity: str):
        self.path = path
        self._file = path.open("a+", errors="replace")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        lines = _lines(self._file.read())
        self.found = lines[:1] == [{"identity": identity}]
        self.entries = lines[1:] if self.found else []
        self._file.truncate(0)
        self._write({"identity": identity}, *self.entries)

    def add(self, entry: dict) -> None:
        self._write(entry)

    def remove(self) -> None:
        self.path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def _write(self, *lines: dict) -> None:
        self._file.writelines(json.dumps(line) + "\n" for line in lines)
        self._file.flush()


def _lines(text: str) -> list[dict]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
