import os

import jax
import pytest

from dsv2_jax.train.placing import ending_with_the_others


@pytest.fixture
def leave(monkeypatch):
    def left(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", left)


def fail(message: str, processes: int, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with ending_with_the_others():
        raise jax.errors.JaxRuntimeError(message)


def test_a_process_whose_peer_is_gone_ends_and_says_so(leave, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1"):
        fail("UNAVAILABLE: connection closed by peer", 2, monkeypatch)
    assert "another has ended or cannot be reached (UNAVAILABLE: connection" in capsys.readouterr().err


@pytest.mark.parametrize(("message", "processes"), [("RESOURCE_EXHAUSTED: out of memory", 2), ("UNAVAILABLE", 1)])
def test_its_own_failures_are_not_blamed_on_others(leave, monkeypatch, capsys, message, processes):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        fail(message, processes, monkeypatch)
    assert capsys.readouterr().err == ""
