import dataclasses
import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from jobs.manifest import Lineage, StageRecord, Status
from jobs.reporting.certificate import FormatCertificate, Verdict
from jobs.reporting.model_card import loading_notes, model_card
from jobs.reporting.summary import BitAccount, Summary, as_tables, as_text, size
from jobs.scoring.figures import CorpusFigures, Figures, TaskFigures

FIGURES = CorpusFigures(
    corpus="ptb", sequence_length=256, windows=7, tokens=1785, base_perplexity=22.02, perplexity=23.5, kl_divergence=0.0612,
    top1_agreement=0.871, kl_interval=(0.05, 0.0725), top1_interval=(0.86, 0.88),
)  # fmt: skip
TASK = TaskFigures(
    task="gsm8k", num_fewshot=5, metric="exact_match,strict-match", samples=9, bos_added=True, base_value=0.5, base_error=0.013,
    value=0.4444, error=0.0137,
)  # fmt: skip
STAGE = StageRecord(
    key="k", algorithm="X", version=1, settings={}, input_key="m", tokens_key=None, request=None, data="none", kind="x",
    directory="x", status=Status.FINISHED, started="s", wall_s=75.0, user_cpu_s=61.5, peak_memory_bytes=512_000_000,
)  # fmt: skip


def summary(verdict=Verdict.PASSED):
    return Summary(
        model="org/model",
        method="AQLM",
        output=Path("/out"),
        bits=BitAccount.of({"codes": 2000.0, "codebooks": 450.0, "scales": 30.0, "parameters": 1000.0}, 1500),
        size_before=3_000_000,
        size_after=1_250_000,
        figures=Figures(corpora=(FIGURES,), tasks=(TASK,)),
        certificates=(FormatCertificate(format="aqlm", verdict=verdict, reason="as measured"),),
        stages={"calibration": STAGE, "conversion": STAGE},
        ran=("conversion",),
    )


def card(**options):
    arguments = {"formats": ("aqlm", "dense"), "recipe": "ALGORITHM: AQLM\n", "tags": ("aqlm",), "notes": ("Mind the step.",)}
    return model_card(summary(**options), **arguments)


def test_bits_count_everything_that_is_stored():
    bits = summary().bits
    assert bits.per_weight == 2.48
    assert bits.parts == {"codes": 2.0, "codebooks": 0.45, "scales": 0.03}
    assert bits.per_model_parameter == pytest.approx((2480 + 16 * 500) / 1500)
    assert BitAccount.of({"parameters": 0}, 10) is None
    assert BitAccount.of({}, 10) is None


@pytest.mark.parametrize("drawn", [False, True])
def test_the_summary_says_all_of_it(drawn):
    if drawn:
        console = Console(file=io.StringIO(), width=250)
        console.print(as_tables(summary()))
        text = console.file.getvalue()
    else:
        text = as_text(summary())
    for said in (
        "org/model", "AQLM", "2.480 (codes 2.000, codebooks 0.450, scales 0.030)", "6.987",
        "3.0 MB -> 1.2 MB (2.40 times smaller)",
        "256", "1785", "22.02 -> 23.5", "0.0612 (0.05 to 0.0725)", "87.1% (86.0% to 88.0%)", "0.5 ± 0.013 -> 0.4444 ± 0.014",
        "passed: as measured", "1 min 15 s", "1 min 2 s", "512.0 MB", "/out",
    ):  # fmt: skip
        assert said in text, said
    rows = {line.split()[0]: line for line in text.replace("│", " ").splitlines() if line.split()}
    assert "reused" in rows["calibration"]
    assert "ran" in rows["conversion"]


def test_the_card_has_header_table_and_snippet():
    text = card()
    header = yaml.safe_load(text.split("---\n")[1])
    assert "| ptb | 256 | 7 | 1785 | 22.02 -> 23.5 | 0.0612 (0.05 to 0.0725) | 87.1% (86.0% to 88.0%) |" in text
    assert "| gsm8k | 5 | 9 | yes | exact_match,strict-match | 0.5 ± 0.013 -> 0.4444 ± 0.014 |" in text
    assert header["base_model"] == "org/model"
    assert (header["library_name"], header["pipeline_tag"], header["tags"]) == ("transformers", "text-generation", ["aqlm"])
    assert "pip install aqlm" in text
    assert "Mind the step." in text
    assert "`exports/dense`" in text
    assert "```yaml\nALGORITHM: AQLM\n```" in text
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert "AutoModelForCausalLM.from_pretrained" in snippet


