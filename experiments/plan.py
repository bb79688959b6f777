"""Tell what a run needs before anyone rents a machine: memory, traffic, FLOPs, and the utilisation they allow.

The real training step (with --decode the decoding step) is compiled ahead of time for the chips of --topology, none of
which need be there: TPUs need the extra [tpu]. For GPUs, and with --analytic, all is told from shapes and shardings.
"""

import json
import os

import common
from dsv2_jax import presets
from dsv2_jax.config import ConfigError

GB = 1e9
# The compiler for TPUs must not look for any, and may run beside a program that uses one. What it compiles for absent
# chips cannot be read back from the compilation cache.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ENVIRONMENT |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
COMPILED_BEST = 3  # meshes that --search compiles
SHOWN = 12  # meshes that it lists
LISTED = 8  # temporaries
REPORTED = {"v2": 172.8e3, "dense_67b": 300.6e3}  # H800 hours per trillion tokens (report, section 3.2.3)


def main(argv: list[str] | None = None) -> None:
    parser = common.argument_parser(
        __doc__, "python experiments/plan.py --preset=v2 --topology=v5p:4x4x8 --mesh=fsdp=16,expert=8"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets.MODELS)}")
    which.add_argument("--config", metavar="FILE", help="an experiment: its model and sequence length, not its batch")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5p:4x4x8, v5e:4x8, h800:8x256 ...")
    parser.add_argument("--mesh", metavar="AXES", help="such as fsdp=16,expert=8; one axis may be `rest`")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank the meshes of data, fsdp, expert and tensor (never context), and compile the best three",
    )
    parser.add_argument(
        "--seq", type=int, metavar="T", help="tokens a sequence, or of the cache (at most 4096, or the config's)"
    )
    parser.add_argument(
        "--batch-per-device",
        type=int,
        default=1,
        metavar="B",
        help="sequences computed at once for each member of data x fsdp x expert (default: %(default)s)",
    )
    parser.add_argument(
        "--microbatches",
        type=int,
        default=1,
        metavar="M",
        help="of so many sequences each, their gradients added up, in a training step (default: %(default)s)",
    )
    parser.add_argument("--remat", choices=["none", "dots", "full"], help="(default: the model's)")
    parser.add_argument("--decode", action="store_true", help="the decoding step, not the training step")
    parser.add_argument("--analytic", action="store_true", help="compile nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = common.parse_arguments(parser, argv)
    for name in ("seq", "batch_per_device", "microbatches"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if bool(arguments.mesh) == arguments.search:
        parser.error("give either --mesh=... or --search")
    if arguments.decode and arguments.microbatches > 1:
        parser.error("--microbatches divides a training step; a decoding step has none")
    if arguments.search and arguments.decode:
        parser.error("--search ranks training steps; give --decode a --mesh")
    if arguments.preset and arguments.overrides:
        raise ConfigError(f"--config.{arguments.overrides[0][0]} needs a --config=FILE that it changes")
    if any(field == "mesh" for field, _ in arguments.overrides):
        raise ConfigError("--config.mesh: a plan takes its mesh from --mesh=AXES, or tries many with --search")
    os.environ.update(ENVIRONMENT)

    from dsv2_jax import sharding
    from dsv2_jax.planning import hardware, plan
    from dsv2_jax.planning.analytic import Job

    model, length = _model(arguments)
    topology = hardware.parse_topology(arguments.topology)
    compiling = not arguments.analytic
    if compiling and plan.can_compile(topology):
        plan.topology_devices(topology)  # what is missing or misspelt shows before anything long
    if not arguments.search:
        mesh = sharding.parse_mesh(arguments.mesh).resolve(topology.devices)
        job = Job(model, mesh, length, arguments.batch_per_device, arguments.microbatches)
        made = plan.make_plan(job, topology, decoding=arguments.decode, compiling=compiling)
        print(json.dumps(made.to_dict()) if arguments.json else text(made, arguments.preset))
        return
    sizes = length, arguments.batch_per_device, arguments.microbatches
    order = plan.ranked(plan.meshes(model, topology, *sizes), topology)
    best = [plan.make_plan(one.job, topology, compiling=compiling) for one in order[:COMPILED_BEST]]
    if arguments.json:
        print(json.dumps({"ranked": [one.to_dict() for one in order], "best": [one.to_dict() for one in best]}))
        return
    print(ranking(order))
    print("\n\n".join(["", *(text(one, arguments.preset) for one in best)]))


def _model(arguments):
    """The model asked for and its sequence length."""
    import dataclasses

    if arguments.preset:
        model = presets.get(arguments.preset)
        length = min(4096, model.max_length)
    else:
        config = common.load_config(arguments.config, [("data.sources.0.paths", "unread"), *arguments.overrides])
        model, length = config.model, config.train.sequence_length
    if arguments.remat:
        model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, remat=arguments.remat))
    length = arguments.seq or length
    if length > model.max_length:
        raise ConfigError(f"--seq={length}: must not exceed the model's max_length={model.max_length}")
    return model, length


