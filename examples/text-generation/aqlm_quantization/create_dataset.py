"""GSM8K with question and answer as one text a row, for DATA_PATH: ``user_data/datasets/gsm8k_restructured``.

python examples/text-generation/aqlm_quantization/create_dataset.py [--dataset openai/gsm8k] [--subname main] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main() -> int:
    """Make the data set; 0 where it worked, 2 where the data cannot be had."""
    sys.path.insert(0, str(ROOT))
    from configs.errors import DataError, ExitCode
    from jobs.texts.restructured import restructure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="openai/gsm8k", help="a name on the hub, a folder, or a .jsonl file")
    parser.add_argument("--subname", help="its configuration (main, for GSM8K on the hub)")
    parser.add_argument("--output", type=Path, default=Path("user_data/datasets/gsm8k_restructured"))
    parser.add_argument("--cache_dir", type=Path, default=Path("user_data/.cache"))
    given = parser.parse_args()
    subname = "main" if given.subname is None and given.dataset == "openai/gsm8k" else given.subname
    try:
        counts = restructure(given.dataset, subname, given.output, cache_dir=given.cache_dir)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return ExitCode.RECIPE
    sys.stdout.write(f"{given.output}: {', '.join(f'{split} {rows} rows' for split, rows in counts.items())}\n")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
