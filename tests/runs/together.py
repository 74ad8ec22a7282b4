"""``esper fit`` several times at the same instant: one process imports, then forks them all.

Called as ``together.py FOLDER COUNT ROUNDS [ARGUMENT ...]``; prints each run's exit status.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from esper_lightning.cli.lightning_cli import prepare

SMALL = ["--model.total_env_steps", "2048", "--model.ppo.rollout_steps", "32"]
ENVS = ["--model.env", "CartPole", "--model.env.num_envs", "16"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]


def child(gate: int, number: int, arguments: list[str]) -> None:
    os.read(gate, 1)  # closed for all at once
    status = 1
    try:
        with Path(f"out{number}.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare(["fit", "--model.seed", str(number), *ENVS, *SMALL, *QUIET, *arguments])()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main() -> None:
    folder, count, rounds, *arguments = sys.argv[1:]
    os.chdir(folder)
    for turn in range(int(rounds)):
        gate, opens = os.pipe()
        pids = []
        for k in range(int(count)):
            pid = os.fork()
            if pid == 0:
                os.close(opens)
                child(gate, turn * int(count) + k, arguments)
            pids.append(pid)
        os.close(gate)
        os.close(opens)
        print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)


if __name__ == "__main__":
    main()