def test_the_card_of_a_failed_certificate_offers_no_use():
    text = card(verdict=Verdict.FAILED)
    assert "from_pretrained" not in text
    assert "do not use it" in text


def test_what_a_reader_must_know_depends_on_the_format():
    def notes(**settings):
        return " ".join(loading_notes({"quantization_config": {"quant_method": "aqlm", **settings}}))

    assert "NUMBA_NUM_THREADS=1" in notes(nbits_per_codebook=8)
    assert "float32" in notes(nbits_per_codebook=8)
    assert "NUMBA" not in notes(nbits_per_codebook=6)
    assert loading_notes({}) == ()


def test_a_model_that_jobs_have_made_shows_the_way_to_it():
    made = Lineage(model="org/base", methods=("FlapPruner", "SpQR"), folder="/a folder")
    with_way = dataclasses.replace(summary(), model="job://first", lineage=made)
    assert dict(with_way.facts())["made from"] == (
        "org/base by FlapPruner, then SpQR; sizes and figures before are job://first's"
    )
    assert "made from" not in dict(summary().facts())
    text = model_card(with_way, formats=("tensorrt-llm",), recipe="", tags=(), notes=())
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/base"
    assert "# org/base, compressed with FlapPruner, then SpQR, then AQLM" in text
    assert "--tokenizer_dir '/a folder' " in text
    local = dataclasses.replace(with_way, lineage=dataclasses.replace(made, model="/models/base"))
    header = yaml.safe_load(model_card(local, formats=("dense",), recipe="", tags=(), notes=()).split("---\n")[1])
    assert "base_model" not in header


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3.00 TB")]
)
def test_sizes(count, said):
    assert size(count) == said


def test_every_further_format_has_its_size_beside_the_first_ones():
    facts = dict(dataclasses.replace(summary(), further_sizes={"spqr": 500_000}).facts())
    assert facts["weights on disk"] == "3.0 MB -> 1.2 MB (2.40 times smaller)"
    assert facts["weights on disk, spqr"] == "3.0 MB -> 500.0 kB (6.00 times smaller)"


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (("gguf",), 'from_pretrained(folder, gguf_file="model.gguf", dtype=dtype)'),
        (("spqr",), "from algorithms.formats.spqr.packed import load_packed"),
        (
            ("dense", "spqr"),
            "- `exports/spqr`: `from pathlib import Path`, `from algorithms.formats.spqr.packed import load_packed`",
        ),
        (("ragged",), "AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)"),
        (("ragged",), "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)"),
        (("ragged",), "run `modeling_ragged.py` of this folder, so read it first"),
        (("padded", "ragged"), "AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)"),
        (("padded", "ragged"), "AutoTokenizer.from_pretrained(folder)"),
        (("padded", "ragged"), "- `exports/ragged`: `model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust"),
        (("awq",), "neither was run on this folder"),
        (("gptq",), "neither was run on this folder"),
        (("compressed-tensors",), "pip install compressed-tensors"),
    ],
)
def test_the_card_says_how_each_format_is_loaded(formats, said):
    certificates = tuple(FormatCertificate(format=name, verdict=Verdict.PASSED, reason="so") for name in formats)
    text = model_card(dataclasses.replace(summary(), certificates=certificates), formats=formats, recipe="", tags=(), notes=())
    assert said in text


def test_a_further_format_that_failed_is_not_offered():
    failed = (
        FormatCertificate(format="dense", verdict=Verdict.PASSED, reason="so"),
        FormatCertificate(format="gguf", verdict=Verdict.FAILED, reason="not so"),
    )
    text = model_card(
        dataclasses.replace(summary(), certificates=failed), formats=("dense", "gguf"), recipe="", tags=(), notes=()
    )
    assert "exports/gguf" not in text
