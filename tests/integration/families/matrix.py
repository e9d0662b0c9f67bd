"""What works for which model family: for each family and method, the format that is certified, or the words of a refusal.

Tests check every cell by running the job; the table in README.md is made of these cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The parameters of each method, made small. Matrices of the tiny models have 32 or 64 columns.
METHODS: Mapping[str, Mapping[str, object]] = {
    "RTN": {"wbits": 4, "groupsize": 32},
    "GPTQ": {"wbits": 4, "groupsize": 32, "sym": True, "nsamples": 8, "model_seqlen": 32},
    "AutoAWQ": {"ZERO_POINT": False, "Q_GROUP_SIZE": 32, "search_steps": 2, "nsamples": 8, "model_seqlen": 32},
    "AQLM": {
        "calibration_config": {
            "num_codebooks": 1,
            "nbits_per_codebook": 4,
            "in_group_size": 8,
            "nsamples": 8,
            "val_size": 0,
            "model_seqlen": 32,
        },
        "finetune_config": None,
    },
    "FlapPruner": {"pruning_ratio": 0.3, "nsamples": 8, "model_seqlen": 32},
}
_CODES = ("RTN", "GPTQ", "AutoAWQ")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``certified`` is the format that its client reads back. ``refused`` are formats that are refused, with words of why.

    A cell without a format is refused as a whole; its words are those of ``refused`` for the method's own name.
    """

    certified: str | None
    refused: Mapping[str, str]


def _certified(name: str, **refused: str) -> Cell:
    return Cell(certified=name, refused={format_.replace("_", "-"): words for format_, words in refused.items()})


def _row(codes: Cell, aqlm: Cell, flap: Cell) -> Mapping[str, Cell]:
    return {**dict.fromkeys(_CODES, codes), "AQLM": aqlm, "FlapPruner": flap}


_PACKED, _AQLM, _PADDED = _certified("compressed-tensors"), _certified("aqlm"), _certified("padded")
_OWN_LINEARS = _certified("dense", compressed_tensors="transformers loads packed weights into nn.Linear alone")
_NO_GATES = Cell(certified=None, refused={"FlapPruner": "no gated feed-forward part"})
_WHOLE = _row(_PACKED, _AQLM, _PADDED)
_UNGATED = _row(_PACKED, _AQLM, _NO_GATES)
_NO_MIXTURES = Cell(certified=None, refused={"FlapPruner": "a mixture, whose experts each see tokens of their own"})
_MIXTURE = _row(_PACKED, _certified("dense", aqlm="transformers has no experts with AQLM's codes"), _NO_MIXTURES)

MATRIX: Mapping[str, Mapping[str, Cell]] = {
    "llama": _WHOLE,
    "mistral": _WHOLE,
    "qwen2": _WHOLE,
    "qwen3": _WHOLE,
    "gemma": _WHOLE,
    "gemma2": _WHOLE,
    "gemma3_text": _WHOLE,
    "phi3": _WHOLE,
    "olmo2": _WHOLE,
    "granite": _WHOLE,
    "cohere2": _WHOLE,
    "falcon": _row(_OWN_LINEARS, _AQLM, _NO_GATES),
    "opt": _UNGATED,
    "gpt_neox": _UNGATED,
    "smollm3": _WHOLE,
    "seed_oss": _WHOLE,
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": _MIXTURE,
}
