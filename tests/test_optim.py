"""The fused AdamW against fairseq's Adam, and both through training that is resumed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import load, train
from tiny import save_llm, save_whisper, write_split
from torch import nn

import blspkd_fairseq

blspkd_fairseq.register()

from fairseq.optim.adam import FairseqAdam  # noqa: E402

from blspkd_fairseq.optim.adamw import AdamW  # noqa: E402

OPTIONS = {"lr": [0.01], "adam_eps": 1e-12, "weight_decay": 0.1, "use_old_adam": True, "tpu": False}
SETTINGS = SimpleNamespace(**OPTIONS, adam_betas="(0.8, 0.95)", fp16_adam_stats=False)
LARGE_EPSILON = SimpleNamespace(**vars(SETTINGS) | {"adam_eps": 0.1})  # beside which the size of a gradient matters


def test_it_takes_the_steps_of_fairseqs_adam() -> None:
    weights = []
    for kind in (FairseqAdam, AdamW):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        optimizer = kind(SETTINGS, parameters)
        for _ in range(5):
            sum((p - 1).square().sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_gradients_are_averaged_and_clipped_as_by_fairseq(max_norm: float, factor: float) -> None:
    found = []
    for kind in (FairseqAdam, AdamW):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.ones(2))]
        optimizer = kind(SETTINGS, parameters)
        for _ in range(3):
            optimizer.zero_grad()
            sum(p.square().sum() for p in parameters[:2]).backward()  # one parameter has no gradient
            optimizer.multiply_grads(factor)
            norm = optimizer.clip_grad_norm(max_norm, lambda norm: 2 * norm)
            optimizer.step()
        means = [optimizer.optimizer.state[p]["exp_avg"].flatten() for p in parameters[:2]]
        found.append(torch.cat([norm.view(1), *means, *(p.detach().flatten() for p in parameters)]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_gradients_that_are_dropped_take_their_factor_along() -> None:
    weights = []
    for drops in (True, False):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = AdamW(LARGE_EPSILON, [parameter])
        if drops:
            parameter.sum().backward()
            optimizer.multiply_grads(0.01)
            optimizer.zero_grad()
        parameter.sum().backward()
        optimizer.step(scale=2.0)
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_nothing_has_the_norm_0(max_norm: float) -> None:
    assert float(AdamW(SETTINGS, [nn.Parameter(torch.ones(2))]).clip_grad_norm(max_norm)) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_training_is_resumed(tmp_path: Path, optimizer: str) -> None:
    llm, whisper = save_llm(tmp_path / "llm"), save_whisper(tmp_path / "whisper")
    write_split(tmp_path, "train", 4)
    options = ("--optimizer", optimizer, "--weight-decay", 0.1, "--disable-validation", "--adam-betas", "(0.9, 0.98)")
    for folder, stops in (("whole", (4,)), ("parts", (2, 4))):
        for updates in stops:
            train(tmp_path, tmp_path / folder, llm, whisper, *options, "--max-update", updates)
    one, other = (load(tmp_path / folder / "checkpoint_last.pt") for folder in ("whole", "parts"))
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, other["model"][name], atol=2e-6, rtol=1e-5)
    assert one["last_optimizer_state"]["param_groups"][0]["betas"] == (0.9, 0.98)
