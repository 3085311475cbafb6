"""Two processes train like one with a batch twice as large: every criterion, with both of fairseq's wrappers."""

import faulthandler
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import warm_python
from commands import PATIENCE, end_together, free_port
from tiny import save_llm, save_whisper, write_split
from torch import Tensor, distributed

import blspkd_fairseq
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.modules import precision
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm

blspkd_fairseq.register()

from fairseq.dataclass.configs import DistributedTrainingConfig  # noqa: E402
from fairseq.models import DistributedFairseqModel  # noqa: E402
from torch.distributed.utils import _to_kwargs  # noqa: E402

from blspkd_fairseq.criterions.kl_distillation import KlDistillationConfig, KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.criterions.on_policy_distillation import (  # noqa: E402
    OnPolicyDistillationConfig,
    OnPolicyDistillationCriterion,
)
from blspkd_fairseq.data.dataset import SpeechTextDataset  # noqa: E402
from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402

BACKENDS = ("legacy_ddp", "pytorch_ddp")  # torch's leaves hooks behind
NO_KL: dict[str, Any] = {"response_kl_weight": 0, "input_kl_weight": 0}
ALL_TERMS: dict[str, Any] = {
    f"{name}_weight": 1.0 for name in ("response_ce", "end_of_turn_kl", "response_l2", "token_ce", "token_mse")
}
WARM_UP = NO_KL | {"token_ce_weight": 1.0, "token_mse_weight": 1.0}


class Case(NamedTuple):
    """Attributes: options of the criterion, of the model, and whether the criterion is on-policy distillation."""

    criterion: dict[str, Any]
    model: dict[str, Any] = {}
    on_policy: bool = False


CASES = {
    "distillation": Case(ALL_TERMS),
    "distillation in float32": Case(ALL_TERMS, {"llm_dtype": "float32"}),
    "warm-up": Case(WARM_UP),
    "warm-up without LoRA": Case(WARM_UP, {"lora_scope": "none"}),
    "cross-entropy": Case(NO_KL | {"response_ce_weight": 1.0}, {"adapter": "cnn", "adapter_bottleneck": 8}),
    "everything trained": Case(
        {},
        {"lora_scope": "all", "unfreeze_speech_encoder": True, "gradient_checkpointing": True, "llm_dtype": "float32"},
    ),
    "X-OPD, sampled": Case({}, {"llm_dtype": "float32"}, on_policy=True),
    "X-OPD, exact": Case({"estimator": "exact"}, {"llm_dtype": "float32", "lora_scope": "all"}, on_policy=True),
}