def text(plan, preset: str | None = None) -> str:
    """A plan as a page."""
    job, chip, estimate = plan.job, plan.topology.chip, plan.estimate
    pieces = "one microbatch" if job.microbatches == 1 else f"{job.microbatches} microbatches"
    what = f"a cache of {job.length} tokens" if plan.decoding else f"{job.length} tokens, {pieces}"
    lines = [
        f"{'decoding' if plan.decoding else 'training'} step on {plan.topology} ({job.devices} devices), "
        f"mesh {job.mesh}, {job.batch} sequences of {what}"
    ]
    if plan.compiled:
        lines.append(f"compiled in {plan.compiled.seconds:.0f} s")
    else:
        lines.append(f"not compiled: {plan.not_compiled}")
    total = sum(plan.memory.values())
    lines += ["", f"{'memory of one device':<34}{'GB':>10}{'analytic':>12}"]
    for name in plan.memory | estimate.memory:
        have, expected = plan.memory.get(name), estimate.memory.get(name)
        lines.append(f"  {name:<32}{_gb(have):>10}{_gb(expected):>12}")
    lines.append(f"  {'all':<32}{_gb(total):>10}{_gb(estimate.total_bytes):>12}")
    if plan.compiled:
        lines.append(f"  {'placed, with gaps':<32}{_gb(plan.compiled.placed):>10}")
        lines.append(f"  {'bound, gaps more than once':<32}{_gb(plan.compiled.bound):>10}")
    fits = "fits" if total <= chip.hbm_bytes else "DOES NOT FIT"
    lines.append(f"  of {chip.hbm_bytes / GB:.1f} GB, {total / chip.hbm_bytes:.0%}: {fits}")
    if plan.compiled and plan.compiled.largest:
        lines += ["", "largest temporaries where memory is fullest"]
        for one in plan.compiled.largest[:LISTED]:
            lines.append(f"  {one.shape!s:<32}{_gb(one.nbytes):>10}  {_short(one.source)}")
    lines += ["", *_traffic(plan), "", *_compute(plan)]
    if plan.transport:
        lines += ["", f"{'rows to experts':<34}{'a token':>10}{'GB':>12}{'ms, unhidden':>16}"]
        for name, row in estimate.transports.items():
            unhidden = f"{1e3 * row['visible_seconds']:.1f}"
            lines.append(f"  {name:<32}{row['rows_per_token']:>10.2f}{row['bytes'] / GB:>12.2f}{unhidden:>16}")
        lines.append(f"  cheaper here: {plan.transport}")
    hours = f"{plan.device_hours:,.0f} at that bound, {plan.unhidden_device_hours:,.0f} with nothing hidden"
    lines += ["", f"device-hours per trillion tokens: {hours}"]
    if preset in REPORTED and not plan.decoding:
        lines.append(f"  reported for this model: {REPORTED[preset]:,.0f} on H800 (DeepSeek-V2, section 3.2.3)")
    return "\n".join(lines)


