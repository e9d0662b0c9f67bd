"""Peak memory and time of scoring a model block by block, beside the same model held in memory.

python -m tests.benchmarks.scoring.block_by_block [--hidden 1024] [--blocks 24] [--tokens 16384]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.models import VOCABULARY, save_family

MEASURE = """
import sys, resource, time, torch
from pathlib import Path
from algorithms.modeling.evaluation.perplexity import perplexity
from algorithms.modeling.on_demand import resident, source_on_demand
from algorithms.modeling.source import ModelSource
torch.set_num_threads(1)
folder, tokens, vocabulary, held = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "held"
model = source_on_demand(ModelSource(folder))
model = resident(model) if held else model
text = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
before = time.process_time()
value = perplexity(model, text, 256).value
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(value, int(peak) * 1024, time.process_time() - before)
"""


def main() -> None:
    """Print perplexity, peak resident memory and CPU seconds of both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16384)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_family(Path(folder) / "m", "llama", blocks=given.blocks, hidden=given.hidden)
        size = (Path(folder) / "m" / "model.safetensors").stat().st_size
        sys.stdout.write(f"{given.blocks} blocks, weights {size / 1e6:.0f} MB in float32\n")
        for way in ("held", "block by block"):
            command = [sys.executable, "-c", MEASURE, str(Path(folder) / "m"), str(given.tokens), str(VOCABULARY), way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            value, peak, seconds = map(float, done.stdout.split())
            sys.stdout.write(f"{way}: perplexity {value:.6f}, peak {peak / 1e6:.0f} MB, {seconds:.1f} CPU s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
