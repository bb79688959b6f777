"""An exported folder in vLLM, on CPU: its own configuration, tokenizer, model class and weight loader take all of it.

No forward pass is run: the kernels in vLLM's wheels are for GPUs. Skipped where vLLM is absent.
"""

import importlib.metadata
import os

import ml_dtypes
import numpy as np
import published
import pytest

from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf.convert import export_folder, import_folder
from dsv2_jax.hf.safetensors import Folder

pytestmark = pytest.mark.parity
WIDTHS = {"hidden_size": 64, "vocab_size": 320}  # vLLM's experts on CPU want multiples of 32
TEXT = "What is a transformer? 什么是 Transformer？"
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
EXPERTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    """What a worker of vLLM does before it loads a model: one process, no accelerator."""
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # read when it is imported
    vllm = pytest.importorskip("vllm", reason="needs vLLM")
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('gloo')}/store", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
    print(f"\nvLLM {vllm.__version__}, torch {importlib.metadata.version('torch')}")
    yield vllm
    distributed.cleanup_dist_env_and_memory()


def exported(path, config: dict):
    """A folder that came from ours, in several shards, with a tokenizer; and the tokenizer."""
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in published.weights(config).items()}
    src = published.write_folder(path / "src", config, tensors)
    tokenizer = Tokenizer.train([TEXT] * 3, 300)
    tokenizer.save(src / "tokenizer.json")
    import_folder(src, path / "ours", report=lambda _: None)
    export_folder(path / "ours", path / "dst", shard_bytes=100_000, report=lambda _: None)
    return path / "dst", tokenizer


def joined(name: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The parameter `name` of vLLM's model, which joins matrices that are published one by one."""
    prefix, _, last = name.rpartition(".experts.routed_experts.")
    if prefix:
        count = sum(key.startswith(f"{prefix}.experts.") for key in tensors) // 3
        keys = [[f"{prefix}.experts.{i}.{part}.weight" for part in EXPERTS[last]] for i in range(count)]
        return np.stack([np.concatenate([tensors[key] for key in row]) for row in keys])
    for stacked, parts in STACKED.items():
        if stacked in name:
            return np.concatenate([tensors[name.replace(stacked, part)] for part in parts])
    return tensors[name]


@pytest.mark.parametrize("name", published.CONFIGS)
def test_vllm_loads_an_exported_folder(vllm, tmp_path, monkeypatch, name):
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.tokenizers import get_tokenizer
    from vllm.utils.torch_utils import set_default_torch_dtype

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = published.CONFIGS[name] | WIDTHS
    path, tokenizer = exported(tmp_path, config)
    engine = EngineArgs(model=str(path), dtype="bfloat16", max_model_len=128, enforce_eager=True).create_engine_config()
    assert engine.model_config.architecture == "DeepseekV2ForCausalLM"
    assert engine.model_config.use_mla
    with set_current_vllm_config(engine), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(engine)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        get_model_loader(engine.load_config).load_weights(model, engine.model_config)  # every parameter, or an error
    folder, size = Folder(path), 0
    tensors = {key: folder.read(key) for key in published.shapes(config)}
    for key, parameter in model.named_parameters():
        expected = joined(key, tensors)
        np.testing.assert_array_equal(parameter.detach().float().numpy(), expected.astype(np.float32), err_msg=key)
        size += expected.size
    assert size == sum(tensor.size for tensor in tensors.values())  # each number once, none left over
    attention = model.model.layers[1].self_attn
    assert attention.scaling == pytest.approx((12 + 16) ** -0.5 * 1.5896, rel=1e-4)  # YaRN's, read from config.json
    ids = get_tokenizer(str(path)).encode(TEXT, add_special_tokens=False)
    assert ids == tokenizer.encode(TEXT)
