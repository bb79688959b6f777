"""Start one command as several processes on this machine, to try a multi-host run: --process=0, --process=1, ...

When one of them ends with an error, the others are stopped and it is said which one it was. Ctrl-C and SIGTERM are
passed on to all, which then save and end.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

STOPPED = 128 + signal.SIGTERM  # saved and stopped by a signal
MISTAKEN = 2  # a flag or a setting is wrong
EXAMPLE = """\
example, two processes of two virtual CPU devices each:
  python experiments/launch/local.py --processes=2 --cpu_devices=2 -- \\
      python experiments/pretrain.py --config=experiments/configs/quickstart.py --workdir=runs/two \\
      --config.mesh=fsdp=rest
"""


def arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--cpu_devices", type=int, metavar="N", help="run on CPU, with so many devices in each process")
    parser.add_argument("--grace", type=float, default=15, metavar="S", help="for the others to end by themselves")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: a program that takes the process flags")
    found = parser.parse_args()
    found.command = found.command[1:] if found.command[:1] == ["--"] else found.command
    if not found.command or found.processes < 1:
        parser.error("write the command after --, and --processes=1 or more")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(flags: argparse.Namespace) -> list[subprocess.Popen]:
    environment = dict(os.environ)
    if flags.cpu_devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(flags.cpu_devices)}
    common = [*flags.command, f"--coordinator=localhost:{free_port()}", f"--processes={flags.processes}"]
    return [subprocess.Popen([*common, f"--process={i}"], env=environment) for i in range(flags.processes)]


def wait(children: list[subprocess.Popen], seconds: float) -> bool:
    """Until all have ended; False after so many seconds."""
    end = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.1)
    return all(child.poll() is not None for child in children)


def watch(children: list[subprocess.Popen], grace: float) -> int:
    """0 when all have ended well, or saved and stopped as they were asked to; 1, and a message, when one has not."""
    while True:
        codes = [child.poll() for child in children]
        failed = [i for i, code in enumerate(codes) if code not in (None, 0, STOPPED)]
        if failed:
            break
        if None not in codes:
            return 0
        time.sleep(0.1)
    wait(children, grace)
    # A process whose peer was killed ends too, with an exit code or aborted by the runtime, perhaps before the next
    # look: the killed one is to be named.
    killed = [i for i, child in enumerate(children) if (child.poll() or 0) < 0 and child.returncode != -signal.SIGABRT]
    first = (killed or failed)[0]
    code = children[first].returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    for child in children:
        if child.poll() is None:
            child.kill()
    wait(children, grace)
    advice = "" if code == MISTAKEN else " The same command goes on from its last checkpoint."
    print(f"local.py: error: process {first} of {len(children)} {how}; the job was ended.{advice}", file=sys.stderr)
    return 1


def main() -> int:
    flags = arguments()
    children = start(flags)

    def forward(number, _):
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the children too
    return watch(children, flags.grace)


if __name__ == "__main__":
    sys.exit(main())
