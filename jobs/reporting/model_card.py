"""README.md of the output: what the model is, what it lost, and how to load it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from jobs.reporting.card_header import Origin, card_header, results_of
from jobs.reporting.certificate import Verdict
from jobs.reporting.summary import FIGURE_COLUMNS, TASK_COLUMNS, Summary

NAME = "README.md"

# What a reader of each format needs beside transformers. A format that is not here loads with transformers alone.
_INSTALL = {
    "aqlm": "pip install aqlm",
    "compressed-tensors": "pip install compressed-tensors",
    "awq": "pip install gptqmodel",
    "gptq": "pip install gptqmodel",
    "auto-round": "pip install auto-round",
    "gguf": "pip install gguf",
    "peft": "pip install peft",
}


# The line that loads a format, where it is not plain from_pretrained on a folder.
_PLAIN = "model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)"
_LOADING = {
    "gguf": 'model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=dtype).to(device)',
    "ragged": "model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).to(device)",
    "spqr": "model = load_packed(Path(folder)).to(device)",
    "reallm": "model = load_packed(Path(folder)).to(device)",
    "peft": 'base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype)\n'
    "model = PeftModel.from_pretrained(base, folder).to(device)",
}
# transformers asks before it reads even the tokenizer of a folder with code in it.
_PLAIN_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(folder)"
_TOKENIZERS = {"ragged": "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)"}
_IMPORTS = {
    "spqr": ("from pathlib import Path", "from algorithms.formats.spqr.packed import load_packed  # of Bitpress"),
    "reallm": ("from pathlib import Path", "from algorithms.formats.reallm.packed import load_packed  # of Bitpress"),
    "peft": ("from peft import PeftModel",),
}
_NOTES = {
    "awq": "The layout is that of vLLM and of transformers with gptqmodel, by their sources; neither was run on this folder.",
    "gptq": "The layout is that of vLLM and of transformers with gptqmodel, by their sources; neither was run on this folder.",
    "compressed-tensors": "The layout is also vLLM's, by its source; vLLM was not run on this folder.",
    "gguf": "llama.cpp reads `model.gguf` too, where it holds a tokenizer; the job's log says if it does not.",
    "padded": "Every block is as wide as the widest one; where pruning took more of a block, it holds zeros.",
    "ragged": (
        "Every block has widths of its own, which no class of transformers has: `trust_remote_code=True` makes transformers "
        "run `modeling_ragged.py` of this folder, so read it first; it is short. Servers with their own models do not load it."
    ),
    "peft": "`base` holds the coded residuals alone, decoded: without the adapter it is no usable model.",
    "reallm": "transformers alone does not know this layout and would start from random weights.",
    "spqr": "transformers alone does not know this layout and would start from random weights.",
    "qserve": "QServe and SGLang read this folder, on CUDA; transformers does not. Neither was run on it.",
    "spqr-tiles": "The `spqr_quant` package reads these tensors, on CUDA in float16 alone; transformers 5 does not load them.",
    "tensorrt-llm": "The engines are for the kind of GPU and the release of TensorRT-LLM that built them, and for no others.",
}
# What runs a format that no Python library loads, in this folder; MODEL is the uncompressed model.
# Formats that transformers cannot load; what does is in the notes.
_FOR_OTHERS = ("qserve", "spqr-tiles")
_COMMANDS = {"tensorrt-llm": "python run.py --max_output_len 1000 --tokenizer_dir MODEL --engine_dir ."}


def model_card(
    summary: Summary,
    *,
    formats: tuple[str, ...],
    recipe: str,
    tags: tuple[str, ...],
    notes: tuple[str, ...],
    origin: Origin | None = None,
) -> str:
    """The model card as Markdown with its YAML header.

    Args:
        summary: the figures.
        formats: the formats of the output; the first stands in the folder itself, the others in exports/<format>.
        recipe: the resolved recipe, YAML.
        tags: words for the header.
        notes: what a user of the first format has to know, one sentence each.
        origin: where the model comes from.
    """
    model = summary.model if summary.lineage is None else summary.lineage.model
    methods = (*(() if summary.lineage is None else summary.lineage.methods), summary.method)
    name = Path(model).name if Path(model).is_absolute() else model
    header = card_header(
        name=summary.output.name,
        base=model,
        first_format=next(iter(formats), None),
        tags=tags,
        origin=origin or Origin(),
        results=results_of(summary.figures),
    )
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {name}, compressed with {', then '.join(methods)}",
        _facts(summary),
        _figures(summary),
        _certificates(summary),
        _usage(summary, formats, notes),
        f"## Recipe\n\n```yaml\n{recipe.strip()}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def loading_notes(config: Mapping[str, object]) -> tuple[str, ...]:
    """What a reader of a folder has to know, from the folder's config.json."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "aqlm":
        return ()
    if settings.get("nbits_per_codebook") != 8:
        return ("On a CPU the aqlm package decodes the weights before each product; it needs no other package for that.",)
    return (
        "On a CPU: `pip install aqlm[cpu]`, start Python with `NUMBA_NUM_THREADS=1` (with more threads the package's kernel "
        "gives wrong results) and load in float32.",
        "After it has run on a CPU, do not save the loaded model: the kernel has reordered its codes in place.",
    )


