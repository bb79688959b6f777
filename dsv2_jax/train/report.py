"""What a run shows: `loss.png`, `expert_load.png` and `report.html`, made from metrics.jsonl and config.json."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from dsv2_jax.train.metrics import read_rows

mpl.use("Agg")
from matplotlib import pyplot as plt

INK, BLUE, ORANGE, GREY = "#1b1f24", "#2f6fde", "#e07a1f", "#9aa4b2"


def write_report(workdir: str | Path, samples: Sequence[tuple[str, str]] = ()) -> Path:
    """Draw the plots of the run in `workdir` and the page that shows them; returns the page's path.

    Args:
      samples: (prompt, continuation) pairs to show.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir)
    plot_loss(rows, workdir / "loss.png")
    load_LE = next((row["expert_load"] for row in reversed(rows) if row.get("expert_load")), None)
    if load_LE is not None:
        plot_expert_load(np.array(load_LE), workdir / "expert_load.png")
    page = workdir / "report.html"
    page.write_text(_page(workdir, rows, samples))
    return page


def _series(rows: list[dict], name: str) -> tuple[list, list]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Means over up to `window` values around each; fewer at the ends, so that the curve is not shifted."""
    reach = [min(i, len(values) - 1 - i, window // 2) for i in range(len(values))]
    return [float(np.mean(values[i - r : i + r + 1])) for i, r in enumerate(reach)]


def _axes(width: float, height: float):
    figure, axes = plt.subplots(figsize=(width, height), dpi=150, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def plot_loss(rows: list[dict], path: Path) -> None:
    """Bits per byte over steps: training, held-out, and the unigram model's level."""
    figure, axes = _axes(7, 4)
    at, training = _series(rows, "bits_per_byte")
    axes.plot(at, training, color=BLUE, linewidth=0.8, alpha=0.35)
    axes.plot(at, _running_mean(training, 9), color=BLUE, linewidth=1.6, label="training batches, running mean")
    steps, held_out = _series(rows, "held_out/bits_per_byte")
    if steps:
        axes.plot(steps, held_out, "o-", color=ORANGE, markersize=5, linewidth=1.4, label="held-out text")
        axes.annotate(
            f"{held_out[-1]:.3f}", (steps[-1], held_out[-1]), xytext=(0, 9), textcoords="offset points", color=ORANGE,
            ha="center", fontsize=10, fontweight="bold",
        )  # fmt: skip
    _, unigram = _series(rows, "unigram_bits_per_byte")
    if unigram:
        label = f"unigram model, held-out ({unigram[-1]:.3f})"
        axes.axhline(unigram[-1], color=GREY, linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(axis="y", color="#e5e8ec", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def plot_expert_load(load_LE: np.ndarray, path: Path) -> None:
    """Share of each layer's assignments that went to each routed expert, as a multiple of an equal share."""
    relative_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    layers, experts = relative_LE.shape
    figure, axes = _axes(max(5, 1.5 + 0.35 * min(experts, 40)), max(2.2, 1.2 + 0.35 * layers))
    most = max(2.0, relative_LE.max())
    norm = mpl.colors.TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
    image = axes.imshow(relative_LE, cmap="RdBu_r", norm=norm, aspect="auto")
    axes.set(xlabel="routed expert", ylabel="MoE layer", yticks=range(layers))
    axes.set_title("load of the experts (1 = an equal share)", fontsize=10, color=INK)
    figure.colorbar(image, ax=axes, ticks=[0, 1, most], format="%.1f")
    figure.savefig(path)
    plt.close(figure)


FIGURES = {
    "step": ("steps", "{:,.0f}"),
    "nll": ("training loss, last step (nats a token)", "{:.3f}"),
    "held_out/bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "unigram_bits_per_byte": ("a unigram model's, same text and tokens", "{:.4f}"),
    "tokens_per_second": ("tokens a second", "{:,.0f}"),
    "mfu": ("share of the measured matmul rate", "{:.1%}"),
    "load/violation": ("largest load over the mean, minus 1", "{:.2f}"),
    "load/entropy": ("entropy of the load, as a share of ln E", "{:.3f}"),
    "skipped_steps": ("steps skipped (not finite)", "{:.0f}"),
}

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:52rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%}
td{padding:.15rem 1.2rem .15rem 0}td+td{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f4f6f8;padding:.8rem;overflow-x:auto;font-size:.85rem;white-space:pre-wrap}b{color:#2f6fde}
"""


def _page(workdir: Path, rows: list[dict], samples: Sequence[tuple[str, str]]) -> str:
    last: dict = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    table = "".join(
        f"<tr><td>{label}</td><td>{form.format(last[name])}</td></tr>"
        for name, (label, form) in FIGURES.items()
        if name in last
    )
    parts = [
        f"<h1>{html.escape(workdir.resolve().name)}</h1><table>{table}</table><h2>Loss</h2>{_image(workdir, 'loss')}"
    ]
    if (workdir / "expert_load.png").exists():
        parts.append(f"<h2>Expert load</h2>{_image(workdir, 'expert_load')}")
    if samples:
        parts.append("<h2>Samples</h2><p>The prompt is blue; the rest was drawn through the latent cache.</p>")
        parts += [f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in samples]
    if (workdir / "config.json").exists():
        config = html.escape((workdir / "config.json").read_text())
        parts.append(f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{config}</pre></details>")
    parts.append(f"<h2>Files</h2><table>{_files(workdir)}</table>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>dsv2_jax run</title><style>{STYLE}</style>'
    return head + "".join(parts) + "</html>\n"


def _files(workdir: Path) -> str:
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    files = {"every logged number": workdir / "metrics.jsonl"}
    files |= {"newest checkpoint": workdir / "checkpoints" / str(max(steps))} if steps else {}
    files |= {"curves": f"tensorboard --logdir={workdir / 'tensorboard'}"}
    return "".join(f"<tr><td>{what}</td><td>{html.escape(str(where))}</td></tr>" for what, where in files.items())


def _image(workdir: Path, name: str) -> str:
    data = base64.b64encode((workdir / f"{name}.png").read_bytes()).decode()
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'
