import dataclasses
import random
import re

import pytest

from configs.errors import DataError
from jobs.manifest import ManifestFile
from jobs.reporting.comparison import Entry, as_text, find_job, planes, read_entries, table_of
from jobs.reporting.html.compare import comparison
from jobs.scoring.figures import CorpusFigures, Figures, TaskFigures


def corpus(perplexity, kl=0.1, text="ptb", length=64):
    return CorpusFigures(
        corpus=text, sequence_length=length, windows=2, tokens=126, base_perplexity=10.0, perplexity=perplexity,
        kl_divergence=kl, perplexity_interval=(perplexity - 1, perplexity + 1), base_perplexity_interval=(9.0, 11.0),
    )  # fmt: skip


def entry(name, size, perplexity, kl=0.1):
    return Entry(name=name, model="m", method="X", figures=Figures(corpora=(corpus(perplexity, kl),)), bytes=size)


def test_the_best_are_those_that_none_beats():
    generator = random.Random(0)
    places = [(generator.randrange(1, 9), generator.randrange(1, 9)) for _ in range(25)]
    plane, _ = planes([entry(str(number), *place) for number, place in enumerate(places)])
    for number, (size, value) in enumerate(places):
        beaten = any(a <= size and b <= value and (a, b) != (size, value) for a, b in places)
        assert plane.places[number].is_best is not beaten


def test_figures_that_are_not_comparable_stand_apart():
    """Fewer windows, another arithmetic, another text of the same name."""
    plain = entry("plain", 1, 11.0)
    for number, change in enumerate(({"windows": 9}, {"dtype": "bfloat16"}, {"text": "beef"})):
        changed = Figures(corpora=(dataclasses.replace(corpus(12.0), **change),))
        other = dataclasses.replace(plain, name=f"other {number}", bytes=2, figures=changed)
        three = [plain, other, dataclasses.replace(other, name="third", bytes=3)]
        columns, rows = table_of(three)
        assert len(columns) == len(set(columns))
        assert all(len([cell for cell in row if cell in ("11", "12")]) == 1 for row in rows)
        assert {place.entry.name for plane in planes(three) for place in plane.places} == {f"other {number}", "third"}
        page = comparison([dataclasses.replace(plain, name="again", bytes=4), *three])
        ids = re.findall(r'<section id="([^"]*)"', page)
        assert len(ids) == len(set(ids)) == 5


def test_what_is_not_finite_is_in_no_plane():
    broken = entry("broken", 3, float("inf"), kl=float("nan"))
    three = [entry("a", 1, 11.0), entry("b", 2, 10.0), broken]
    assert all(place.entry.name != "broken" for plane in planes(three) for place in plane.places)
    assert "broken" in as_text(three)


def test_figures_of_different_lengths_never_share_a_plane():
    first, second = entry("a", 1, 11.0), entry("b", 2, 12.0)
    other = dataclasses.replace(second, figures=Figures(corpora=(corpus(12.0, length=128),)))
    assert len(planes([first, second])) == 2
    assert planes([first, other]) == []
    columns, rows = table_of([first, other])
    assert "ppl ptb@64" in columns
    assert "ppl ptb@128" in columns
    assert rows[0][columns.index("ppl ptb@128")] == ""


def write_job(folder, *, perplexity, sizes=None):
    figures = {**dataclasses.asdict(corpus(perplexity))}
    task = TaskFigures(task="t", num_fewshot=5, metric="acc,none", samples=3, base_value=0.5, value=0.25)
    manifest = ManifestFile(folder / "manifest.json")
    folder.mkdir(parents=True)
    manifest.update(
        algorithm="GPTQ",
        model={"name": "org/m", "parameters": 100},
        bits={"key": "k", "bits": {"codes": 320.0, "parameters": 80.0}},
        sizes=sizes or {"before": 200, "after": {"gptq": 60, "dense": 200}},
        evaluation={"key": "k", "time": "t", "figures": [figures], "tasks": [dataclasses.asdict(task)], "cost": {}},
        certificate={"key": "k", "formats": [{"format": "gptq", "verdict": "passed"}]},
    )
    return folder


def test_jobs_stand_behind_the_model_that_they_start_from(tmp_path):
    jobs = [write_job(tmp_path / name / "one", perplexity=value) for name, value in (("a", 11.0), ("b", 12.0))]
    base, first, second = read_entries(jobs)
    assert (base.bytes, base.figures.corpora[0].perplexity, base.figures.corpora[0].kl_divergence) == (200, 10.0, None)
    assert (first.name, second.name) == ("one (1)", "one (2)")
    assert (first.bytes, first.bits.per_weight, first.bits.per_model_parameter) == (60, 4.0, (320 + 16 * 20) / 100)
    text = as_text([base, first, second])
    assert base.figures.tasks[0].value == 0.5, "its own answers"
    title = "perplexity on ptb (sequence length 64, 2 windows)"
    for said in ("org/m, uncompressed", "gptq passed", "0.25", title, "one (1): 60 B, 11 *"):
        assert said in text, said
    assert "one (2): 60 B, 12\n" in text, "as large and worse"
    page = comparison([base, first, second])
    assert page.count("<svg") == 2
    assert "2 jobs compared" in page


def test_a_job_is_found_by_its_folder_or_its_name(tmp_path):
    folder = write_job(tmp_path / "user" / "jobs" / "Kompress" / "one", perplexity=11.0)
    assert find_job(str(folder), tmp_path) == folder
    assert find_job("one", tmp_path / "user") == folder
    assert find_job("Kompress/one", tmp_path / "user") == folder
    with pytest.raises(DataError, match="two: no job there"):
        find_job("two", tmp_path / "user")
    write_job(tmp_path / "user" / "jobs" / "Adapt" / "one", perplexity=11.0)
    with pytest.raises(DataError, match="2 jobs of this name"):
        find_job("one", tmp_path / "user")
    empty = tmp_path / "empty"
    empty.mkdir()
    ManifestFile(empty / "manifest.json").update(algorithm="GPTQ")
    with pytest.raises(DataError, match="no result yet"):
        read_entries([empty])
