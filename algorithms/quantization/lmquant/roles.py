"""LMQuant's names for the input groups of a block."""

from __future__ import annotations

from algorithms.modeling.architecture import ModelArchitecture


def role_of(architecture: ModelArchitecture, leader: str) -> str:
    """``proj_qkv``, ``proj_out``, ``proj_1st`` or ``proj_2nd``, for the first linear of a group."""
    queries, _, values = architecture.qkv
    if leader == queries:
        return "proj_qkv"
    if architecture.feeders.get(leader) == values:
        return "proj_out"
    return "proj_1st" if leader in architecture.input_norms else "proj_2nd"