def _facts(summary: Summary) -> str:
    keep = ("made from", "bits per compressed weight", "bits per parameter of the model", "weights on disk")
    facts = [(label, value) for label, value in summary.facts() if label.partition(",")[0] in keep]
    return _table(("", ""), [*facts, *((f"text for {stage}", data) for stage, data in summary.data.items())])


def _figures(summary: Summary) -> str:
    parts = []
    if summary.figures.corpora:
        parts += ["Perplexity depends on the sequence length; compare figures of one length only.", ""]
        parts += [_table(FIGURE_COLUMNS, summary.figure_rows()), ""]
    if summary.figures.tasks:
        parts += ["Tasks were run with lm-eval; `gptq_wikitext` is auto-gptq's perplexity in chunks of 512 tokens.", ""]
        parts += [_table(TASK_COLUMNS, summary.task_rows()), ""]
    return "\n".join(["## Evaluation", "", *parts]).rstrip() if parts else ""


def _certificates(summary: Summary) -> str:
    if not summary.certificates:
        return ""
    rows = [(c.format, c.verdict.value, c.reason) for c in summary.certificates]
    text = "Each format was read back by its own client in a fresh process and compared with the compressor's own reading."
    return f"## Certificate\n\n{text}\n\n" + _table(("format", "verdict", "details"), rows)


def _usage(summary: Summary, formats: tuple[str, ...], notes: tuple[str, ...]) -> str:
    failed = {c.format for c in summary.certificates if c.verdict is Verdict.FAILED}
    if not formats or formats[0] in failed:
        return "## Use\n\nThis output failed its certificate and has no config.json: do not use it."
    install = _INSTALL.get(formats[0])
    lines = ["## Use", ""]
    if install:
        lines += ["```bash", install, "```", ""]
    lines += [f"{note}\n" for note in (*notes, *filter(None, [_NOTES.get(formats[0])]))]
    if formats[0] in _COMMANDS:
        model = summary.model if summary.lineage is None else summary.lineage.folder
        command = _COMMANDS[formats[0]].replace("MODEL", shlex.quote(model))
        return "\n".join([*lines, "```bash", command, "```"])
    if formats[0] in _FOR_OTHERS:
        return "\n".join([*lines, *_others(formats, failed)]).rstrip()
    lines += [
        "```python",
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *_IMPORTS.get(formats[0], ()),
        "",
        'folder = "."  # this folder',
        _TOKENIZERS.get(formats[0], _PLAIN_TOKENIZER),
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
        _LOADING.get(formats[0], _PLAIN),
        'prompt = tokenizer("Question: How many", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))",
        "```",
    ]
    return "\n".join([*lines, *_others(formats, failed)])


def _others(formats: tuple[str, ...], failed: set[str]) -> list[str]:
    """The lines about the formats after the first."""
    further = [_further(name) for name in formats[1:] if name not in failed]
    return ["", "Further formats:", "", *further] if further else []


def _further(name: str) -> str:
    """One line about a format in its own folder."""
    loading = [*_IMPORTS.get(name, ()), _LOADING[name]] if name in _LOADING else []
    parts = [f"`exports/{name}`", ", ".join(f"`{line.partition('  #')[0]}`" for line in loading), _NOTES.get(name)]
    return "- " + ": ".join(part for part in parts if part)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
