from __future__ import annotations

from sksoup.inspection import SoupComparison, SoupResult


def test_tables_of_other_kinds():
    rows = (
        SoupResult("a|b_c", 0.9, 0.88, 0.1, 0.0, 0.0, 1.2, 24, 0.01, 0.02, 3),
        SoupResult("d\\e", 0.8, None, 0.1, 0.0, 0.0, 1.2, 24),
    )
    found = SoupComparison(rows, {}, 10)
    assert "No test data was given" in found.statement
    assert r"| a\|b_c | 90.00 ± 1.00 | 88.00 ± 2.00 |" in found.to_markdown()
    latex = found.to_latex()
    assert r"a|b\_c & 90.00 $\pm$ 1.00 & 88.00 $\pm$ 2.00 & 0.10" in latex
    assert r"validation \%" in latex
    assert r"d\textbackslash{}e & 80.00 & - &" in latex
    assert latex.count(r"\\") == 3
    assert latex.startswith(r"\begin{tabular}{lrrrrrrr}")
    frame = found.to_frame()
    assert list(frame.index) == ["a|b_c", "d\\e"]
    assert frame.loc["a|b_c", "test_std"] == 0.02
