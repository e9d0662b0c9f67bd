"""Bitpress: compress language models from YAML recipes.

python main.py --yaml_path examples/quickstart/recipe.yaml
python main.py plan --yaml_path recipe.yaml llm.AQLM.calibration_config.nsamples=256
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.errors import EXIT_CODES, ExitCode, RankFailedError, exit_code, visible
from jobs.command_line.arguments import parse_arguments
from jobs.command_line.commands import perform
from jobs.execution.interruption import ignore_stops, interruptible
from jobs.processes.environment import end_with_launcher, is_follower, is_own_rank
from jobs.reporting.secrets import without_secrets
from jobs.reporting.streams import write_all

PROGRAM = Path(__file__).resolve()


def main(argv: Sequence[str] | None = None, *, program: Path = PROGRAM) -> ExitCode:
    """Run the command line ``argv`` (this process's own by default).

    Args:
        argv: the words after the program's name.
        program: the file that further processes of a job are started with.

    Returns:
        The exit code. An error that no user caused is not caught: its traceback is what helps, and Python exits with 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Threads that spin while they wait slow a busy machine a hundredfold; OpenMP reads this when torch is imported, later on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = replace(parse_arguments(argv), program=program)
    with interruptible():
        try:
            end_with_launcher()
            with interruptible():  # stopped once, nothing disturbs the last words
                perform(arguments)
        except (RankFailedError, *EXIT_CODES) as error:
            code = exit_code(error)
            # How a job on several processes was stopped is told once: by the process that started them, else by rank 0.
            told = code is ExitCode.INTERRUPTED and (is_own_rank() or is_follower())
            write_all(sys.stderr, "" if told else without_secrets(_last_words(error, argv), os.environ))
            return code
    return ExitCode.DONE


def _last_words(error: BaseException, argv: Sequence[str]) -> str:
    if isinstance(error, KeyboardInterrupt):
        return visible(f"\nInterrupted; what is finished is kept. To resume: {shlex.join(['python', 'main.py', *argv])}\n")
    return visible(f"{error}\n") if str(error) else ""


if __name__ == "__main__":
    code = main()
    ignore_stops()  # a second signal does not change how the command ended
    sys.exit(code)