def _short(source: str) -> str:
    """The last and telling part of where an array comes from."""
    parts = [part for part in source.split("/") if part not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(parts[-4:])


def _gb(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / GB:.2f}"


def _traffic(plan) -> list[str]:
    per_token = plan.tokens / plan.job.devices
    lines = [f"{'sent by one device in a step':<34}{'runs':>10}{'GB':>12}{'KB a token':>16}"]

    def row(name: str, runs: str, nbytes: float) -> str:
        return f"  {name:<32}{runs:>10}{nbytes / GB:>12.3f}{nbytes / per_token / 1e3:>16.1f}"

    if plan.compiled:
        for kind, values in plan.compiled.program.by_kind().items():
            lines.append(row(kind, str(values["count"]), values["wire_bytes"]))
        lines.append(row("all", "", plan.compiled.program.wire_bytes))
        if further := plan.compiled.program.further_wire_bytes:
            lines.append(row("more, in rounds if needed, each", "", further))
    if plan.estimate.traffic:
        lines += [row(f"least: {one.name}", "", one.nbytes) for one in plan.estimate.traffic]
        lines.append(row("least: all", "", plan.estimate.wire_bytes))
    if plan.compiled and plan.estimate.wire_bytes:
        lines.append(f"  sent / least: {plan.compiled.program.wire_bytes / plan.estimate.wire_bytes:.2f}")
    return lines


def _compute(plan) -> list[str]:
    flops, chip = plan.estimate.flops, plan.topology.chip
    lines = [
        f"{'FLOPs of one device in a step':<34}{'TFLOP':>10}",
        f"  {'of the model':<32}{flops['model'] / 1e12:>10.2f}",
    ]
    if not plan.decoding:
        lines.append(f"  {'with what is recomputed':<32}{flops['with_recomputation'] / 1e12:>10.2f}")
    if plan.compiled:
        read = plan.compiled.program
        where = "compiled, outside of kernels" if read.opaque else "in the compiled program"
        lines.append(f"  {where:<32}{read.flops / 1e12:>10.2f}")
        if read.opaque:
            names = ", ".join(f"{name} x{count}" for name, count in sorted(read.opaque.items()))
            lines.append(f"    not counted, as no kernel tells its own: {names}")
        if read.unknown_loops:
            lines.append(f"    loops whose length depends on the data count once: {len(set(read.unknown_loops))}")
    lines += ["", f"{'a step takes at least':<34}{'ms':>10}"]
    notes = {"compute": f"{chip.flops / 1e12:.0f} TFLOP/s", "hbm": f"{chip.hbm_bandwidth / 1e9:.0f} GB/s, estimated"}
    notes["network"] = f"{chip.network_bandwidth / 1e9:.0f} GB/s a device, one way"
    for name, seconds in plan.seconds.items():
        lines.append(f"  {name:<32}{1e3 * seconds:>10.1f}    at {notes[name]}")
    lines.append(f"  model FLOP utilisation of at most {plan.utilisation:.1%}   ({chip.name}: {chip.source})")
    return lines


def ranking(order) -> str:
    """Meshes, the best first."""
    head = f"{'mesh':<40}{'GB':>8}{'limited by':>12}{'utilisation':>14}{'hours/T':>12}{'nothing hidden':>16}"
    lines = [head]
    for one in order[:SHOWN]:
        slowest = max(one.seconds, key=one.seconds.get)
        fits = "" if one.estimate.total_bytes <= one.topology.chip.hbm_bytes else "  does not fit"
        lines.append(
            f"{one.job.mesh!s:<40}{one.estimate.total_bytes / GB:>8.1f}{slowest:>12}"
            f"{one.utilisation:>14.1%}{one.device_hours:>12,.0f}{one.unhidden_device_hours:>16,.0f}{fits}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
