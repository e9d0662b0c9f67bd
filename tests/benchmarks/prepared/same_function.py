"""A Llama written as another model that computes the same: with loud channels, or as a gemma.

    python -m tests.benchmarks.prepared.same_function loud|gemma MODEL OUT

``loud`` multiplies the gains of every norm by 30 in 6 channels and divides the columns that read them: large models have such
channels, and rounding suffers from them. ``gemma`` has gains less one, and embeddings without the factor that its forward
multiplies them by. What a method makes of these says how it deals with outliers and with another family.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from algorithms.modeling.companions import copy_companions
from algorithms.modeling.source import ModelSource
from tests.unit.algorithms.quantization.awq.planted import plant

LLAMA_S_OWN = ("attention_bias", "mlp_bias", "pretraining_tp", "architectures", "dtype", "torch_dtype")


def as_gemma(state: dict[str, Tensor], config: dict[str, object]) -> None:
    """Gains to which the norms add one, embeddings that the forward multiplies by the root of their width, and a head apart."""
    for name in [name for name in state if "norm" in name]:
        state[name] -= 1
    embeddings = state["model.embed_tokens.weight"]
    state.setdefault("lm_head.weight", embeddings.clone())
    state["model.embed_tokens.weight"] = embeddings / embeddings.shape[1] ** 0.5
    config |= {"tie_word_embeddings": False, "hidden_activation": "silu"}


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("loud", "gemma"))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    source, out = ModelSource(arguments.model), arguments.out
    out.mkdir(parents=True)
    copy_companions(source.directory, out)
    config = dict(source.raw_config())
    state = {name: tensor.float() for name, tensor in load_file(arguments.model / "model.safetensors").items()}
    if arguments.kind == "gemma":
        config = {key: value for key, value in config.items() if key not in LLAMA_S_OWN} | {"model_type": "gemma"}
        as_gemma(state, config)
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if arguments.kind == "loud":
        plant(ModelSource(out), out)


if __name__ == "__main__":
    main()
