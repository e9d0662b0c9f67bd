"""A Llama written as another model that computes the same: with loud channels, or as a qwen2 or a gemma.

    python -m tests.benchmarks.prepared.same_function loud|qwen2|gemma MODEL OUT

``loud`` multiplies the gains of every norm by 30 in 6 channels and divides the columns that read them: large models
have such channels, and rounding suffers from them. ``qwen2`` has biases of zero, ``gemma`` gains less one and embeddings less
the factor that its forward multiplies them by. What a method makes of these says how it deals with outliers and with families.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from algorithms.modeling.companions import copy_companions
from algorithms.modeling.source import ModelSource
from tests.unit.algorithms.quantization.awq.planted import plant

State = dict[str, Tensor]
LLAMA_S_OWN = ("attention_bias", "mlp_bias", "pretraining_tp", "architectures", "dtype", "torch_dtype")


def as_qwen2(state: State, config: dict[str, object]) -> None:
    """Biases of zero."""
    for name in [name for name in state if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        state[name.replace("weight", "bias")] = state[name].new_zeros(state[name].shape[0])
    config["use_sliding_window"] = False


def as_gemma(state: State, config: dict[str, object]) -> None:
    """Gains to which the norms add one, embeddings that the forward multiplies by the root of their width, and a head apart."""
    for name in [name for name in state if "norm" in name]:
        state[name] -= 1
    embeddings = state["model.embed_tokens.weight"]
    state.setdefault("lm_head.weight", embeddings.clone())
    state["model.embed_tokens.weight"] = embeddings / embeddings.shape[1] ** 0.5
    config |= {"tie_word_embeddings": False, "hidden_activation": "silu"}


FAMILIES: dict[str, Callable[[State, dict[str, object]], None]] = {"qwen2": as_qwen2, "gemma": as_gemma}


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("loud", *FAMILIES))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    source, out = ModelSource(arguments.model), arguments.out
    out.mkdir(parents=True)
    copy_companions(source.directory, out)
    config = dict(source.raw_config())
    state = {name: tensor.float() for name, tensor in load_file(arguments.model / "model.safetensors").items()}
    if arguments.kind in FAMILIES:
        config = {key: value for key, value in config.items() if key not in LLAMA_S_OWN} | {"model_type": arguments.kind}
        FAMILIES[arguments.kind](state, config)
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if arguments.kind == "loud":
        plant(ModelSource(out), out)


if __name__ == "__main__":
    main()
