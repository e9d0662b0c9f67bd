"""TensorRT-LLM as far as this program can tell: scripts that write down how they were called and leave files."""

import json
import sys
from pathlib import Path

SCRIPT = """#!{python}
import json, os, sys
from pathlib import Path

name, words = Path(sys.argv[0]).name, sys.argv[1:]
with open({calls!r}, "a") as stream:
    stream.write(json.dumps([name, *words]) + "\\n")
print(name, "says hello")
if name in {failing!r}:
    sys.exit(7)
options = {{word: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}}
out = Path(options.get("--output_dir") or options["--output-model-dir"])
out.mkdir(parents=True, exist_ok=True)
(out / "config.json").write_text("{{}}")
kind, bits = ("engine", 300) if name == "trtllm-build" else ("safetensors", 200)
if kind == "engine":
    assert (Path(options["--checkpoint_dir"]) / "config.json").is_file()
    Path("model.cache").write_text("the builder leaves this in its working folder")
for rank in range(int(options.get("--tp_size", 1))):
    (out / f"rank{{rank}}.{{kind}}").write_bytes(bytes(bits))
"""


def install(folder: Path, *, failing: tuple[str, ...] = ()) -> Path:
    """Put trtllm-build and python into ``folder/bin`` and the scripts into ``folder/examples``; returns ``folder/bin``."""
    text = SCRIPT.format(python=sys.executable, calls=str(folder / "calls.jsonl"), failing=failing)
    executable(folder / "bin" / "trtllm-build", text)
    executable(folder / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for script in ("quantization/quantize.py", "llama/convert_checkpoint.py"):
        executable(folder / "examples" / script, text)
    (folder / "examples" / "run.py").write_text("import utils\n")
    (folder / "examples" / "utils.py").write_text("")
    return folder / "bin"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[list[str]]:
    """How the programs were called, in order: name and arguments; emptied by reading."""
    path = folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]
