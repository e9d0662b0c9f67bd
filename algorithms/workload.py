"""About how much work stages are, from a model's shapes alone: for a plan before anything has been measured.

Legend: P parameters of all blocks, N tokens. A forward pass of the blocks is 2 P N operations; with gradients it is three.
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.modeling.source import ModelSource

_FLOAT = 4  # bytes of a float32


@dataclass(frozen=True, kw_only=True)
class Workload:
    """About what a stage asks of a machine: floating-point operations, and memory beside what the program itself needs."""

    operations: float
    memory_bytes: float = 0.0

    def plus(self, operations: float) -> Workload:
        """The same with more to compute."""
        return Workload(operations=self.operations + operations, memory_bytes=self.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """``block_parameters`` are those of one block, ``outside_parameters`` those of embeddings, norm and an untied head.

    Of a mixture, ``computed`` is the share of a block that a token passes, and ``held`` the share of it that is in memory at
    once where experts are compressed in turn.
    """

    blocks: int
    block_parameters: int
    outside_parameters: int
    hidden: int
    vocabulary: int
    computed: float = 1.0
    held: float = 1.0

    @classmethod
    def of(cls, source: ModelSource) -> ModelShapes:
        """From the configuration and the number of stored parameters; all blocks count as equally large."""
        config = source.config.to_dict()
        hidden = int(config.get("hidden_size") or 0)
        ends = 1 if config.get("tie_word_embeddings") else 2
        outside = min(ends * source.vocab_size * hidden, source.num_parameters)
        computed, held = _shares_of_mixture(source, int(config.get("num_experts_per_tok") or 0))
        return cls(
            blocks=source.num_blocks,
            block_parameters=(source.num_parameters - outside) // source.num_blocks,
            outside_parameters=outside,
            hidden=hidden,
            vocabulary=source.vocab_size,
            computed=computed,
            held=held,
        )

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.blocks * self.block_parameters + self.outside_parameters

    def forward(self, tokens: float, *, head: bool = False) -> float:
        """Operations of a forward pass of all blocks over so many tokens, and of the ``head``."""
        ends = self.hidden * self.vocabulary if head else 0
        return 2.0 * tokens * (self.blocks * self.block_parameters * self.computed + ends)

    def walk(self, tokens: int, *, tuning_epochs: float = 0.0) -> Workload:
        """Block by block over the hidden states of all tokens, of the original model and of the compressed one.

        Each block is there as it was, as it becomes, and in copies of its matrices and of their inputs' second moments; with
        tuning, gradients and two moments come on top. Without, of a mixture's experts there is one, and the codes of all, which
        count as a byte for each parameter.
        """
        passes = 2.0 + 3.0 * tuning_epochs
        copies = 6 + (4 if tuning_epochs else 0)
        states = 2 * tokens * self.hidden
        held = 1.0 if tuning_epochs else self.held
        block = self.block_parameters * (copies * held + (1.0 - held) / _FLOAT)
        weights = block + self.outside_parameters
        return Workload(operations=passes * self.forward(tokens), memory_bytes=_FLOAT * (states + weights))

    def distillation(self, tokens: int, *, epochs: int, sequences: int, length: int) -> Workload:
        """A student of the whole model, its gradients and two moments, beside a teacher; ``sequences`` pass at once.

        Of every token in flight, some 20 values a block as wide as the model are kept for the backward pass, and its logits in
        a few versions.
        """
        kept = sequences * length * (20 * self.blocks * self.hidden + 5 * self.vocabulary)
        return Workload(
            operations=4.0 * epochs * self.forward(tokens, head=True), memory_bytes=_FLOAT * (5 * self.parameters + kept)
        )


def _shares_of_mixture(source: ModelSource, chosen: int) -> tuple[float, float]:
    """The shares of all blocks that a token passes, and that are left with one expert a block; 1 and 1 without experts."""
    if not chosen or source.architecture.experts is None:
        return 1.0, 1.0
    blocks = list(source.skeleton().get_submodule(source.architecture.blocks).children())
    mixtures = [dict(block.named_modules()).get(source.architecture.experts) for block in blocks]
    whole = computed = held = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    for experts in mixtures:
        if experts is not None:
            size, count = sum(parameter.numel() for parameter in experts.parameters()), len(list(experts.children()))
            computed -= size * (count - min(chosen, count)) // count
            held -= size * (count - 1) // count
    return computed / whole, held / whole
