"""What whoever serves a result has to know: what is rounded besides the weights, and how the servers are told."""

from __future__ import annotations

from collections.abc import Sequence

from algorithms.quantization.lmquant.settings import CacheSetting, Settings

# vLLM's word for a cache of so many bits with a scale for each token and head.
_VLLM_CACHES = {4: "int4_per_token_head", 8: "int8_per_token_head"}


def notes_for(settings: Settings, exports: Sequence[str]) -> tuple[str, ...]:
    """Sentences for the log and the model card."""
    rounded = []
    if settings.inputs is not None:
        rounded.append(f"the inputs of linears in {settings.inputs.bits} bits, a scale for each token")
    if settings.cache is not None:
        rounded.append(_cache(settings.cache))
    if not rounded:
        return ()
    notes = [f"Figures are those of a server that holds {' and '.join(rounded)}; transformers by itself holds no such cache."]
    if "compressed-tensors" in exports:
        cache = settings.cache
        flag = "" if cache is None else f" --kv-cache-dtype {_VLLM_CACHES[cache.bits]}"
        notes.append(f"vLLM serves it with: vllm serve FOLDER{flag} (by vLLM's source; it was not run).")
    if "qserve" in exports:
        notes.append(
            "QServe and SGLang serve the qserve format; QServe is told of the cache by KV_BITS of its own scripts "
            "(by their sources; neither was run)."
        )
    return tuple(notes)


def _cache(cache: CacheSetting) -> str:
    held = [
        name for name, skipped in (("queries", cache.skip_q), ("keys", cache.skip_k), ("values", cache.skip_v)) if not skipped
    ]
    if cache.static:
        return f"{' and '.join(held)} in {cache.bits} bits, one scale for all tokens"
    return f"{' and '.join(held)} in {cache.bits} bits, a scale for each token{' and head' if cache.group_size != -1 else ''}"
