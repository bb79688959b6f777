"""The check of kernels on a device: gone through by the portable forms; its complaints; its cases traced for a GPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from kernels_pallas import check_device, device_cases, measuring
from kernels_pallas.device_cases import Check
from kernels_pallas.grouped_matmul import xla

FEW = "grouped_matmul/one token, swiglu", "latent_attention/ties"


def rows(folder):
    return json.loads((folder / "check_device.json").read_text())["results"]


def test_a_run_compares_results_and_gradients(tmp_path, capsys):
    assert check_device.main([*FEW, f"--out={tmp_path}"]) == 0
    found = {(row["case"], row["result"]): row for row in rows(tmp_path)}
    swiglu = {result for case, result in found if case == FEW[0]}
    assert swiglu == {"out", "gradient of x", "gradient of gate", "gradient of up"}
    assert {case for case, _ in found} == {*FEW}
    assert all(row["oracle"] == "reference" and row["implementation"] == "xla" for row in found.values())
    assert 0 < max(row["error"] for row in found.values()) <= check_device.TOLERANCE
    assert f"2 cases, {len(found)} results, 0 failed (cpu" in capsys.readouterr().out


def test_a_wrong_kernel_fails(tmp_path, monkeypatch, capsys):
    right = xla.grouped_matmul
    monkeypatch.setattr(xla, "grouped_matmul", lambda x, w, layout: right(x, w, layout).at[0, -1].add(5.0))
    assert check_device.main(["grouped_matmul/one token, matmul", f"--out={tmp_path}"]) == 1
    (out,) = [row for row in rows(tmp_path) if row["result"] == "out"]
    assert out["error"] > check_device.TOLERANCE
    assert "FAILED > 0.03" in capsys.readouterr().out


def test_a_kernel_that_does_not_run_fails(tmp_path):
    assert check_device.main(["latent_attention/ties", "--implementation=gpu", f"--out={tmp_path}"]) == 1
    (row,) = rows(tmp_path)
    assert "a Hopper kernel, not for cpu" in row["reason"]


def test_a_case_that_does_not_exist_fails(tmp_path):
    assert check_device.main(["no such case", f"--out={tmp_path}"]) == 1


@pytest.mark.parametrize(("drift", "nan"), [(0.0, False), (1e-6, False), (0.0, True)])
def test_two_runs_must_agree_to_the_bit_and_be_finite(drift, nan):
    calls = []

    def drifting(x):
        calls.append(None)
        return np.asarray(x + len(calls) * drift + (np.nan if nan else 0), np.float32)

    def run(implementation):
        if implementation == "reference":
            return lambda x: {"out": x}
        return lambda x: {"out": jax.pure_callback(drifting, jax.ShapeDtypeStruct((3,), jnp.float32), x)}

    (row,) = check_device.compare(Check("case", run, (jnp.ones(3),), ("gpu",)), "gpu")
    assert row["ok"] == (not drift and not nan)
    assert ("second run" in row.get("reason", "")) == bool(drift)
    assert (row["error"] == np.inf) == nan


ALL = device_cases.small() | device_cases.full()


def test_every_kernel_of_hopper_has_small_and_full_cases():
    for op, words in {
        "flash_attention": ("packed", "cache", "v2", "v2 lite"),
        "grouped_matmul": ("none", "all to one", "matmul", "swiglu", "down", "int8", "float8", "skewed", "v2 lite"),
        "latent_attention": ("ties", "int8", "int4", "float8", "piece", "16 heads", "128 heads", "prefill"),
        "token_dispatch": ("none", "v2 lite"),
    }.items():
        names = [name for name in ALL if name.startswith(op)]
        assert {"full" in name for name in names} == {True, False}
        assert all(any(word in name for name in names) for word in words), op


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_cases_trace_on_hopper(name):
    """So that the first GPU finds no kernel refusing its case; nothing is allocated."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)

    def results():
        check = ALL[name](name)
        kernel = "gpu" if "gpu" in check.implementations else check.elsewhere
        return check.run(kernel)(*check.arguments), check.run(check.oracle)(*check_device._widened(check.arguments))

    with jax.sharding.use_abstract_mesh(mesh):
        found, expected = jax.eval_shape(results)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in expected.items()}


def test_numbers_of_the_device_are_one_seed_s():
    a, b = measuring.OnDevice(), measuring.OnDevice()
    x = a.normal(size=(40, 30))
    np.testing.assert_array_equal(x, b.normal(size=(40, 30)))
    assert not np.array_equal(x, a.normal(size=(40, 30)))
    assert abs(float(jnp.std(x)) - 1) < 0.1
