"""The table against what a forward of transformers' own model shows: two ways to the same groups."""

import pytest

from algorithms.modeling.source import ModelSource
from tests.support.families.cases import CASES, MIXTURES, save_case


@pytest.mark.parametrize("case", [*CASES, *MIXTURES])
def test_inspection_finds_what_the_table_says(tmp_path, case):
    source = ModelSource(save_case(tmp_path, case))
    found, row = source.inspection.architecture, source.architecture
    blocks = source.skeleton().get_submodule(row.blocks).children()
    groups = found.resolved(blocks).input_groups
    assert [frozenset(group) for group in groups] == [frozenset(group) for group in row.input_groups]
    assert (found.blocks, found.head, found.embeddings) == (row.blocks, row.head, row.embeddings)
    assert found.final_norm in (row.final_norm, "")
