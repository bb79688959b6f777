"""The oracle: transformers' DeepseekV2ForCausalLM on CPU, opened from a published folder, its plainest code paths.

Imports torch and transformers: only what runs with the parity extra imports this module.
"""

import numpy as np
import torch
from transformers import DeepseekV2ForCausalLM, __version__

VERSIONS = f"transformers {__version__}, torch {torch.__version__}"


def load(folder, dtype: str = "float32"):
    """The model in `dtype`; every key of the folder used and every parameter filled, or AssertionError."""
    model, report = DeepseekV2ForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model.eval()


@torch.inference_mode()
def forward(model, tokens_T, chunks=None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [T, V] of one document, in one pass or in chunks through the cache, and what leaves each block [T, D]."""
    cache, logits, hidden = None, [], []
    for chunk in torch.tensor(np.asarray(tokens_T))[None].split(chunks or len(tokens_T), dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = out.past_key_values
        logits.append(out.logits[0].float().numpy())
        hidden.append([h[0].float().numpy() for h in out.hidden_states])
    return np.concatenate(logits), [np.concatenate(layer) for layer in zip(*hidden)]


@torch.inference_mode()
def greedy(model, prompt_T, count: int) -> tuple[list[int], float]:
    """`count` tokens, each the likeliest, through the cache; the least lead of a likeliest logit over the next."""
    out = model(torch.tensor(np.asarray(prompt_T))[None], use_cache=True)
    found, leads = [], []
    for _ in range(count):
        best, second = out.logits[0, -1].float().topk(2).values.tolist()
        leads.append(best - second)
        found.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([[found[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return found, min(leads)
