"""A disk that fills up."""

import contextlib
import resource


@contextlib.contextmanager
def file_size_limit(size: int):
    """As a full disk: a write beyond `size` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
