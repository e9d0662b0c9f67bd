"""Stands for the client of a format: ``python -m tests.support.stub_client BEHAVIOUR FORMAT DIRECTORY TOKENS OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file  # numpy, since torch takes two seconds to import

NEW_TOKENS = 4


def main(behaviour: str, name: str, directory: str, tokens_file: str, out: str) -> int:
    if behaviour == "absent" or behaviour == f"absent:{name}":
        sys.stderr.write("pip install the-client\n")
        return 3
    if behaviour == "crash":
        sys.stderr.write("the client cannot read this\n")
        return 1
    if behaviour == "silent":
        return 0
    assert (Path(directory) / "config.json").is_file(), "a client needs the config"
    table = load_file(str(Path(directory) / "model.safetensors"))["table"]
    tokens = load_file(tokens_file)["tokens"]
    logits = table[tokens].astype(np.float32)
    if behaviour == "wrong" or behaviour == f"wrong:{name}":
        logits[0, 0, 0] += 0.1
    if behaviour == "nan":
        logits[0, 0, 0] = float("nan")
    last, greedy = tokens[:, -1], []
    for _ in range(NEW_TOKENS):
        last = table[last].argmax(-1)
        greedy.append(last)
    save_file({"logits": logits, "greedy": np.stack(greedy, axis=1)}, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
