"""Bitpress: compress language models from YAML recipes.

python main.py --yaml_path examples/quickstart/recipe.yaml
python main.py plan --yaml_path recipe.yaml llm.AQLM.calibration_config.nsamples=256
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from configs.errors import CertificateError, DataError, ExitCode, MemoryShortageError, MissingEnvironmentError, RecipeError
from jobs.command_line.arguments import parse_arguments
from jobs.command_line.commands import perform
from jobs.execution.interruption import interruptible

EXIT_CODES: Mapping[type[Exception], ExitCode] = {
    RecipeError: ExitCode.RECIPE,
    DataError: ExitCode.RECIPE,
    MissingEnvironmentError: ExitCode.ENVIRONMENT,
    MemoryShortageError: ExitCode.OUT_OF_MEMORY,
    CertificateError: ExitCode.CERTIFICATE,
}


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Run the command line ``argv`` (this process's own by default).

    Returns:
        The exit code. An error that no user caused is not caught: its traceback is what helps, and Python exits with 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Threads that spin while they wait slow a busy machine a hundredfold; OpenMP reads this when torch is imported, later on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = parse_arguments(argv)
    try:
        with interruptible():
            perform(arguments)
    except tuple(EXIT_CODES) as error:
        sys.stderr.write(f"{error}\n")
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        command = shlex.join(["python", "main.py", *argv])
        sys.stderr.write(f"\nInterrupted; what is finished is kept. To resume: {command}\n")
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
