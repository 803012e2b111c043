import pytest

from miinb.bench import served
from miinb.demo import tiny_model


def test_it_measures_both_arms_and_compares_their_answers(capsys: pytest.CaptureFixture[str]) -> None:
    served.main([str(tiny_model()), "--dtypes", "fp32", "--at-once", "2", "--requests", "2", "--new-tokens", "4"])
    table, _, ratio = capsys.readouterr().out.partition("fp32: ")
    table = table.partition("Percentiles")[0]
    optimized = [line.split() for line in table.splitlines() if line.startswith("optimized")]
    assert ["yes" in words for words in optimized] == [True, True]  # the same answers
    assert "2 requests at once, optimized, have" in ratio
