"""The benchmark that is meant for a GPU, shortened, on a CPU."""

from shared.measure import estimate
from tests.benchmarks import gpu
from tests.conftest import call


def test_the_gpu_benchmark_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    call(gpu.main, "--sizes", "32", "--matrix", "64")
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:4] for row in rows[1:3]] == [["1", "32", "64", "False"], ["2", "32", "64", "False"]]
    assert all(float(row[4]) > 0 and row[6].endswith("%") for row in rows[1:3])
    assert [row[0] for row in rows[4:]] == ["1", "4"] and all(float(row[2]) > 0 for row in rows[4:])
