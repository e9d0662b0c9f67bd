"""The experts of a mixture as modules of their own, each with its linears.

transformers keeps all experts of a block in two tensors with a dimension for the experts, [E, 2 F, H] for gates and ups and
[E, H, F] for downs. Methods compress matrices, and files have one a matrix; so here every expert is a module, its matrices are
linears, and what they compute together is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from algorithms.modeling.mixtures.pacing import pause

_ROUNDED = "computes_in_float16"
READER = "read_weight"  # attribute of a linear whose weight is read when its expert computes


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, neurons: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, neurons, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, neurons, bias=False, device="meta")
        self.down_proj = nn.Linear(neurons, hidden, bias=False, device="meta")
        self.act_fn = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens [n, H] to [n, H]."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class Experts(nn.ModuleList):
    """All experts of a block.

    Attributes:
        hidden: features of a token, H.
        everywhere: numbers of experts that compute all tokens, of which the routed ones count: so that who gathers
            statistics of an expert that is given few tokens sees more.
        in_step: whether every expert is called, be it for no token, and forwards on their way halt before each
            (:mod:`algorithms.modeling.mixtures.pacing`), so that one expert's weights are needed at a time.
        is_deferred: whether weights are read when an expert computes (:mod:`algorithms.modeling.mixtures.deferred`).
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.hidden = experts[0].gate_proj.in_features
        self.everywhere: frozenset[int] = frozenset()
        self.in_step = False
        self.is_deferred = False
        self._taken: int | None = None

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens [n, H] to [n, H]: for each token the sum over its chosen experts [n, k], times their weights [n, k]."""
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, places = torch.where(chosen == number)
            if not tokens.numel() and not self.in_step:
                continue
            if self.in_step:
                pause()
            self.take(number)
            outputs = expert(hidden)[tokens] if number in self.everywhere else expert(hidden[tokens])
            total.index_add_(0, tokens, (outputs * weights[tokens, places, None]).to(total.dtype))
        return total

    def take(self, number: int) -> None:
        """Have the weights of one expert; of those that are read when they are needed, another's are forgotten."""
        if self._taken not in (None, number):
            for linear in _deferred(self[self._taken]):
                forget(linear)
        self._taken = number
        for linear in _deferred(self[number]):
            if linear.weight.is_meta:
                linear.weight = nn.Parameter(vars(linear)[READER](), requires_grad=False)


def forget(linear: nn.Linear) -> None:
    """Leave of a linear's weight its shape."""
    linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)


def _deferred(expert: nn.Module) -> list[nn.Linear]:
    return [module for module in expert.modules() if READER in vars(module)]


@contextmanager
def in_step(block: nn.Module) -> Iterator[None]:
    """Within, the experts of a block are all called, one after the other over all forwards on their way."""
    mixtures = [module for module in block.modules() if isinstance(module, Experts)]
    for module in mixtures:
        module.in_step = True
    try:
        yield
    finally:
        for module in mixtures:
            module.in_step = False


class FirstExpert(nn.ModuleList):
    """One expert that stands for the ``count`` of a block, and is given every token: what is looked at needs no others."""

    def __init__(self, expert: Expert, count: int) -> None:
        super().__init__([expert])
        self.count = count

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens [n, H] to [n, H]."""
        return self[0](hidden)


def separate_experts(model: nn.Module) -> None:
    """Put :class:`Experts`, on the meta device, in the place of every module that holds gated experts in two tensors."""
    for name, count, make in list(_fused(model)):
        model.set_submodule(name, Experts([make() for _ in range(count)]))


def keep_first_experts(model: nn.Module) -> None:
    """Put :class:`FirstExpert` in the same places."""
    for name, count, make in list(_fused(model)):
        model.set_submodule(name, FirstExpert(make(), count))


def _fused(model: nn.Module) -> Iterator[tuple[str, int, Callable[[], Expert]]]:
    """The modules that hold gated experts in two tensors: path, number of experts, and what makes one."""
    for name, module in model.named_modules():
        if _is_fused(module):
            count, hidden, neurons = module.down_proj.shape
            yield name, count, partial(Expert, hidden, neurons, module.act_fn)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module has experts [E, 2 F, H] and [E, H, F], without biases, gates above ups, as nearly all families do."""
    both, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(both, nn.Parameter) or not isinstance(down, nn.Parameter) or both.ndim != 3 or down.ndim != 3:
        return False
    count, hidden, neurons = down.shape
    plain = {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"}
    # A family with another product of gate and up has a method for it; transformers' own stand-in is the plain one.
    gate = getattr(type(module), "_apply_gate", None)
    ordinary = gate is None or gate.__name__ == "_default_apply_gate"
    return plain and ordinary and hasattr(module, "act_fn") and both.shape == (count, 2 * neurons, hidden)


def compute_in_float16(model: nn.Module) -> None:
    """Let experts of a model compute with weights rounded to float16, whenever they get them; again has no further effect."""
    for mixture in model.modules():
        if isinstance(mixture, Experts) and not vars(mixture).get(_ROUNDED, False):
            vars(mixture)[_ROUNDED] = True
            for linear in mixture.modules():
                if isinstance(linear, nn.Linear):
                    linear.register_forward_pre_hook(_round_weight)


def _round_weight(linear: nn.Linear, inputs: object) -> None:
    linear.weight.data = linear.weight.data.half().to(linear.weight.dtype)
