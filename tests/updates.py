"""One update of every criterion on tiny models and one batch, on any device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from tiny import save_llm, save_whisper, wake_lora, write_split
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import blspkd_fairseq
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm

blspkd_fairseq.register()

from fairseq import utils  # noqa: E402
from fairseq.optim.adam import Adam  # noqa: E402

from blspkd_fairseq.criterions import on_policy_distillation  # noqa: E402
from blspkd_fairseq.criterions.kl_distillation import KlDistillationConfig, KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.criterions.on_policy_distillation import (  # noqa: E402
    OnPolicyDistillationConfig,
    OnPolicyDistillationCriterion,
)
from blspkd_fairseq.criterions.sums import Sums  # noqa: E402
from blspkd_fairseq.data.dataset import SpeechTextDataset  # noqa: E402
from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402

ROWS = 3
# What the student is said to have answered: drawn on two devices, words differ where probabilities do by rounding.
ROLLOUTS = [[11, 12, 13, 14], [21, 22], [31, 32, 33], [41], [51, 52, 53], [61, 62]]


class Case(NamedTuple):
    """Options of a criterion, and of the model where it needs others. ``on_policy``: the criterion of roll-outs."""

    options: Mapping[str, Any]
    model: Mapping[str, Any] = {}
    on_policy: bool = False


_NO_KL = {"response_kl_weight": 0.0, "input_kl_weight": 0.0}
_ALL_TERMS = ("response_ce", "end_of_turn_kl", "response_l2", "token_ce", "token_mse")
_DRAWN = {"rollouts": 2, "rollout_max_tokens": 4, "seed": 1}
CASES = {
    "kl_distillation, all terms": Case({f"{name}_weight": 1.0 for name in _ALL_TERMS}),
    "warm-up": Case(_NO_KL | {"token_ce_weight": 1.0, "token_mse_weight": 1.0}),
    "cross-entropy, CNN": Case(_NO_KL | {"response_ce_weight": 1.0}, {"adapter": "cnn", "adapter_bottleneck": 8}),
    "LoRA everywhere, encoder trained": Case({}, {"lora_scope": "all", "unfreeze_speech_encoder": True}),
    "gradient checkpointing": Case({}, {"gradient_checkpointing": True}),
    "on_policy, sampled": Case(_DRAWN, on_policy=True),
    "on_policy, exact, student reads": Case(_DRAWN | {"estimator": "exact"}, {"lora_scope": "all"}, on_policy=True),
    "on_policy, fixed responses": Case(_DRAWN | {"off_policy_share": 1.0}, on_policy=True),
}


class TinyWorld:
    """Models and data on disk."""

    def __init__(self, root: Path) -> None:
        self.llm, self.whisper = save_llm(root / "llm"), save_whisper(root / "whisper")
        self.manifest = Manifest.load(write_split(root / "data", "train", ROWS))

    def build(self, case: Case, device: torch.device, llm_dtype: str = "float32") -> BlspKdModel:
        """The model in training, its LoRA already somewhere else than at zero; the same weights every time."""
        torch.manual_seed(0)
        options = {"adapter_heads": 2, "adapter_pre_layers": 1, "adapter_post_layers": 1, "lora_rank": 4}
        options |= {"adapter_dropout": 0.0, "lora_dropout": 0.0, "llm_dtype": llm_dtype} | dict(case.model)
        speech_llm, chat = build_speech_llm(
            SpeechLlmConfig(llm=str(self.llm), speech_encoder=str(self.whisper), **options)
        )
        wake_lora(speech_llm, 0.1)
        return BlspKdModel(speech_llm, chat).to(device).train()

    def sample(self, model: BlspKdModel, device: torch.device) -> dict[str, Any]:
        """The batch as the trainer has it."""
        data = SpeechTextDataset(self.manifest, model.chat, lengths=model.speech_llm.speech_lengths)
        sample = data.collater([data[row] for row in range(ROWS)])
        return utils.move_to_cuda(sample, device) if device.type == "cuda" else sample


def criterion_of(case: Case, model: BlspKdModel) -> Any:
    task = SimpleNamespace(chat=model.chat, target_dictionary=None)
    if case.on_policy:
        return OnPolicyDistillationCriterion(OnPolicyDistillationConfig(**case.options), task)
    return KlDistillationCriterion(KlDistillationConfig(**case.options), task)


def optimizer_of(model: BlspKdModel) -> torch.optim.Optimizer:
    """fairseq's Adam, as training has it."""
    return Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def update(model: BlspKdModel, criterion: Any, sample: dict[str, Any], optimizer: torch.optim.Optimizer) -> Tensor:
    """Forward, backward, clipping and step; the loss stays on the device."""
    optimizer.zero_grad()
    loss, _, _ = criterion(model, sample)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return loss.detach()


@contextmanager
def fixed_rollouts() -> Iterator[None]:
    """The student answers :data:`ROLLOUTS`, whatever it thinks."""

    def answer(llm: Any, chat: Any, prompts: Any, seeds: Sequence[int], options: Any) -> list[list[int]]:
        return [ROLLOUTS[i % len(ROLLOUTS)] for i in range(len(seeds))]

    with mock.patch.object(on_policy_distillation, "roll_out", answer):
        yield


# ---- host reads -----------------------------------------------------------------------------------------------------

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}


class HostRead(AssertionError):
    """Something asked the device for a value."""


class _RefuseOperators(TorchDispatchMode):
    """Refuses on the CPU what would make a GPU's host wait."""

    refuses = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.refuses and (func in _READS or _indexes_by_mask(func, args)):
            raise HostRead(f"{func} asks the device for a value")
        return func(*args, **(kwargs or {}))


class _RefuseLists(TorchFunctionMode):
    """What reads the memory of a CPU's tensor without an operator."""

    refuses = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.refuses and func in (Tensor.tolist, Tensor.numpy):
            raise HostRead(f"{func.__name__} asks the device for values")
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(func: Any, args: Any) -> bool:
    if func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@contextmanager
def no_host_reads(device: torch.device) -> Iterator[None]:
    """An error where the host reads the device, but for what is logged and for roll-outs.

    On a GPU it is torch's own debugging mode that says so, on the CPU the names of the operators.
    """
    operators, lists = _RefuseOperators(), _RefuseLists()

    def refuse(on: bool) -> None:
        operators.refuses = lists.refuses = on
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    def lifted(method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            refuse(False)
            try:
                return method(*args, **kwargs)
            finally:
                refuse(True)

        return run

    # A draw by the seed, alike in every process, is made and read on the CPU.
    allowed = {Sums: ["read"], OnPolicyDistillationCriterion: ["_roll_out", "_is_off_policy"]}
    with ExitStack() as stack:
        for cls, names in allowed.items():
            for name in names:
                stack.enter_context(mock.patch.object(cls, name, lifted(getattr(cls, name))))
        refuse(True)
        try:
            if device.type == "cuda":
                yield
            else:
                with operators, lists:
                    yield
        finally:
            refuse(False)
