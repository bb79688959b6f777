"""The benchmark's counts against counts by hand, and a run of it on the CPU."""

import json

import jax
import jaxlib
import pytest

from kernels_pallas import bench
from kernels_pallas.flash_attention import shapes as flash_shapes
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.latent_attention import shapes as latent_shapes


def test_counts_of_attention():
    forward, both = bench.flash_work("case", flash_shapes.Case(2, 3, 4, 2, 8, 6), "float32")
    assert forward.flops == 2 * 4 * 6 * (2 * 8 + 2 * 6)  # rows, heads, pairs of query and key, products
    assert forward.bytes == 4 * (2 * 3 * 4 * 8 + 2 * 3 * 2 * (8 + 6) + 2 * 3 * 4 * 6)
    assert both.flops == forward.flops + 2 * 4 * 6 * 2 * (8 + 8 + 8 + 6 + 6)


def test_counts_of_the_experts():
    case = grouped_shapes.Case(8, 1, 4, 4, 10, 6, "one")  # one expert of four has all eight rows
    work = {w.op: w for w in bench.grouped_work("case", case, "bfloat16")}
    assert work["grouped_matmul"].flops == 2 * 8 * 10 * 6
    assert work["grouped_matmul"].bytes == 2 * (8 * 10 + 10 * 6 + 8 * 6)
    assert work["grouped_swiglu"].flops == 2 * work["grouped_matmul"].flops
    assert work["grouped_swiglu"].bytes == 2 * (8 * 10 + 2 * 10 * 6 + 8 * 6)
    assert work["dispatch"].bytes == 2 * (8 * 10 + 8 * 10)


def test_padding_is_no_useful_work():
    """Nine rows of one expert in the tiles of eight that the model would take: two tiles, sixteen rows."""
    case = grouped_shapes.Case(9, 1, 4, 128, 10, 6, "one")
    work = {w.op: w for w in bench.grouped_work("case", case, "bfloat16")}
    assert work["grouped_matmul"].arguments[0].shape == (6 * 8, 10)
    assert work["grouped_matmul"].flops == 2 * 9 * 10 * 6
    assert work["grouped_matmul"].bytes == 2 * (9 * 10 + 10 * 6 + 9 * 6)
    assert work["combine"].flops == 2 * 9 * 10


def test_counts_of_latent_attention():
    """B = 128, L = 4096 at 128 heads: the intensity tends to heads x 1088 / 576 = 242 FLOP a byte."""
    case = latent_shapes.Case(128, 1, (4096,), 64)
    (work,) = bench.latent_work("case", case, "bfloat16")
    assert work.flops == 2 * 128 * 4096 * 1088
    assert work.bytes == 2 * (4096 * 576 + 128 * (576 + 512))
    (coded,) = bench.latent_work("case", latent_shapes.Case(2, 1, (64,), 64, dtype="int4"), "bfloat16")
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