def build(root: Path, case: Case) -> tuple[BlspKdModel, Any]:
    """The model of a case, the LLM's table in bfloat16 its first parameter, and its criterion."""
    options = {
        "llm_dtype": "bfloat16", "adapter_pre_layers": 1, "adapter_post_layers": 1, "adapter_heads": 2,
        "adapter_dropout": 0, "lora_rank": 4, "lora_dropout": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = SpeechLlmConfig(speech_encoder=str(root / "whisper"), llm=str(root / "llm"), **options | case.model)
    model = BlspKdModel(*build_speech_llm(config)).train()
    task = SimpleNamespace(chat=model.chat, target_dictionary=None)
    if not case.on_policy:
        return model, KlDistillationCriterion(KlDistillationConfig(**case.criterion), task)
    defaults = {"rollouts": 2, "rollout_max_tokens": 4, "seed": 1}
    return model, OnPolicyDistillationCriterion(OnPolicyDistillationConfig(**defaults | case.criterion), task)


def sample_of(root: Path, model: BlspKdModel, rows: range) -> dict[str, Any]:
    data = SpeechTextDataset(
        Manifest.load(root / "train.tsv"), model.chat, lengths=model.speech_llm.speech_lengths
    )  # fmt: skip
    return data.collater([data[row] for row in rows])


def gradients(model: BlspKdModel, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: p.grad * scale for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def one_process(root: Path, case: Case) -> dict[str, Tensor]:
    """Gradients of all rows in one batch."""
    model, criterion = build(root, case)
    criterion(model, sample_of(root, model, range(4)))[0].backward()
    return gradients(model)


def wrap(model: BlspKdModel, backend: str) -> Any:
    """As fairseq's trainer does."""
    options = DistributedTrainingConfig(ddp_backend=backend, device_id=0, tpu=False)
    return DistributedFairseqModel(options, model, distributed.group.WORLD, torch.device("cpu"))


def one_of_two(root: Path, rank: int, port: int) -> None:
    """Two updates of every case on half of the rows; the gradients of the second are left in a file."""
    faulthandler.dump_traceback_later(PATIENCE - 60, exit=True)  # a process that hangs says where
    precision._cpu_has_bfloat16 = lambda: True  # as in the process that they are compared with (conftest)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    found = {}
    for name, case in CASES.items():
        model, criterion = build(root, case)
        sample = sample_of(root, model, range(2 * rank, 2 * rank + 2))
        for backend in BACKENDS:
            wrapped = wrap(model, backend)
            for _ in range(2):  # torch says in the next update that a gradient was missing
                model.zero_grad()
                criterion(wrapped, sample)[0].backward()
                if backend == "legacy_ddp":
                    wrapped.all_reduce_grads()
            found[name, backend] = gradients(model, scale=2.0)  # both wrappers average over processes
    if rank == 0:
        torch.save(found, root / "gradients.pt")
    distributed.barrier()  # none leaves while the other may still wait for the last sum
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_llm(root / "llm")
    save_whisper(root / "whisper")
    write_split(root, "train", 4)
    return root


@pytest.fixture(scope="module")
def two_processes(root: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Gradients by case and wrapper; all in one go, since a process takes seconds to begin."""
    port = free_port()
    end_together(
        [
            subprocess.Popen(
                [warm_python.commands() / "python", __file__, root, str(rank), str(port)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]
    )
    return torch.load(root / "gradients.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one(
    root: Path, two_processes: dict[tuple[str, str], dict[str, Tensor]], name: str
) -> None:
    whole = one_process(root, CASES[name])
    for backend in BACKENDS:
        half = two_processes[name, backend]
        assert half.keys() == whole.keys() and any(bool(one.any()) for one in half.values())
        for parameter, gradient in whole.items():
            assert gradient.dtype == half[parameter].dtype == torch.float32
            # Rounding of sums: relative to the largest entry. Products in bfloat16 round by the batch's shape, too.
            most = 0.01 if name == "distillation" else 1e-5
            difference = (half[parameter] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
            assert difference < most, (backend, parameter, float(difference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_process_leaves_gradients_as_they_are(root: Path, tmp_path: Path, backend: str) -> None:
    """Bit for bit, though the first parameter of the model, the LLM's table, is in bfloat16."""
    model, criterion = build(root, CASES["distillation"])
    sample = sample_of(root, model, range(2))
    criterion(model, sample)[0].backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = wrap(model, backend)
        criterion(wrapped, sample)[0].backward()
        if backend == "legacy_ddp":
            wrapped.all_reduce_grads()
            assert wrapped.buffer.numel() == sum(gradient.numel() for gradient in expected.values())
    finally:
        distributed.destroy_process_group()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_batch_reaches_a_gpu_of_pytorch_ddp_in_one_piece(root: Path) -> None:
    """torch moves what it knows, tensors and containers; the plan stays whole."""
    model, _ = build(root, CASES["warm-up"])
    inputs = sample_of(root, model, range(2))["net_input"]
    _, (moved,) = _to_kwargs((), inputs | {"positions": ()}, torch.device("meta"), False)
    assert all(moved[name].device.type == "meta" for name in ("src_tokens", "src_lengths", "plan"))
    assert moved["spec"] is inputs["spec"] and moved["samples"] == inputs["samples"] and moved["positions"] == ()


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]), *map(int, sys.argv[2:]))
