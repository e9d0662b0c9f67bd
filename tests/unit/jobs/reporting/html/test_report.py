import dataclasses
import re
from html.parser import HTMLParser

from jobs.reporting.certificate import FormatCertificate, Verdict
from jobs.reporting.html.report import report
from jobs.reporting.html.settings import settings_of
from tests.support.fake_job import recipe
from tests.unit.jobs.reporting.html.accounts import account
from tests.unit.jobs.reporting.test_summary import summary


class _Seen(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_everything_is_on_one_page_and_nothing_is_asked_of_the_network(tmp_path):
    page = report(account(tmp_path))
    seen = _Seen(page)
    assert not {"script", "link", "iframe", "img", "object"} & set(seen.tags)
    assert not [a for a in seen.attributes if a[1] in ("src", "srcset", "action") or (a[1] == "href" and a[0] != "use")]
    outside = re.findall(r"(?:https?:)?//[^\s\"'<>)]+", re.sub(r'xmlns(:xlink)?="[^"]*"', "", page))
    assert not outside
    assert "url(http" not in page
    assert "mathdefault" not in page, "a number on an axis is written as it is read"
    assert "@import" not in page
    assert ("meta", "http-equiv", "Content-Security-Policy") in seen.attributes
    # quality, bits, three of errors, three of tuning, costs
    assert seen.tags.count("svg") == 9
    ids = [value for _, name, value in seen.attributes if name == "id"]
    sections = [value for tag, name, value in seen.attributes if (tag, name) == ("section", "id")]
    assert sections == ["certificate", "quality", "bits", "errors", "tuning", "costs", "warnings", "environment", "recipe"]
    assert len(set(sections)) == len([i for i in ids if i in sections])


def test_the_verdict_and_the_figures_are_said(tmp_path):
    texts = " | ".join(_Seen(report(account(tmp_path))).texts)
    for said in (
        "aqlm: passed", "2.480", "22.02 → 23.5", "perplexity on ptb at 256 tokens, +6.72 %", "ptb +6.72 % (+6.00 to +7.50 %)",
        "3.0 MB → 1.2 MB", "exact_match,strict-match", "0.5 ± 0.013 -> 0.4444 ± 0.014", "self_attn.q_proj", "512.0 MB", "2.13",
        "500 parameters in 16 bits: embeddings, norms, head", "not a bound", "Kompress/one",
    ):  # fmt: skip
        assert said in texts, said


def test_bits_add_up_to_the_whole(tmp_path):
    """2480 bits of codes, books and scales, and 500 parameters in 16 bits: 10480 bits are 1310 bytes, of 1250000 on disk."""
    page = report(account(tmp_path))
    found = re.findall(
        r'<td class="\w+">(codes|all|500 par|padding|weights on disk)[^<]*</td><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)<', page
    )
    assert found == [
        ("codes", "2.0000", "250 B"), ("500 par", "", "1.0 kB"), ("all", "", "1.3 kB"), ("padding", "", "1.2 MB"),
        ("weights on disk", "", "1.2 MB"),
    ]  # fmt: skip
    assert "6666.667 bits a parameter, padding and headers included" in page, "8 * 1250000 / 1500"


def test_what_a_recipe_says_cannot_become_part_of_the_page(tmp_path):
    evil = '"><script>alert(1)</script>'
    told = dataclasses.replace(
        summary(), model=evil, certificates=(FormatCertificate(format=evil, verdict=Verdict.FAILED, reason=evil),)
    )
    page = report(account(tmp_path, summary=told))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Mind &lt;b&gt;this&lt;/b&gt;." in page
    assert 'class="badge failed"' in page


def test_without_figures_curves_or_exports_there_is_still_a_page(tmp_path):
    bare = dataclasses.replace(summary(), certificates=(), bits=None, size_after=None, figures=type(summary().figures)())
    found = account(tmp_path, summary=bare)
    found.metrics.unlink()
    seen = _Seen(report(found))
    assert "no certificate: nothing was exported" in seen.texts
    assert seen.tags.count("svg") == 1, "the time of the stages"


def test_the_same_account_gives_the_same_page(tmp_path):
    assert report(account(tmp_path)) == report(account(tmp_path))


def test_defaults_are_told_from_what_the_recipe_says(tmp_path):
    loaded = recipe(tmp_path, scale=0.25)
    given = {**loaded.resolved, "llm": {"FAKE": {"scale": 0.25}}, "JOB_PATH": "/old"}
    rows = {row.key: row for row in settings_of(dataclasses.replace(loaded, resolved=given))}
    assert (rows["llm.FAKE.scale"].value, rows["llm.FAKE.scale"].is_default) == (0.25, False)
    assert rows["llm.FAKE.blocks"].is_default
    assert not rows["MODEL"].is_default
    assert rows["TEXT_COLUMN"].is_default
    assert (rows["JOB_PATH"].value, rows["JOB_PATH"].is_default) == ("/old", False), "a key that has no effect"
