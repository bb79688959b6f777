"""Measure a trained or released model on text it has not learnt: loss in nats a token, and bits per byte.

--data names files as training reads them: text, JSONL, Parquet, ArrayRecord. Documents are packed into rows, each seen
apart from its neighbours. --config.mesh=fsdp=8 spreads the model over devices (all five axes).
"""

import functools
import itertools
import json
import time

import common
from dsv2_jax.config import DTYPES, ConfigError, DataError, SourceConfig


def arguments():
    example = "python experiments/evaluate.py --checkpoint=runs/quickstart --data='notes/**/*.md'"
    parser = common.argument_parser(__doc__, example)
    add = functools.partial(parser.add_argument, metavar="N")
    add("--checkpoint", required=True, metavar="FOLDER", help=common.MODELS)
    add("--data", required=True, metavar="GLOBS", help="files or globs, with commas; stdlib: Python's own library")
    add("--text_field", default="text", metavar="NAME", help="JSONL key or Parquet column; default: text")
    add("--seq", type=int, default=1024, metavar="T", help="tokens a row; default: 1024")
    add("--batch", type=int, default=8, metavar="B", help="rows computed at once; default: 8")
    add("--batches", type=int, help="only the first N; default: all the text")
    add("--dtype", choices=DTYPES, metavar="|".join(DTYPES), help="of weights and activations; default: as trained")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default: the one of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = common.parse_arguments(parser, fields=("mesh",))
    for name in ("seq", "batch", "batches"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name} must be positive")
    return flags


def read_batches(source: SourceConfig, tokenizer, rows: int, length: int):
    """Packed batches [rows, length] of all documents of `source`; the last ends in rows of padding."""
    import numpy as np

    from dsv2_jax.data.packing import pack, to_batch
    from dsv2_jax.data.sources import Malformed, iter_records

    def documents():
        for record in iter_records(source):
            if isinstance(record, Malformed):
                raise ConfigError(f"--data: {record.where}: {record.error}; mend the line or leave the file out")
            yield np.array(tokenizer.encode_document(record.text), np.int32)

    sizes_V, padding = tokenizer.token_bytes(), np.zeros((4, length), np.int32)
    packed = (row_4T for row_4T, _, _ in pack(documents(), length))
    while held := list(itertools.islice(packed, rows)):
        yield to_batch(held + [padding] * (rows - len(held)), sizes_V)


def main() -> None:
    flags = arguments()
    import tqdm

    from dsv2_jax import sharding
    from dsv2_jax.data.sources import expand
    from dsv2_jax.train.loop import evaluate
    from dsv2_jax.train.placing import Placing

    source = SourceConfig(name="data", paths=tuple(flags.data.split(",")), text_field=flags.text_field)
    expand(source)  # files that are not there are an error before the model is read
    mesh = common.make_mesh(flags.overrides)
    if mesh is not None:
        sharding.check_batch(mesh, flags.batch, flags.seq)
    model, tokenizer = common.open_model(flags.checkpoint, flags.dtype, flags.tokenizer, mesh)
    if mesh is not None:
        sharding.check_mesh(mesh, model.config)
    batches = itertools.islice(read_batches(source, tokenizer, flags.batch, flags.seq), flags.batches)
    placing, tokens, start = Placing(mesh, flags.batch), 0, time.perf_counter()

    def put(batch):
        nonlocal tokens
        tokens += int(batch.weights_BT.sum())
        return placing.put(batch)

    try:
        with sharding.use(mesh):
            shown = tqdm.tqdm(batches, unit="batch", total=flags.batches, leave=False)
            found = evaluate(model, map(put, shown), empty="--data: the files hold no text")
    except DataError as error:
        raise ConfigError(f"--data: {error}") from None
    rate = tokens / (time.perf_counter() - start)
    result = {name.removeprefix("held_out/"): value for name, value in found.items()} | {"tokens": tokens}
    if flags.json:
        print(json.dumps(result | {"tokens_per_second": rate}))
        return
    print(f"{tokens:,} tokens, {result['bytes']:,.0f} bytes, {rate:,.0f} tokens/s")
    print(f"loss: {result['loss']:.4f} nats a token")
    print(f"bits per byte: {result['bits_per_byte']:.4f}")


if __name__ == "__main__":
    common.run(main)
