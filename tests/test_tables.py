"""One table in four formats: columns are aligned, and no cell breaks out of its place."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksoup.tables import Table, printable

CELLS = st.text("a|\\<&_ \n", max_size=6)


@st.composite
def tables(draw):
    n = draw(st.integers(1, 4))
    line = st.lists(CELLS, min_size=n, max_size=n)
    left = draw(st.sets(st.integers(0, n - 1)))
    return Table(draw(line), draw(st.lists(line, max_size=4)), left)


def test_columns_of_text_are_padded_on_the_side_that_was_asked_for():
    table = Table(
        ("name", "score", "note"), [("a", "1.50", ""), ("long name", "10.25", "x")], (0, 2)
    )
    assert table.to_text().splitlines() == [
        "name       score  note",
        "a           1.50",
        "long name  10.25  x",
    ]
    assert table.to_text(rule=True).splitlines()[1] == "-" * 22
    assert Table(("name", "score"), []).to_text(rule=True) == "name  score\n-----------"


def test_markdown():
    table = Table(("name", "score"), [("a|b", "1"), ("c\nd", "2")])
    assert table.to_markdown().splitlines() == [
        "| name | score |",
        "| --- | ---: |",
        r"| a\|b | 1 |",
        "| c d | 2 |",
    ]


def test_latex():
    table = Table(("100 %", "R_2"), [("a & b", "1 ± 2"), ("~^\\", "$3")], left=(1,))
    assert table.to_latex().splitlines() == [
        r"\begin{tabular}{rl}",
        r"\toprule",
        r"100 \% & R\_2 \\",
        r"\midrule",
        r"a \& b & 1 $\pm$ 2 \\",
        r"\textasciitilde{}\textasciicircum{}\textbackslash{} & \$3 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_html():
    assert Table(("a", "b"), [("<i>", "1")]).to_html() == (
        "<table><tr><th>a</th><th class=number>b</th></tr>"
        "<tr><td>&lt;i&gt;</td><td class=number>1</td></tr></table>"
    )


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.rows[-1][-1] += data


@given(tables())
def test_no_cell_breaks_out_of_its_place(table):
    lines = [list(table.header), *map(list, table.rows)]
    assert Cells(table.to_html()).rows == [list(map(printable, line)) for line in lines]
    markdown = table.to_markdown().splitlines()
    assert len(markdown) == len(lines) + 1
    for line in markdown:
        # a backslash escapes what follows it, as in GitHub's grammar
        assert len(re.sub(r"\\.", "", line).split("|")) == len(table.header) + 2


def test_empty_columns_are_left_out():
    table = Table(
        ("name", "score", "note", "n"), [("a", "-", "", "1"), ("b", "-", "x", "2")], (0, 2)
    )
    found = table.without_empty()
    assert found.header == ["name", "note", "n"]
    assert found.rows == [["a", "", "1"], ["b", "x", "2"]]
    assert found.left == [0, 1]


def test_rows_that_do_not_fit_the_header_are_refused():
    with pytest.raises(ValueError, match="zip"):
        Table(("a", "b"), [("1",)]).to_text()
