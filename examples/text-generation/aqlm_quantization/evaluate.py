"""Score a base model and what has become of it; takes the options of ``python main.py evaluate``, which does the work.

python examples/text-generation/aqlm_quantization/evaluate.py --base_model meta-llama/Meta-Llama-3-8B-Instruct \
    --quantized_model user_data/jobs/Kompress/aqlm_quantization/tmp/caliberation/ --tasks "gsm8k:5,gptq_wikitext:0" \
    --results user_data/evals/llama3 --cache_dir user_data/.cache
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from main import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
