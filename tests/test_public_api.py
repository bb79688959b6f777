"""`import dsv2_jax` loads nothing heavy, and every public name is there when asked for."""

import subprocess
import sys

import pytest

import dsv2_jax


def test_the_import_loads_no_jax():
    code = "import sys, dsv2_jax; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", dsv2_jax.__all__)
def test_public_names_resolve(name):
    assert callable(getattr(dsv2_jax, name))
    assert name in dir(dsv2_jax)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"'pretrian'; it offers ConfigError, .*pretrain"):
        dsv2_jax.pretrian  # noqa: B018
