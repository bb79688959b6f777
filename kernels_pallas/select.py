"""Which implementation of an op runs."""

from collections.abc import Callable


def select(op: str, name: str, implementations: dict[str, Callable], automatic: str = "xla") -> Callable:
    """The implementation called `name`; "auto" takes `automatic`, the fastest one that runs everywhere.

    Raises:
      ValueError: there is no such implementation; the message lists those there are.
    """
    if name == "auto":
        name = automatic
    if name not in implementations:
        raise ValueError(f"{op}: no implementation {name!r}; there are auto, {', '.join(implementations)}")
    return implementations[name]
