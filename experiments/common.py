"""What the command lines of all scripts share: help, errors, configs and the compilation cache."""

import argparse
import difflib
import functools
import importlib.util
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable

from dsv2_jax import config_io
from dsv2_jax.config import ConfigError, DataError, ExperimentConfig, ModelConfig

OVERRIDES = """\
--config is a Python file whose get_config() returns an ml_collections.ConfigDict, or the config.json of an earlier run.
Any field of dsv2_jax/config.py may follow as --config.section.field=value:
  --config.train.steps=2000                         a number or text
  --config.data.sources.0.paths='a.txt,b/*.jsonl'   a tuple; sources.0 is the first source
  --config.train.optimizer.clip_norm=None           None switches a field or a section off
  --config.model.moe.dropping.capacity_factor=1.5   a field of a section that is off switches it on
  --config.mesh=fsdp=16,expert=8                    devices along data, fsdp, expert, tensor, context; one may be rest
"""

MODELS = "a run folder (its newest checkpoint), one checkpoint, a folder as released, or an id on the Hugging Face Hub"
STOPPED = 128 + 15  # the exit code of a program that SIGTERM has ended
COPIES = 4 * 2**30  # bytes that the training states of all CPU devices may take, where nobody has asked for them
DECODING = 8  # cores that decode together: with more of them, more of a small model's step is waiting for the others
WAITING = 50e-6  # seconds for which two cores wait for each other at a sum over both
CPUINFO = pathlib.Path("/proc/cpuinfo")  # on Linux: what the cores can do
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


