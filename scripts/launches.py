"""What one update asks of a device: kernels, copies, waits, operators and peak memory, at the shapes of real models.

Weights and words are random, and nothing is read from disk; the default is Whisper small with Qwen2.5-0.5B.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import blspkd_fairseq
from blspkd_fairseq import compat
from blspkd_fairseq.data.batch import PlanRow, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.data.dataset import pad_waveforms
from blspkd_fairseq.modules import build
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder
from blspkd_fairseq.systems.peak_memory import PeakMemory

KERNELS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Shape:
    """Sizes of an LLM, a Whisper encoder, a CFormer and a batch; utterances vary by a third around the means."""

    layers: int = 24
    width: int = 896
    ffn: int = 4864
    heads: int = 14
    groups: int = 2
    words: int = 151_936
    encoder_layers: int = 12
    encoder_width: int = 768
    encoder_heads: int = 12
    adapter_layers: int = 4
    batch: int = 16
    prefix: int = 30
    transcript: int = 20
    response: int = 40
    seconds: float = 6.0

    @classmethod
    def small(cls) -> "Shape":
        """To see that it works."""
        return cls(2, 64, 96, 4, 2, 500, 2, 32, 4, 1, 4, 6, 5, 8, 1.0)

    def with_layers(self, layers: int) -> "Shape":
        """As many of the LLM, and no more of the encoder."""
        return replace(self, layers=layers, encoder_layers=min(layers, self.encoder_layers))

    def build(self, device: str) -> Any:
        """The fairseq model in training, with the options that are default."""
        blspkd_fairseq.register()
        from blspkd_fairseq.models.blsp_kd import BlspKdModel

        parts = {
            "load_chat_format": lambda config: None,
            "load_llm": lambda config, chat: self._llm(device, build.DTYPES[config.llm_dtype]),
            "_load_speech_encoder": lambda config: self._encoder(device),
        }
        torch.manual_seed(0)
        with mock.patch.multiple(build, **parts):
            config = build.SpeechLlmConfig(
                llm="random",
                speech_encoder="random",
                adapter_pre_layers=self.adapter_layers,
                adapter_post_layers=self.adapter_layers,
            )
            model = BlspKdModel(*build.build_speech_llm(config))
        return model.to(device).train()

    def _llm(self, device: str, dtype: torch.dtype) -> Any:
        config = Qwen2Config(
            vocab_size=self.words,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        compat.use_fast_cpu_attention(llm)
        llm.logit_transform = None
        return llm

    def _encoder(self, device: str) -> SpeechEncoder:
        config = WhisperConfig(
            d_model=self.encoder_width,
            encoder_layers=self.encoder_layers,
            encoder_attention_heads=self.encoder_heads,
            encoder_ffn_dim=4 * self.encoder_width,
        )
        config._attn_implementation = "sdpa"
        with torch.device(device):
            encoder = WhisperEncoder(config)
        return SpeechEncoder(encoder)

    def sample(self, device: str) -> dict[str, Any]:
        """A batch as the trainer has it on the device."""
        generator = torch.Generator().manual_seed(0)

        def about(mean: float) -> list[float]:
            return (mean * (2 / 3 + torch.rand(self.batch, generator=generator) * 2 / 3)).tolist()

        def text(length: float) -> list[int]:
            return torch.randint(self.words, (max(1, round(length)),), generator=generator).tolist()

        prefix, after = text(self.prefix), text(6)
        samples = [int(16_000 * seconds) for seconds in about(self.seconds)]
        spoken, answers = map(text, about(self.transcript)), map(text, about(self.response))
        rows = [
            PlanRow([prefix, Speech(0), after], [transcript], [count], response, [i])
            for i, (transcript, count, response) in enumerate(zip(spoken, samples, answers, strict=True))
        ]
        plan, spec = plan_batch(rows).flatten()
        waveforms = pad_waveforms([torch.randn(count, generator=generator) * 0.1 for count in samples])
        return {
            "net_input": {
                "src_tokens": waveforms.to(device),
                "src_lengths": torch.tensor(samples, device=device),
                "plan": plan.to(device),
                "spec": spec,
                "samples": samples,
            },
            "nsentences": self.batch,
            "ntokens": sum(len(row.response) for row in rows),
            "rows": [{"id": str(i)} for i in range(self.batch)],
            "plan_rows": rows,
            "left_out": False,
        }


class _Dispatched(TorchDispatchMode):
    """Counts the operators that torch hands to a device, without those that they are made of or consist in."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def count(update: Callable[[], Any], device: str) -> str:
    """What an update asks of the device, in words; the last two of five are counted."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        update()
    on_cuda = device == "cuda"
    peak = PeakMemory(on_cuda)
    update()
    added = peak.added()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        update()
        if on_cuda:
            torch.cuda.synchronize()
    calls = {event.key: event.count for event in profiler.key_averages()}
    with _Dispatched() as dispatched:
        update()
    figures = [
        f"{dispatched.total} operators dispatched",
        f"{sum(n for key, n in calls.items() if key.startswith('aten::'))} aten operators with those inside of them",
    ]
    if on_cuda:
        for what, names in (("kernel launches", KERNELS), ("copies", COPIES), ("host waits", WAITS)):
            figures.append(f"{sum(calls.get(name, 0) for name in names)} {what}")
        figures.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    elif added is not None:
        figures.append(f"peak {added / 1024:.2f} GiB above the model")
    return ", ".join(figures)
