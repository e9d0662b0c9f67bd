"""Peak memory of an AQLM calibration for models of 4 and 24 equal blocks: it must not depend on their number.

python -m tests.benchmarks.aqlm_memory [--hidden 768]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.models import save_family
from tests.unit.algorithms.quantization.aqlm.test_plugin import MEASURE


def main() -> None:
    """Print the peak resident memory of each calibration, interpreter and libraries included, and the size of the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    hidden = parser.parse_args().hidden
    for blocks in (4, 24):
        with tempfile.TemporaryDirectory() as folder:
            save_family(Path(folder) / "m", "llama", blocks=blocks, hidden=hidden)
            size = (Path(folder) / "m" / "model.safetensors").stat().st_size
            command = [sys.executable, "-c", MEASURE, str(Path(folder) / "m")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks = [int(word) / 1e6 for word in done.stdout.split()]
            figures = f"peak {peaks[3]:.0f} MB after block 4, {peaks[-1]:.0f} MB after block {blocks}"
            sys.stdout.write(f"{blocks} blocks, weights {size / 1e6:.0f} MB in float32: {figures}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
