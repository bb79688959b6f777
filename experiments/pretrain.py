"""Pre-train a DeepSeek-V2 shaped model: data, training, held-out evaluation, checkpoints, metrics, a report with plots.

Everything of the run but its place is in --config. A run folder that already holds a checkpoint is resumed, with the
same config, exactly where it stopped. One of several processes that a signal stops early ends with exit code 143, once
it has saved, so that what started it starts it again.
"""

import argparse

import common


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    example = "python experiments/pretrain.py --config=experiments/configs/quickstart.py --workdir=runs/first"
    parser = common.argument_parser(f"{__doc__}\n{common.OVERRIDES}", f"{example} --config.train.steps=100")
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment, a .py or .json file")
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="the run folder: made, or resumed")
    common.add_process_flags(parser)
    return common.parse_arguments(parser, argv)


def main() -> int:
    arguments = parse()
    config = common.load_config(arguments.config, arguments.overrides)
    common.start_processes(arguments)
    result = common.train(config, arguments.workdir)

    import jax

    from dsv2_jax.train.report import write_report

    if jax.process_index() == 0:
        print(f"report: {write_report(arguments.workdir)}")
    return common.exit_code(arguments, config, result)


if __name__ == "__main__":
    common.run(main)
