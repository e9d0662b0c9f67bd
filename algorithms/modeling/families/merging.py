"""One list of input groups for all blocks of a model, whose blocks need not be alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from algorithms.modeling.families.tracing import UnsuitableBlocksError

Block = Mapping[str, str]  # the linears of a block in their order -> the first one with the same input


def merged_groups(blocks: Iterable[Block]) -> tuple[tuple[str, ...], ...]:
    """Groups in the order of computation, of which every block has its part.

    Linears stand together that share an input in every block that has both.

    Raises:
        UnsuitableBlocksError: blocks that compute the same linears in different orders.
    """
    distinct = [dict(pairs) for pairs in dict.fromkeys(tuple(block.items()) for block in blocks)]
    order = _merged_order(distinct)
    groups: list[list[str]] = []
    for name in order:
        home = next((group for group in groups if all(_together(distinct, name, other) for other in group)), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    if not all(_follows(groups, block) for block in distinct):
        groups = [[name] for name in order]
    return tuple(tuple(group) for group in groups)


def _merged_order(blocks: Sequence[Block]) -> list[str]:
    order: list[str] = []
    for block in blocks:
        place = 0
        for name in block:
            if name in order[:place]:
                raise UnsuitableBlocksError(f"its blocks compute {name} in different orders")
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    return order


def _together(blocks: Sequence[Block], name: str, other: str) -> bool:
    both = [block for block in blocks if name in block and other in block]
    return bool(both) and all(block[name] == block[other] for block in both)


def _follows(groups: Sequence[Sequence[str]], block: Block) -> bool:
    """Whether a block comes to the first linears of its groups in the order of the groups."""
    order = list(block)
    leaders = [min(order.index(name) for name in group if name in block) for group in groups if set(group) & set(block)]
    firsts = [order.index(next(name for name in group if name in block)) for group in groups if set(group) & set(block)]
    return leaders == sorted(leaders) and firsts == leaders
