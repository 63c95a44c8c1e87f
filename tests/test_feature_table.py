"""The table of families and features in docs/models.md has an entry only where a test exists."""

from pathlib import Path

import pytest
from feature_table import BEGIN, END, PAGE, cell, outcomes, pairs_in, spoken_for, table

from bench.generated import updated

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="feature" value="qwen2_vl: beams"/></properties></testcase>
<testcase name="b"><properties><property name="feature" value="qwen2_vl: beams"/></properties><failure/></testcase>
<testcase name="c"><properties><property name="feature" value="qwen3_5: beams"/></properties><skipped/></testcase>
<testcase name="d"><properties><property name="feature" value="qwen3_5: batches"/></properties></testcase>
<testcase name="e"/>
</testsuite></testsuites>"""


class Collected:
    """A pytest plugin that notes what the collected tests speak for."""

    def __init__(self):
        self.pairs = set()

    def pytest_collection_finish(self, session):
        self.pairs.update(pair for item in session.items for pair in spoken_for(item))


def test_every_entry_has_a_test():
    collected = Collected()
    folder = Path(__file__).parent
    assert pytest.main(["--collect-only", "-q", "-m", "feature", str(folder)], plugins=[collected]) == 0
    entries = pairs_in(PAGE.read_text(encoding="utf-8"))
    assert len(entries) > 9
    assert entries <= collected.pairs, f"run `make features`: no test speaks for {entries - collected.pairs}"


def test_the_table_says_what_the_report_says(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert table(outcomes(tmp_path / "report.xml")).splitlines() == [
        "| | beams | batches |",
        "|---|---|---|",
        "| Qwen2-VL | **no** |  |",
        "| Qwen3.5 | - | yes |",
    ]


def test_only_the_table_is_replaced():
    text = f"before\n{BEGIN}\n{END}\nbehind"
    for new in ("| | beams |\n|---|---|\n| Qwen2-VL | yes |", "| | beams |\n|---|---|\n| Qwen3.5 | - |"):
        text = updated(text, new, BEGIN, END)
        assert text == f"before\n{BEGIN}\n\n{new}\n\n{END}\nbehind"
    assert pairs_in(text) == {("qwen3_5", "beams")}


def test_an_entry_for_each_outcome():
    assert [cell(results) for results in ({"passed", "skipped"}, {"skipped"}, {"passed", "failed"}, set())] == [
        "yes", "-", "**no**", "",
    ]  # fmt: skip
