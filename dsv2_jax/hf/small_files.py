"""What stands beside the weights of a published folder: config.json, the files of the tokenizer, and of generation."""

import json
import os

from etils import epath

from dsv2_jax.config import ConfigError, ModelConfig
from dsv2_jax.data.chat import TEMPLATE
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf.config import published_config
from dsv2_jax.hf.pretrained import find_tokenizer, run_folder

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
OTHERS = ("chat_template.jinja", "special_tokens_map.json", "generation_config.json")
NAMES = (TOKENIZER, TOKENIZER_CONFIG, *OTHERS)  # copied as they are; config.json is made
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read(folder: str | os.PathLike) -> dict[str, bytes]:
    """Those of `NAMES` that a folder has. Raises `ConfigError` for one that cannot be read."""
    found = {}
    for file in (epath.Path(folder) / name for name in NAMES):
        try:
            if file.exists():
                found[file.name] = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}); make it readable, or remove it") from None
    return found


def published(folder: epath.Path, config: ModelConfig, dtype: str, origin: dict) -> dict[str, bytes]:
    """Those of a model in the checkpoint `folder`: what it came with, or made for it. `origin`: its old config.json."""
    tokenizer_file = find_tokenizer(folder)
    files = read(tokenizer_file.parent if tokenizer_file else run_folder(folder))
    ids = {name: origin[name] for name in IDS if name in origin}
    if tokenizer_file:
        tokenizer = Tokenizer.load(tokenizer_file)
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos} | ids
        if TOKENIZER_CONFIG not in files:
            files |= _described(files[TOKENIZER], tokenizer, config.max_length)
    files.setdefault("generation_config.json", _text({"_from_model_config": True, **ids}))
    return files | {"config.json": _text(published_config(config, dtype, **ids))}


def _described(text: bytes, tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """The files of a tokenizer trained here, for others, who put BOS and write conversations as these files tell."""
    bos, eos = tokenizer.names
    document = json.loads(text)
    if document.get("post_processor") is None:
        marks = [{"SpecialToken": {"id": bos, "type_id": i}} for i in range(2)]
        texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [marks[0], texts[0]],
            "pair": [marks[0], texts[0], marks[1], texts[1]],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        }
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "chat_template": TEMPLATE}
    return {TOKENIZER: _text(document), TOKENIZER_CONFIG: _text(options | names)}


def _text(document: dict) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
