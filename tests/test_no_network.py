"""Tests reach this machine alone (conftest.py)."""

import socket

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.com", 80), ("2001:db8::1", 80)])
def test_another_machine_is_out_of_reach(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    for name in ("connect", "connect_ex"):
        with socket.socket(family) as connection, pytest.raises(pytest.fail.Exception, match="tests use no network"):
            getattr(connection, name)(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_in_reach(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection((host, server.getsockname()[1])) as connection:
            assert connection.getpeername() == server.getsockname()
