"""One environment for all tests, set before JAX is imported: eight virtual CPU devices, a kept compilation cache.

And no network: a test that connects to another machine fails.
"""

import ipaddress
import os
import pathlib
import socket

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of a test's time is compilation: leave out what LLVM would optimise, and let XLA emit the loops of fusions in its
# older, quicker way. The matmuls, loops and memory of a program stay those of a user; its fusions may be cut elsewhere.
QUICK = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ.setdefault("XLA_FLAGS", QUICK)
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dsv2_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

hypothesis.settings.register_profile("suite", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")


def _at_home_only(connect):
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0].partition("%")[0]
            if host != "localhost" and not (_is_number(host) and ipaddress.ip_address(host).is_loopback):
                pytest.fail(f"this test connects to {host}: tests use no network")
        return connect(self, address)

    return guarded


def _is_number(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


socket.socket.connect = _at_home_only(socket.socket.connect)
socket.socket.connect_ex = _at_home_only(socket.socket.connect_ex)
