"""What a server rounds besides the weights: as the evaluation simulates it, and as whoever serves the result is told."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from algorithms.modeling.transforms.serving import CacheQuantization, Serving
from algorithms.quantization.lmquant.settings import CacheSetting, Settings

# vLLM's word for a cache of so many bits with a scale for each token and head.
_VLLM_CACHES = {4: "int4_per_token_head", 8: "int8_per_token_head"}
_SGLANG_BITS = 4  # of the weights that it reads in QServe's layouts
_UNKNOWN = (0.0, 0.0, 0.0)

Ranges = tuple[float, float, float]  # the largest query, key and value of a text


def cache_of(settings: Settings, ranges: Ranges | None = None) -> CacheQuantization | None:
    """How keys and values are held; None where they stay as they are, and where static ``ranges`` are not known yet."""
    cache = settings.cache
    if cache is None or (cache.static and ranges is None):
        return None
    query, key, value = (cache.ratio * largest for largest in ranges or _UNKNOWN)
    return CacheQuantization(
        bits=cache.bits,
        symmetric=cache.symmetric,
        group_size=cache.group_size,
        keys=not cache.skip_k,
        values=not cache.skip_v,
        queries=not cache.skip_q,
        ranges=(query, key, value) if cache.static else None,
    )


def serving_of(settings: Settings, ranges: Ranges | None = None) -> Serving:
    """Inputs of linears and the cache; ``ranges`` as in :func:`cache_of`."""
    bits = None if settings.inputs is None else settings.inputs.bits
    return Serving(activation_bits=bits, cache=cache_of(settings, ranges))


def check_heads(settings: Settings, config: PretrainedConfig) -> None:
    """Whether the cache can hold a model's heads.

    Raises:
        ValueError: its codes do not fill whole bytes.
    """
    serving_of(settings, _UNKNOWN).check(config)


def notes_for(settings: Settings, exports: Sequence[str], output: Path) -> tuple[str, ...]:
    """Sentences for the log and the model card of a result in the folder ``output``."""
    rounded = []
    if settings.inputs is not None:
        rounded.append(f"the inputs of linears in {settings.inputs.bits} bits (a scale for each token)")
    if settings.cache is not None:
        rounded.append(_held(settings.cache))
    if not rounded:
        return ()
    notes = [f"Figures are those of a server that holds {' and '.join(rounded)}; transformers by itself holds no such cache."]
    if settings.cache is None:
        notes = [f"Figures are those of a server that holds {rounded[0]}."]
    if "compressed-tensors" in exports:
        notes.append(_vllm(settings.cache, _folder("compressed-tensors", exports, output)))
    if "qserve" in exports:
        notes.append(_qserve(settings, _folder("qserve", exports, output)))
    return tuple(notes)


def _folder(name: str, exports: Sequence[str], output: Path) -> str:
    """Where a format stands: the first in the job's folder, further ones below it."""
    return shlex.quote(str(output if name == exports[0] else output / "exports" / name))


def _qserve(settings: Settings, folder: str) -> str:
    weights, cache = settings.weights, settings.cache
    assert weights is not None, "QServe's formats hold codes"
    precision = f"w{weights.bits}a8" + ("" if cache is None else f"kv{cache.bits}")
    others = "; SGLang with --quantization qoq" if weights.bits == _SGLANG_BITS else ""
    return (
        f"QServe serves it with: qserve_e2e_generation.py --model {folder} --quant-path {folder} --ifb-mode "
        f"--precision {precision} --group-size {weights.group_size}{others} (by their sources; neither was run)."
    )


def _vllm(cache: CacheSetting | None, folder: str) -> str:
    flag = "" if cache is None or cache.bits not in _VLLM_CACHES else f" --kv-cache-dtype {_VLLM_CACHES[cache.bits]}"
    differs = ""
    if cache is not None and not flag:
        differs = f" It has no cache of {cache.bits} bits: figures are of one that is simulated."
    elif cache is not None and (cache.static or cache.group_size == -1 or not cache.skip_q):
        differs = (
            " Its cache has a scale for each token and head and leaves queries as they are, which is nearer to the original."
        )
    return f"vLLM serves it with: vllm serve {folder}{flag} (by vLLM's source; it was not run).{differs}"


def _held(cache: CacheSetting) -> str:
    skips = {"queries": cache.skip_q, "keys": cache.skip_k, "values": cache.skip_v}
    *others, last = (name for name, skipped in skips.items() if not skipped)
    names = f"{', '.join(others)} and {last}" if others else last
    if cache.static:
        return f"{names} in {cache.bits} bits (one scale for all tokens)"
    return f"{names} in {cache.bits} bits (a scale for each token{' and head' if cache.group_size != -1 else ''})"
