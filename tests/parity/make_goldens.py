"""Writes tests/goldens/*.npz, the oracle's outputs for the models of tests/published.py (which draws their weights).

    pip install -e ".[parity]" && PYTHONPATH=tests python -m parity.make_goldens

Refuses models on which two correct implementations could differ: routers and greedy tokens must be decided clearly.
"""

import pathlib
import tempfile

import numpy as np
import published
from parity import live

from oracles import published as oracle
from oracles.compare import worst

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "goldens"
LENGTH, PROMPT, NEW = 128, 40, 64  # tokens; the models' original length is 64
EVERY = slice(3, None, 8)  # positions whose hidden states are kept


def make(name: str) -> dict[str, np.ndarray]:
    config, seed = published.CONFIGS[name], published.SEEDS[name]
    tensors, tokens_T = published.weights(config, seed), published.tokens(config, LENGTH, seed)
    with tempfile.TemporaryDirectory() as folder:
        model = live.load(published.write_folder(pathlib.Path(folder), config, tensors))
    logits_TV, hidden_LTD = live.forward(model, tokens_T)
    continuation, lead = live.greedy(model, tokens_T[:PROMPT], NEW)
    check(config, tensors, tokens_T, logits_TV, [*tokens_T[:PROMPT], *continuation], lead)
    return {
        "tokens": tokens_T.astype(np.int32),
        "logits": logits_TV,
        "hidden": np.stack(hidden_LTD)[:, EVERY],
        "greedy": np.array(continuation, np.int32),
    }


def check(config, tensors, tokens_T, logits_TV, whole_T, lead) -> None:
    for row_T in (tokens_T, np.array(whole_T)):
        blocks, _ = oracle.layer_by_layer(tensors, config, row_T)
        scores = [block["scores"] for block in blocks if "scores" in block]
        gap = min(oracle.smallest_gap(scores_TE, oracle.settings(config).moe) for scores_TE in scores)
        assert gap > 2e-5, f"the router is nearly undecided: {gap:.1e}; choose another seed"
    assert lead > 0.01, f"greedy decoding is nearly undecided: {lead:.1e}; choose another seed"
    assert len(set(whole_T[PROMPT:])) > 15, "the continuation repeats itself; choose another seed"
    error = worst(logits_TV, oracle.logits(tensors, config, tokens_T))
    assert error < 2e-5, f"the two oracles disagree: {error:.1e}"
    print(f"gap {gap:.1e}, lead {lead:.1e}, oracles agree to {error:.1e}, {len(set(whole_T[PROMPT:]))} distinct tokens")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in published.CONFIGS:
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **make(name))
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {live.VERSIONS}")


if __name__ == "__main__":
    main()
