"""An update asks the device for nothing but its figures: on a GPU every question waits for all that was begun.

On a CPU the questions can be seen: operators whose result has a size that depends on numbers, those that turn a tensor
into a Python number, and those that make a tensor of Python numbers, which has to reach the device.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save_llm, save_whisper, write_split
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import blspkd_fairseq
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm

blspkd_fairseq.register()

from blspkd_fairseq.criterions.kl_distillation import KlDistillationConfig, KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.criterions.on_policy_distillation import (  # noqa: E402
    OnPolicyDistillationConfig,
    OnPolicyDistillationCriterion,
)
from blspkd_fairseq.data.dataset import SpeechTextDataset  # noqa: E402
from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402

ASKING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "_unique2",
}  # fmt: skip
ON_CPU = ("batch.py", "short_attention.py")  # where plans are made in the worker, and for a CPU's products alone
READING = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
TERMS = ("response_kl", "input_kl", "response_ce", "end_of_turn_kl", "response_l2", "token_ce", "token_mse")


class Questions(TorchDispatchMode):
    """Counts the questions to the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if (
            name in ASKING
            or (name.startswith(("index", "_index_put")) and _has_bool_index(args))
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            or (name == "lift_fresh" and not _place().startswith(ON_CPU))
        ):
            self.asked[f"{name} {_place()}"] += 1
        return func(*args, **kwargs)


def _has_bool_index(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _place() -> str:
    """The line of this package that asks."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(blspkd_fairseq.FOLDER))]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


@contextmanager
def questions() -> Iterator[Counter[str]]:
    """What is asked inside of the block; what one reading asks by another is counted once."""
    with Questions() as mode, pytest.MonkeyPatch.context() as patch:
        for name in READING:
            patch.setattr(Tensor, name, _counted(name, getattr(Tensor, name), mode))
        yield mode.asked


def _counted(name: str, read: Any, mode: Questions) -> Any:
    def counted(self: Tensor, *args: Any) -> Any:
        before = mode.asked.copy()
        result = read(self, *args)
        mode.asked.clear()
        mode.asked.update(before)
        mode.asked[f"{name} {_place()}"] += 1
        return result

    return counted


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_llm(root / "llm")
    save_whisper(root / "whisper")
    write_split(root, "train", 6)
    return root


def build(root: Path, **options: Any) -> BlspKdModel:
    small = {"adapter_pre_layers": 1, "adapter_post_layers": 1, "adapter_heads": 2, "adapter_bottleneck": 8}
    config = SpeechLlmConfig(
        speech_encoder=str(root / "whisper"), llm=str(root / "llm"), **small | {"lora_rank": 4} | options
    )
    return BlspKdModel(*build_speech_llm(config)).train()


def batches(root: Path, model: BlspKdModel) -> list[dict[str, Any]]:
    data = SpeechTextDataset(
        Manifest.load(root / "train.tsv"),
        model.chat,
        lengths=model.speech_llm.speech_lengths,
        share_prefix=model.speech_llm.share_prefix,
    )
    return [data.collater([data[row] for row in rows]) for rows in (range(3), range(3, 6))]


def assert_only_figures_are_read(model: BlspKdModel, criterion: Any, sample: dict[str, Any]) -> None:
    with questions() as asked:
        criterion(model, sample)[0].backward()
    assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    assert asked.total() == 1 and next(iter(asked)).startswith("tolist sums.py"), asked


def distillation(model: BlspKdModel, **weights: float) -> KlDistillationCriterion:
    none = {f"{name}_weight": 0.0 for name in TERMS}
    cfg = KlDistillationConfig(**none | {f"{name}_weight": value for name, value in weights.items()})
    return KlDistillationCriterion(cfg, SimpleNamespace(chat=model.chat, target_dictionary=None))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_scope": "all", "gradient_checkpointing": True, "unfreeze_speech_encoder": True},
        {"lora_scope": "none", "no_shared_prefix": True, "pad_to_30s": True},
        {"adapter_alignment": "pif", "llm_dtype": "float32"},
        {"cache_encoder_features": True},
    ],
    ids=str,
)
def test_distillation_with_all_terms(root: Path, options: dict[str, Any]) -> None:
    model = build(root, **options)
    criterion = distillation(model, **dict.fromkeys(TERMS, 1.0))
    for sample in batches(root, model):
        assert_only_figures_are_read(model, criterion, sample)


def test_the_warm_up(root: Path) -> None:
    model = build(root)
    criterion = distillation(model, token_ce=1.0, token_mse=1.0)
    for sample in batches(root, model):
        assert_only_figures_are_read(model, criterion, sample)


def test_cross_entropy_with_the_cnn(root: Path) -> None:
    model = build(root, adapter="cnn")
    criterion = distillation(model, response_ce=1.0, response_kl=1.0)
    for sample in batches(root, model):
        assert_only_figures_are_read(model, criterion, sample)


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
@pytest.mark.parametrize("lora_scope", ["speech", "all"])
def test_on_policy_distillation_but_for_its_roll_outs(root: Path, estimator: str, lora_scope: str) -> None:
    model = build(root, lora_scope=lora_scope, llm_dtype="float32")
    cfg = OnPolicyDistillationConfig(rollouts=2, rollout_max_tokens=4, seed=1, estimator=estimator)
    criterion = OnPolicyDistillationCriterion(cfg, SimpleNamespace(chat=model.chat, target_dictionary=None))
    roll_out = criterion._roll_out
    for sample in batches(root, model):
        rolled = roll_out(model, sample)
        criterion._roll_out = lambda *_, rolled=rolled: rolled  # type: ignore[method-assign]
        assert_only_figures_are_read(model, criterion, sample)


def test_questions_are_seen() -> None:
    """Each of those that this file looks for."""
    numbers, places, found = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 2, 1]), []
    for ask in (
        lambda: numbers.tolist(),
        lambda: numbers[numbers > 0],
        lambda: float(numbers.sum()),
        lambda: bool((numbers > 0).any()),
        lambda: numbers.nonzero(),
        lambda: torch.equal(numbers, numbers),
        lambda: numbers.masked_select(numbers > 0),
        lambda: numbers.clone().__setitem__(numbers > 0, torch.ones(2)),
        lambda: numbers.repeat_interleave(places),
        lambda: torch.arange(3)[: numbers.long()[0]],
        lambda: numbers[[0, 2]],
        lambda: torch.tensor([1, 2]),
    ):
        with questions() as asked:
            ask()
        found.append(asked.total())
    assert found == [1] * len(found)
    with questions() as asked:
        numbers[places].clamp(min=1).sum()
        numbers.masked_fill(numbers > 0, 1.0)
        numbers.repeat_interleave(places, output_size=3)
    assert not asked
