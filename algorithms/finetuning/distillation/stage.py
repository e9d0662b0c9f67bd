"""What every stage that distils does around the loop: hold sequences out, put the teacher up, show how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from algorithms.base import StageContext, StageError
from algorithms.finetuning.distillation.batches import steps_per_epoch
from algorithms.finetuning.distillation.loop import History, LoopSettings, Surroundings, distill
from algorithms.finetuning.distillation.models import Computation, computed_dtype, teacher_model
from algorithms.finetuning.distillation.student import Student
from algorithms.finetuning.distillation.teacher import (
    CachedTeacher,
    LiveTeacher,
    Teacher,
    TextTeacher,
    cached_tokens,
    fill_cache,
)
from algorithms.modeling.source import ModelSource
from algorithms.numerics.randomness import keyed_generator

_CACHE = ".teacher"
_CACHED_PASS = 4  # sequences, where the recipe leaves the size of a pass open
_MOST_HELD_OUT, _HELD_OUT_SHARE = 128, 32


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How a stage puts the original model up, and how it speaks of itself.

    ``key`` is that of the recipe's block. The teacher is read in ``load_dtype``; ``cached`` keeps so many tokens of every
    position instead of running it in every step. With ``from_text`` there is none: the text's own next tokens are learnt.
    """

    name: str
    key: str
    rates: str
    load_dtype: str
    cached: int | None
    micro_batch_size: int | None
    from_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sequences [1, length] to learn from, and those to judge by."""

    training: list[Tensor]
    held_out: list[Tensor]


def hold_out(sequences: Sequence[Tensor], count: int | None, *, judges: bool, seed: int, key: str) -> Split:
    """Split the text; what is held out is chosen by the seed.

    Args:
        sequences: all of them.
        count: how many are held out; None for 1/32, at most 128, if the tuning ``judges`` by them and otherwise none.
        judges: whether the best state is kept.
        seed: of the choice.
        key: the recipe's block.

    Raises:
        StageError: nothing would be left to learn from.
    """
    if count is None:
        share = max(1, min(_MOST_HELD_OUT, len(sequences) // _HELD_OUT_SHARE))
        count = share if judges and len(sequences) > 1 else 0
    if count >= len(sequences):
        raise StageError(
            f"{key}.val_size: {count} of {len(sequences)} sequences are held out, which leaves none to "
            "learn from. Lower val_size or model_seqlen, or name a longer text."
        )
    order = torch.randperm(len(sequences), generator=keyed_generator(seed, "held out")).tolist()
    chosen = set(order[:count])
    kept = [sequence for number, sequence in enumerate(sequences) if number not in chosen]
    return Split(training=kept, held_out=[sequences[number] for number in sorted(chosen)])


def refuse_half_products(amp_dtype: str, device: torch.device, key: str) -> None:
    """Refuse products in float16.

    Raises:
        StageError: that is what the recipe asks for.
    """
    if amp_dtype == "float16" and device.type == "cuda":
        raise StageError(
            f"{key}.amp_dtype: in float16 most of the gradient of a divergence that is averaged over many tokens is zero. "
            "Choose bfloat16 or float32."
        )


def distilled(
    context: StageContext,
    source: ModelSource,
    student: Student,
    split: Split,
    *,
    settings: LoopSettings,
    teaching: Teaching,
    how: Computation,
) -> History:
    """Tune a student against the original model, with the stage's display, folder and ranks.

    Args:
        context: the stage's.
        source: the original model.
        student: tuned in place.
        split: what it learns from and is judged by.
        settings: the loop's.
        teaching: how the teacher is put up.
        how: ranks and dtypes.

    Returns:
        What happened.
    """
    steps = settings.max_epochs * steps_per_epoch(len(split.training), settings.batch_size)
    teacher = _teacher(context, source, teaching, how, [*split.training, *split.held_out])
    with context.progress(teaching.name, steps) as advance:
        around = Surroundings(
            name=teaching.name,
            rates=teaching.rates,
            ranks=context.ranks,
            directory=context.output_dir,
            autocast=how.autocast,
            metrics=context.metrics,
            advance=advance,
            evaluate=context.evaluate,
        )
        return distill(student, teacher, split.training, split.held_out, settings, around)


def clear(directory: Path) -> None:
    """Away with what only an unfinished run needs: checkpoints, also half written ones, and the teacher's cache."""
    for path in directory.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)


def _teacher(
    context: StageContext, source: ModelSource, teaching: Teaching, how: Computation, sequences: Sequence[Tensor]
) -> Teacher:
    if teaching.from_text:
        return TextTeacher()
    cache = context.output_dir / _CACHE
    if teaching.cached is not None and context.ranks.from_main(cached_tokens(cache)) == teaching.cached:
        return CachedTeacher(cache)
    asked = teaching.load_dtype
    dtype = asked if asked != "auto" else str(source.config.dtype or "float32").removeprefix("torch.")
    loaded = computed_dtype(dtype, context.device, f"{teaching.key}.load_dtype")
    live = LiveTeacher(teacher_model(source, loaded, how), how.autocast)
    if teaching.cached is None:
        return live
    size = teaching.micro_batch_size or _CACHED_PASS
    share = -(-len(sequences) // context.ranks.size)
    with context.progress("original model's logits", -(-share // size)) as advance:
        for _ in fill_cache(cache, live, sequences, kept=teaching.cached, micro_batch_size=size, ranks=context.ranks):
            advance("")
    return CachedTeacher(cache)
