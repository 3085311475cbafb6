"""The module benchmark at tiny sizes: all implementations compute the same numbers. Nothing is timed."""

import csv
import importlib.util
from pathlib import Path

import bench_modules
import pytest
import torch
from bench_modules import BENCHMARKS, OURS, Run, installed, run_once, to_rows, write

MODULES = {"torch-cif": "torch_cif", "liger-kernel": "liger_kernel"}
OTHERS = [(name, other) for name, b in BENCHMARKS.items() for other in b.implementations if other != OURS]


@pytest.mark.parametrize(("benchmark", "implementation"), OTHERS)
def test_the_alternatives_compute_what_we_compute(benchmark: str, implementation: str) -> None:
    chosen = BENCHMARKS[benchmark]
    distribution, theirs = chosen.implementations[implementation]
    if distribution in MODULES and importlib.util.find_spec(MODULES[distribution]) is None:
        pytest.skip(f"{distribution} is not installed (bash scripts/venv.sh bench)")
    losses, gradients = [], []
    for loss_of in (chosen.implementations[OURS][1], theirs):
        inputs = chosen.inputs(chosen.quick_shape, "cpu", torch.float32)
        loss = loss_of(inputs)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([tensor.grad for tensor in inputs if tensor.requires_grad])
    # torch-cif integrates up to 1e-4 more than n.
    torch.testing.assert_close(losses[1], losses[0], atol=2e-3, rtol=1e-4)
    for their_gradient, our_gradient in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(their_gradient, our_gradient, atol=1e-3, rtol=1e-2)


def test_a_run_starts_without_the_gradient_of_the_last_one() -> None:
    chosen = BENCHMARKS["kl"]
    inputs = chosen.inputs(chosen.quick_shape, "cpu", torch.float32)
    runs = [run_once(chosen.implementations[OURS][1], inputs, "cpu") for _ in range(2)]
    assert runs[0].loss == runs[1].loss and runs[0].gradient_norm == runs[1].gradient_norm > 0


def test_what_is_not_installed_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench_modules, "version", lambda name: "" if name == "torch-cif" else "1.0")
    assert installed("cif") == [OURS]
    assert "bash scripts/venv.sh bench" in capsys.readouterr().out


def test_rows_compare_medians_and_the_largest_peaks_with_ours() -> None:
    ours = [Run(9.0, 9.0, 40.0, 1.0, 2.0), *(Run(s, 2.0, 30.0, 1.0, 2.0) for s in (1.0, 2.0, 5.0))]
    plain = [Run(9.0, 9.0, 100.0, 1.0, 2.0), *(Run(s, 3.0, 90.0, 1.0, 2.0) for s in (4.0, 4.0, 4.0))]
    runs = {OURS: ours, "plain F.kl_div": plain}
    row = to_rows("kl", runs, {"N": 3, "V": 7}, "cpu", torch.float32)[1]
    compared = ("seconds", "seconds_over_ours", "cpu_seconds_over_ours", "peak_over_ours", "shape", "repeats")
    assert [row[name] for name in compared] == ["4.0000", "2.00", "1.50", "2.50", "N3 V7", "3"]


def test_a_table_keeps_the_rows_of_other_devices_and_replaces_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    base = {"benchmark": "cif", "threads": "1", "dtype": "float32", "shape": "B1", "seconds": "1"}
    write(path, [{**base, "device": "one"}, {**base, "device": "two"}])
    write(path, [{**base, "device": "one", "seconds": "9"}])
    with open(path, encoding="utf-8", newline="") as file:
        assert [(row["device"], row["seconds"]) for row in csv.DictReader(file)] == [("two", "1"), ("one", "9")]
    assert list(tmp_path.iterdir()) == [path]