def argument_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose --help shows `description` (a script's docstring), the flags, and `example`."""
    layout, epilog = argparse.RawDescriptionHelpFormatter, f"example:\n  {example}"
    return argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=layout, allow_abbrev=False)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `start_processes` reads: how several processes, one on each host, find each other."""
    group = parser.add_argument_group("several hosts", "the same command on each; they share the folder")
    add = group.add_argument
    add("--distributed", action="store_true", help="find the other processes from Slurm, GKE, a TPU pod or Open MPI")
    add("--coordinator", metavar="HOST:PORT", help="or name the first process's address, a port that is free there")
    add("--processes", type=int, metavar="N", help="and how many there are")
    add("--process", type=int, metavar="I", help="and which this one is, from 0")
    add("--heartbeat", type=int, default=100, metavar="S", help="seconds after which a silent process counts as dead")


def start_processes(arguments: argparse.Namespace) -> None:
    """Join the other processes as the flags say; call it before JAX is used. Without flags this one is alone."""
    explicit = {name: getattr(arguments, name) for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in explicit.items() if value is None]
    if len(missing) == 3 and not arguments.distributed:
        return
    if arguments.distributed and len(missing) < 3:
        raise ConfigError("--distributed finds the processes itself: leave out --coordinator, --processes, --process")
    if not arguments.distributed and missing:
        raise ConfigError(f"--coordinator, --processes and --process go together; missing: {', '.join(missing)}")
    import jax

    place = (arguments.coordinator, arguments.processes, arguments.process)
    times = {"heartbeat_timeout_seconds": arguments.heartbeat, "shutdown_timeout_seconds": arguments.heartbeat}
    try:
        jax.distributed.initialize(*place, **times)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{_script()}: error: the processes did not find each other: {str(error).splitlines()[0]}")


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, fields: tuple[str, ...] | None = None
) -> argparse.Namespace:
    """The flags of `parser`, and `overrides`, the (field, text) pairs of --config.field=text.

    Any field may be overridden if the parser has --config; else those of `fields`, and what is in them.
    """
    arguments, rest = parser.parse_known_args(argv)
    known = [f"--{name}" for name in vars(arguments)] + [f"--config.{field}" for field in fields or ()]
    arguments.overrides = []
    for argument in rest:
        flag, equals, text = argument.partition("=")
        allowed = "--config" in known or any(f"{flag}.".startswith(f"--config.{field}.") for field in fields or ())
        if flag.startswith("--config.") and allowed:
            if not equals:
                parser.error(f"{flag} has no value: write {flag}=VALUE")
            arguments.overrides.append((flag.removeprefix("--config."), text))
            continue
        near = difflib.get_close_matches(flag, known, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists the flags there are"
        parser.error(f"unknown argument {argument!r}; {advice}")
    return arguments


def load_config(path: str, overrides=(), *, model_only: bool = False) -> ExperimentConfig | ModelConfig:
    """What the file at `path` describes, with (field, text) `overrides`, checked; or its model alone."""
    mapping = _read_config(pathlib.Path(path))
    try:
        for field, text in overrides:
            mapping = config_io.override(ExperimentConfig, mapping, field, text)
        if model_only:
            return config_io.parse(ModelConfig, mapping.get("model"), "model")
        return config_io.parse(ExperimentConfig, mapping)
    except ConfigError as error:
        field = re.match(r"[\w.]+(?=[=:])", str(error))
        hint = f" (set it with --config.{field[0]}=...)" if field and "is not a field" not in str(error) else ""
        raise ConfigError(f"{error}{hint}") from None


def _read_config(path: pathlib.Path) -> dict:
    if not path.is_file():
        here = pathlib.Path(__file__).parent / "configs"
        near = difflib.get_close_matches(path.stem, [file.stem for file in here.glob("*.py")], n=1)
        advice = f"did you mean {here / near[0]}.py?" if near else f"configs are in {here}"
        raise ConfigError(f"--config={path}: there is no such file; {advice}")
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"--config={path}: is not JSON ({error})") from None
    spec = importlib.util.spec_from_file_location("config_file", path)
    if path.suffix != ".py" or spec is None:
        raise ConfigError(f"--config={path}: must be a .py or .json file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={path}: has no function get_config()")
    return module.get_config().to_dict()


def train(config: ExperimentConfig, workdir: str) -> dict:
    """`dsv2_jax.train.loop.train`; what ends a run early becomes one line and exit code 1."""
    from dsv2_jax.checkpoint import CheckpointError  # imports JAX: only once the command line is known to be right
    from dsv2_jax.train import loop

    try:
        return loop.train(config, workdir, mesh=mesh_of_cores(config))
    except (CheckpointError, DataError, OSError, loop.TrainingFailed) as error:
        sys.exit(f"{_script()}: error: {error}")


def mesh_of_cores(config: ExperimentConfig):
    """A mesh of this machine's CPU cores, for a config that names no mesh; None: one device, such as an accelerator.

    XLA runs few of a small model's operations on more than one core. As devices, each with a copy of the model and its
    share of the rows, all cores work all the time. There are as many as share the rows evenly and whose copies of the
    training state take at most COPIES bytes; JAX_NUM_CPU_DEVICES=1 leaves it at one. Call it before JAX is used.
    """
    import jax

    from dsv2_jax.train.state import abstract_state

    if config.mesh is not None or jax.distributed.is_initialized():
        return None
    rows = config.train.microbatch_size or config.train.batch_size
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(config)))
    return _cores_along("data", lambda n: rows % n == 0 and n * size <= COPIES)


def mesh_to_decode(model: ModelConfig, rows: int = 1):
    """The same for a model that continues `rows` texts at once, split along `tensor`: each core reads its share."""
    import jax

    from dsv2_jax import sharding
    from dsv2_jax.model.counting import abstract_model

    abstract = abstract_model(model)

    def fits(n: int) -> bool:
        sizes = [n if axis == "tensor" else 1 for axis in sharding.MESH_AXES]
        mesh = jax.sharding.AbstractMesh(tuple(sizes), sharding.MESH_AXES)
        try:
            sharding.check_mesh(mesh, model)
            sharding.tree_shardings(abstract, mesh)
        except ConfigError:
            return False
        return n <= DECODING and (rows > 1 or _sharing_pays(model))

    return _cores_along("tensor", fits)


def dtype_of_cores(dtype: str, rows: int) -> str:
    """`dtype`, but bfloat16 for float32 on a CPU that multiplies it at twice the rate (AVX-512 BF16).

    Not of a single row: XLA multiplies a vector in float32, and would keep the weights in both. This starts JAX: call
    it after what chooses the devices.
    """
    import jax

    flags = CPUINFO.read_text().split() if CPUINFO.exists() else []
    faster = rows > 1 and "avx512_bf16" in flags and jax.default_backend() == "cpu"
    return "bfloat16" if dtype == "float32" and faster else dtype


@functools.cache
def _sharing_pays(model: ModelConfig) -> bool:
    """Whether two cores save more than their waits cost, of one row: its step takes as long as reading the weights.

    How fast a core reads as many bytes is measured: caches hold the weights of a small model, or not, as it turns out.
    """
    import jax.numpy as jnp
    import numpy as np

    from dsv2_jax.model.counting import parameters

    size = parameters(model).active_in_matmuls * jnp.dtype(model.compute.dtype).itemsize
    sample = np.ones(min(size, 2**28) // 4, np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        sample.max()
        seconds.append(time.perf_counter() - start)
    waits = 2 * model.layers + 2  # for the embedding, each attention and FFN, and the likeliest token
    return size / sample.nbytes * statistics.median(seconds) / 2 > waits * WAITING


def _cores_along(axis: str, fits: Callable[[int], bool]):
    """A mesh of the most CPU cores that fit along `axis`; None where it is one, or the user has chosen devices."""
    import jax

    from dsv2_jax import sharding

    if jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(n for n in range(1, cores + 1) if n == 1 or fits(n))
    if devices == 1:
        return None
    jax.config.update("jax_num_cpu_devices", devices)
    return sharding.make_mesh(f"{axis}={devices}") if jax.default_backend() == "cpu" else None


def exit_code(arguments: argparse.Namespace, config: ExperimentConfig, result: dict) -> int:
    """0; or STOPPED where a signal stopped a run of several processes early: a scheduler is to start it again."""
    several = arguments.distributed or arguments.coordinator is not None
    return STOPPED if several and result["step"] < config.train.steps else 0


def make_mesh(overrides):
    """The mesh of the last --config.mesh, None without one."""
    from dsv2_jax import sharding

    return sharding.make_mesh(overrides[-1][1]) if overrides else None


def open_model(path: str, dtype: str | None, tokenizer: str | None, mesh):
    """The model of what --checkpoint names, ready to compute on `mesh` (None: one device), and its tokenizer."""
    from dsv2_jax.checkpoint import CheckpointError
    from dsv2_jax.hf.pretrained import from_pretrained, load_tokenizer
    from dsv2_jax.hf.safetensors import FolderError

    try:
        model, found = from_pretrained(path, mesh=mesh, dtype=dtype)
    except (CheckpointError, ConfigError, FolderError) as error:
        if str(error).startswith("mesh"):
            raise
        nothing = "no such folder" in str(error) or "no checkpoint here" in str(error)
        advice = "; train one with: python experiments/quickstart.py" if nothing else ""
        raise ConfigError(f"--checkpoint: {error}{advice}") from None
    if tokenizer is None and found is None:
        raise ConfigError(f"--checkpoint={path}: there is no tokenizer.json with it; name one with --tokenizer=FILE")
    if tokenizer is not None and not os.path.isfile(tokenizer):
        raise ConfigError(f"--tokenizer={tokenizer}: there is no such file")
    return model, load_tokenizer(tokenizer, model.config.vocab_size) if tokenizer else found


def use_compilation_cache() -> None:
    """Keep what JAX compiles in the user's cache folder; JAX's own variables override it. Call it before JAX starts."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(base, "dsv2_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def keep_memory() -> None:
    """Start this script again with an allocator that keeps its memory (Linux; a GLIBC_TUNABLES of your own stays).

    JAX on CPUs asks for a step's working memory anew every step. By default the C library gives it back each time, and
    the system clears every page again: a sixth of a small model's training step. Huge pages make the rest cheaper.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave with its exit code; a `ConfigError` becomes one line and exit code 2."""
    keep_memory()
    use_compilation_cache()
    try:
        sys.exit(main())
    except ConfigError as error:
        print(f"{_script()}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _script() -> str:
    return pathlib.Path(sys.argv[0]).name
