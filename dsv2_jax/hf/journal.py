"""What a conversion has done so far, for the next run to go on: JSON lines beside what is being written."""

import fcntl
import json
import pathlib
from collections.abc import Iterable


class Journal:
    """What `add` was given is kept if this process dies; one at a time has it open (`BlockingIOError` for others).

    The first line is `identity`, text that stands for the source and the options. `entries` are the others as they were
    found, up to one that a crash has cut; none, and `found` is False, where the journal is new or of another identity.
    `whole`: files or folders that are there once all is done; if one is and the journal is of another identity, all of
    the other was done, and `FileExistsError` is raised.
    """

    def __init__(self, path: pathlib.Path, identity: str, whole: Iterable[pathlib.Path] = ()):
        self.path = path
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            lines, size = _lines(self._file.read())
            self.found = lines[:1] == [{"identity": identity}]
            self.entries = lines[1:] if self.found else []
            if not self.found and (done := [str(place) for place in whole if place.exists()]):
                raise FileExistsError(0, "is whole", done[0])
            self._file.truncate(size if self.found else 0)
            if not self.found:
                self.add({"identity": identity})
        except BaseException:
            self._file.close()  # the lock too: who keeps the exception would keep it
            raise

    def add(self, entry: dict) -> None:
        data = json.dumps(entry).encode() + b"\n"
        while data:  # a disk that is nearly full takes a part, and refuses the rest
            data = data[self._file.write(data) :]

    def remove(self) -> None:
        self.path.unlink()

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _lines(data: bytes) -> tuple[list[dict], int]:
    """The whole lines at the beginning, and how many bytes they are."""
    lines, size = [], 0
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        size += len(line)
    return lines, size
