"""Whether the files of a folder are those that were published: their SHA-256 against what the download recorded.

safetensors has no checksum, so a bit that flips in a value goes unseen; a download leaves one. Read are, for a file F,

    SHA256SUMS                                  a line of `sha256sum` that names F, beside it; exports have one
    .cache/huggingface/download/F.metadata      the second line, where the Hub's client was given a folder (`local_dir`)
    blobs/<SHA-256>                             what F is a link to, in the cache of the Hub's client

A file of which none of them knows is not checked: what flips in its values is then found only if a weight becomes
infinite or not a number.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable

from dsv2_jax.hf.safetensors import SUMS, FolderError

SHA256 = re.compile(r"[0-9a-f]{64}")
LINE = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")
BLOCK = 4 * 2**20  # bytes read at once
REMEDY = f"a bit that flips in their values goes unseen; if you know their sums, put them into {SUMS} beside them"


def recorded(files: Iterable[pathlib.Path]) -> dict[pathlib.Path, str]:
    """The SHA-256 of each file of which one is recorded. Raises `FolderError` where a record cannot be read."""
    found = {file: _recorded(file) for file in files}
    return {file: digest for file, digest in found.items() if digest}


def verify(
    digests: dict[pathlib.Path, str],
    *,
    advance: Callable[[int], None] = lambda size: None,
    passed: Callable[[pathlib.Path], None] = lambda file: None,
) -> None:
    """Read every file and raise one `FolderError` that names all whose SHA-256 is another.

    Args:
      advance: called with the number of bytes read since its last call.
      passed: called with a file that was found right.
    """
    wrong = {}
    for file, expected in digests.items():
        if (found := _sha256(file, advance)) == expected:
            passed(file)
        else:
            wrong[file] = f"{file}: its SHA-256 is {found}, {expected} is recorded"
    if wrong:
        files = " ".join(os.path.realpath(file) for file in wrong)  # in the Hub's cache, a link alone would stay wrong
        remedy = f"delete {files}, download {'it' if len(wrong) == 1 else 'them'} again"
        raise FolderError(f"{'; '.join(wrong.values())}: damaged since it was published; {remedy}")


def _recorded(file: pathlib.Path) -> str | None:
    sums, metadata = file.with_name(SUMS), file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    found = {}
    for match in map(LINE.fullmatch, _lines(sums)):
        if match:
            found[match["name"]] = match["sum"]
    if file.name in found:
        return found[file.name]
    _, etag, *_ = [*_lines(metadata), "", ""]
    target = pathlib.Path(os.readlink(file)) if file.is_symlink() else pathlib.Path()
    blob = target.name if target.parent.name == "blobs" else ""
    return next((name for name in (etag, blob) if SHA256.fullmatch(name)), None)


def _lines(file: pathlib.Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines() if file.is_file() else []
    except OSError as error:
        raise FolderError(f"{file}: cannot be read ({error.strerror}); remove it, or make it readable") from None


def _sha256(file: pathlib.Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as source:
            while block := source.read(BLOCK):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise FolderError(f"{file}: cannot be read ({error.strerror}); download it again") from None
    return digest.hexdigest()
