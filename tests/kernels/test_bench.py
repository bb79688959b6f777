"""The benchmark's counts against counts by hand, and a run of it on the CPU."""

import json

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from kernels_pallas import bench, measuring, work
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import shapes as latent_shapes
from kernels_pallas.select import Target


def test_counts_of_attention():
    forward, both = work.flash_work("case", flash_shapes.Case(2, 3, 4, 2, 8, 6), "float32")
    assert forward.flops == 2 * 4 * 6 * (2 * 8 + 2 * 6)  # rows, heads, pairs of query and key, products
    assert forward.bytes == 4 * (2 * 3 * 4 * 8 + 2 * 3 * 2 * (8 + 6) + 2 * 3 * 4 * 6)
    assert both.flops == forward.flops + 2 * 4 * 6 * 2 * (8 + 8 + 8 + 6 + 6)


def test_counts_of_the_experts():
    case = grouped_shapes.Case(8, 1, 4, 4, 10, 6, "one")  # one expert of four has all eight rows
    works = {w.op: w for w in work.grouped_work("case", case, "bfloat16")}
    assert works["grouped_matmul"].flops == 2 * 8 * 10 * 6
    assert works["grouped_matmul"].bytes == 2 * (8 * 10 + 10 * 6 + 8 * 6)
    assert works["grouped_swiglu"].flops == 2 * works["grouped_matmul"].flops
    assert works["grouped_swiglu"].bytes == 2 * (8 * 10 + 2 * 10 * 6 + 8 * 6)
    assert works["grouped_matmul down"].flops == works["grouped_matmul"].flops
    assert works["grouped_matmul int8"].bytes == 2 * (8 * 10 + 8 * 6) + 10 * 6
    assert works["grouped_swiglu float8_e4m3fn"].bytes == 2 * (8 * 10 + 8 * 6) + 2 * 10 * 6
    assert works["dispatch"].bytes == 2 * (8 * 10 + 8 * 10)


def test_a_peer_does_the_same_work():
    """A dense product has the FLOPs of the grouped one, its gradient too; cuDNN's values are as wide as the keys."""
    case = grouped_shapes.Case(9, 1, 4, 4, 10, 6, "one")
    for w in work.grouped_work("case", case, "float32"):
        if w.op.startswith("grouped"):
            flops = jax.jit(w.peer.function).lower(*w.peer.arguments).cost_analysis()["flops"]
            assert w.flops == flops, w.op
    q, k, v, o = (jnp.ones((1, 5, 2, width)) for width in (12, 12, 8, 8))
    forward, back = work.cudnn(q, k, v, o)
    assert forward.arguments[2].shape == back.arguments[0].shape == (1, 5, 2, 12)
    assert (forward.arguments[2][..., 8:] == 0).all()


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_routings_of_the_benchmark(routing):
    case = grouped_shapes.Case(64, 3, 8, 16, 4, 4, routing)
    expert_TK = grouped_shapes.routing(case, np.random.default_rng(0))
    count_E = np.bincount(expert_TK.ravel(), minlength=8)
    assert count_E.sum() == 64 * 3
    assert all(len(set(row)) == 3 for row in expert_TK)
    assert (count_E == 24).all() if routing == "balanced" else count_E[0] > 2 * count_E[-1]


def test_calls_are_in_flight_together_but_on_a_cpu(monkeypatch):
    """As many as take `IN_FLIGHT` seconds; the time is that of one."""
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock) * 0.5)
    assert measuring.seconds(calls.append, (1,), 3) == 0.5
    assert len(calls) == 1 + 3
    monkeypatch.setattr(measuring, "target", lambda: Target("gpu", "NVIDIA H200"))
    monkeypatch.setattr(measuring, "IN_FLIGHT", (5.0, 500))
    calls.clear()
    assert measuring.seconds(calls.append, (1,), 3) == 0.5 / 10
    assert len(calls) == 2 + 3 * 10


def test_padding_is_no_useful_work():
    """Nine rows of one expert in the tiles of eight that the model would take: two tiles, sixteen rows."""
    case = grouped_shapes.Case(9, 1, 4, 128, 10, 6, "one")
    works = {w.op: w for w in work.grouped_work("case", case, "bfloat16")}
    assert works["grouped_matmul"].arguments[0].shape == (6 * 8, 10)
    assert works["grouped_matmul"].flops == 2 * 9 * 10 * 6
    assert works["grouped_matmul"].bytes == 2 * (9 * 10 + 10 * 6 + 9 * 6)
    assert works["combine"].flops == 2 * 9 * 10


def test_counts_of_latent_attention():
    """B = 128, L = 4096 at 128 heads: the intensity tends to heads x 1088 / 576 = 242 FLOP a byte."""
    case = latent_shapes.Case(128, 1, (4096,), 64)
    (plain,) = work.latent_work("case", case, "bfloat16")
    assert plain.flops == 2 * 128 * 4096 * 1088
    assert plain.bytes == 2 * (4096 * 576 + 128 * (576 + 512))
    (coded,) = work.latent_work("case", latent_shapes.Case(2, 1, (64,), 64, dtype="int4"), "bfloat16")
    assert coded.bytes == 64 * (576 / 2 + 8) + 2 * 2 * (576 + 512)


@pytest.fixture
def tiny(monkeypatch):
    small = latent_shapes.Case(2, 1, (20, 40), 16, 128, 16, 256)
    shapes = {
        "flash": {"tiny": flash_shapes.Case(1, 16, 2, 2, 8, 6)},
        "grouped": {"tiny": grouped_shapes.Case(8, 2, 4, 4, 10, 6)},
        "latent": {"tiny": small},
    }
    monkeypatch.setattr(bench, "SMALL", shapes)
    monkeypatch.setattr(work, "CODES", ("int8",))
    monkeypatch.setattr(bench, "measured_rates", lambda *_: (1e12, 1e10))


def test_a_run_writes_results_reasons_and_a_picture(tiny, tmp_path):
    bench.main(["--shapes=small", "--repeats=1", f"--out={tmp_path}"])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["command"] == f"python -m kernels_pallas.bench --shapes=small --repeats=1 --out={tmp_path}"
    assert record["jax"] == jax.__version__
    assert record["jaxlib"] == jaxlib.__version__
    assert record["runtime"]
    rows = record["results"]
    assert {row["op"] for row in rows} >= {"flash_attention", "grouped_swiglu", "dispatch", "paged_latent_attention"}
    for row in rows:
        if row["implementation"] == "xla":
            assert row["roofline_seconds"] == max(row["flops"] / 1e12, row["bytes"] / 1e10)
            assert row["share"] == pytest.approx(row["roofline_seconds"] / row["seconds"])
            assert ("ratio" in row) == row["op"].startswith("grouped")
            assert "ratio" not in row or row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
        else:
            assert "cannot run" in row["reason"]
    assert (tmp_path / "roofline.png").read_bytes()[1:4] == b"PNG"


def test_a_run_goes_on_after_a_failure_and_keeps_what_it_has(tiny, tmp_path, monkeypatch):
    """The second measurement fails as compilers and devices do; the third is interrupted."""
    taken = iter([1e-3, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), KeyboardInterrupt()])

    def seconds(*_):
        if isinstance(result := next(taken), BaseException):
            raise result
        return result

    monkeypatch.setattr(bench, "seconds", seconds)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--shapes=small", "--reference", f"--out={tmp_path}"])
    first, second = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert first["seconds"] == 1e-3
    assert second["reason"] == "failed: RESOURCE_EXHAUSTED"
