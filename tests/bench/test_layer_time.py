"""The time of layers, on a CPU with tiny models: that it runs, and that the words say what was measured."""

import re

import pytest

from miinb.bench import layer_time


def test_a_line_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--tiny",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--models",
        "llama-8b",
        "gpt-neox-20b",
        "--ranks",
        "1",
        "2",
    ]
    layer_time.main([*asked, "--rows", "1", "3", "--rounds", "2", "--steps", "2", "--context", "40"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert names[:4] == ["llama-8b / 1, 1 x 40", "llama-8b / 1, 3 x 40", "llama-8b / 2, 1 x 40", "llama-8b / 2, 3 x 40"]
    assert len(lines) == 8
    assert all(re.search(r" \d+\.\d\d us a layer \(\d+\.\d\d to \d+\.\d\d\), \d+\.\d\d TB/s$", line) for line in lines)


def test_the_median_of_the_rounds_is_told() -> None:
    shape = layer_time.Shape("a", 4, 1e6, lambda: None, [8e-6, 4e-6, 40e-6])
    assert shape.words().split() == ["a", "2.00", "us", "a", "layer", "(1.00", "to", "10.00),", "0.50", "TB/s"]


def test_what_cannot_be_shared_is_told() -> None:
    with pytest.raises(Exception, match="do not divide by 3 ranks"):
        layer_time.main(["--tiny", "--device", "cpu", "--dtype", "fp32", "--ranks", "3"])
