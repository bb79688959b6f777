"""Turn a published DeepSeek-V2 folder into a checkpoint of ours (import), or a checkpoint into such a folder (export).

Either way one tensor at a time is in memory, whatever the model's size. A run that was stopped goes on where it was
when it is started again; until it is whole, nothing loads what it has written. An import first compares every file with
the SHA-256 that its download recorded, where it did. A checkpoint opens on any mesh; --config.mesh=fsdp=16,expert=8
names the one it is meant for, and the import ends at once, with what would do, where that cannot hold the model.
"""

import os
import pathlib
import re
import sys

import tqdm

import common
from dsv2_jax.config import DTYPES, ConfigError

EXAMPLES = """\
python experiments/convert.py import deepseek-ai/DeepSeek-V2-Lite models/lite      downloads it first
  python experiments/convert.py import downloads/DeepSeek-V2 models/v2 --dry-run        lists every tensor and problem
  python experiments/generate.py --checkpoint=models/lite --prompt='What is MLA?'
  python experiments/convert.py export runs/mine published/mine --shard-size=2GB        as published"""

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def arguments():
    parser = common.argument_parser(__doc__, EXAMPLES)
    add_command = parser.add_subparsers(dest="command", required=True, metavar="import|export").add_parser
    options = {"formatter_class": parser.formatter_class, "allow_abbrev": False}
    text = "Published folder to checkpoint."
    command = add_command("import", help=text, description=text, epilog=parser.epilog, **options)
    command.add_argument("src", metavar="SRC", help="a folder as published, or a Hub id: it is downloaded whole first")
    command.add_argument("dst", metavar="DST", help="a new folder, which generate.py and export open")
    dtypes, kept = "|".join(DTYPES), "bfloat16 where it is published so, else float32"
    command.add_argument("--dtype", choices=DTYPES, metavar=dtypes, help=f"of all weights; default: {kept}")
    _add_dry_run(command)
    text = "Checkpoint to published folder."
    command = add_command("export", help=text, description=text, epilog=parser.epilog, **options)
    command.add_argument("src", metavar="SRC", help="a run folder (its newest checkpoint) or one checkpoint")
    command.add_argument("dst", metavar="DST", help="a new folder, as published: transformers, vLLM load it")
    rounded = "default: bfloat16, to which what was trained here in float32 is rounded"
    command.add_argument("--dtype", choices=DTYPES, metavar=dtypes, default="bfloat16", help=rounded)
    command.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file, such as 500MB; default: 5GB")
    _add_dry_run(command)
    flags = common.parse_arguments(parser, fields=("mesh",))
    if flags.overrides and flags.command == "export":
        parser.error("--config.mesh: only an import takes one; a published folder is for no mesh")
    return flags


def _add_dry_run(command) -> None:
    command.add_argument("--dry-run", action="store_true", help="list every mapping and every problem, write nothing")


def size(text: str) -> int:
    """Bytes: "500MB" -> 500,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"--shard-size={text}: must be a positive number of KB, MB or GB, such as 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def check_mesh(text: str, folder: str) -> None:
    """Raise `ConfigError` where the model published in `folder` cannot lie on the mesh; no devices are needed."""
    import jax

    from dsv2_jax import sharding
    from dsv2_jax.hf import mapping
    from dsv2_jax.hf.config import model_config, read_json
    from dsv2_jax.hf.safetensors import Folder
    from dsv2_jax.model.counting import abstract_model

    shape = sharding.parse_mesh(text)
    if None in shape.sizes:
        shape = shape.resolve(jax.device_count())
    mesh = jax.sharding.AbstractMesh(shape.sizes, sharding.MESH_AXES)
    file = pathlib.Path(folder) / "config.json"
    model = model_config(read_json(file), str(file))
    sharding.check_mesh(mesh, model)
    mapping.check_size(model, Folder(folder))
    sharding.tree_shardings(abstract_model(model), mesh)


def convert(flags) -> int:
    from dsv2_jax.hf import convert, pretrained  # imports JAX: only once the command line is known to be right

    source = flags.src if flags.command == "export" else pretrained.local_folder(flags.src) or flags.src
    if flags.overrides:
        check_mesh(flags.overrides[-1][1], source)
    with tqdm.tqdm(unit="B", unit_scale=True, disable=flags.dry_run, desc=flags.command) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        options = {"dtype": flags.dtype, "dry_run": flags.dry_run, "progress": progress}
        if flags.command == "export":
            problems = convert.export_folder(source, flags.dst, shard_bytes=size(flags.shard_size), **options)
        else:
            problems = convert.import_folder(source, flags.dst, **options)
    if problems:
        raise ConfigError(f"{flags.src}: {len(problems)} problems\n  " + "\n  ".join(problems))
    return 0


def main() -> int:
    flags = arguments()
    if flags.command == "export":
        size(flags.shard_size)
        if "://" not in flags.src and not pathlib.Path(flags.src).is_dir():
            raise ConfigError(f"{flags.src}: there is no such folder")
    from dsv2_jax.checkpoint import CheckpointError
    from dsv2_jax.hf.safetensors import FolderError

    try:
        code = convert(flags)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # its reader has gone, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing it at exit fails again
        return 0 if flags.dry_run else 1
    except (CheckpointError, FolderError) as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    common.run(main)
