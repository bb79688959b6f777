"""The report shows what metrics.jsonl holds, and nothing of a sample is taken for markup."""

import json
import re

import numpy as np
import pytest

from dsv2_jax.train import report


def rows():
    yield {"step": 0, "balance_losses": "expert 0.003"}
    for step in (10, 20, 30):
        yield {"step": step, "bits_per_byte": 4 - step / 20, "nll": 3.0, "tokens_per_second": None, "mfu": None}
    yield {
        "step": 30,
        "held_out/bits_per_byte": 2.625,
        "unigram_bits_per_byte": 3.5,
        "expert_load": [[1.0, 2.0, 3.0], [0.0, 6.0, 0.0]],
    }


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "config.json").write_text('{"text": "<b>"}')
    for step in ("9", "20", "30.damaged"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    return tmp_path


def test_page_shows_figures_plots_and_samples(workdir):
    page = report.write_report(workdir, [("if a < b:", " <script>")]).read_text()
    assert "2.6250" in page
    assert "3.5000" in page
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 2
    assert "if a &lt; b:</b> &lt;script&gt;" in page
    assert "<script>" not in page
    assert "None" not in page
    assert "<pre>{&quot;text&quot;: &quot;&lt;b&gt;&quot;}</pre>" in page  # config.json
    for where in ("checkpoints/20", "metrics.jsonl", "tensorboard"):
        assert f"{workdir / where}</td>" in page
    assert f"tensorboard --logdir={workdir}" in page
    for name in ("loss.png", "expert_load.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_has_no_expert_load(workdir):
    kept = [json.dumps({k: v for k, v in row.items() if k != "expert_load"}) + "\n" for row in rows()]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    assert "expert_load" not in report.write_report(workdir).read_text()
    assert not (workdir / "expert_load.png").exists()


def test_running_mean_is_centred_and_keeps_a_line():
    line = [float(value) for value in range(20)]
    np.testing.assert_allclose(report._running_mean(line, 9), line)
    assert report._running_mean([0.0, 0.0, 9.0, 0.0, 0.0], 3) == [0.0, 3.0, 3.0, 3.0, 0.0]
