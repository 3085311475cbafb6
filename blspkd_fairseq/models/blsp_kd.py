"""The fairseq model ``blsp_kd``: a :class:`SpeechLLM` whose checkpoints hold only what was trained."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor

from blspkd_fairseq.data.batch import Batch, FlatSpec
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.speech_llm import SpeechLLM, SpeechLlmOutput
from blspkd_fairseq.modules.trained_state import load_trained_state_dict, trained_state_dict


@dataclass
class BlspKdModelConfig(SpeechLlmConfig, FairseqDataclass):
    """Options of ``--arch blsp_kd``."""


@register_model("blsp_kd", dataclass=BlspKdModelConfig)
class BlspKdModel(BaseFairseqModel):
    """Speech encoder -> adapter -> LLM; see :class:`~blspkd_fairseq.modules.speech_llm.SpeechLLM`."""

    def __init__(self, speech_llm: SpeechLLM, chat: ChatFormat) -> None:
        super().__init__()
        self.speech_llm = speech_llm
        self.chat = chat
        self.num_updates = 0

    @classmethod
    def build_model(cls, cfg: BlspKdModelConfig, task: Any) -> "BlspKdModel":
        return cls(*build_speech_llm(cfg))

    def forward(
        self,
        src_tokens: Tensor | None,
        src_lengths: Tensor,
        plan: Tensor,
        spec: FlatSpec,
        samples: Sequence[int],
        positions: Collection[str] = ("input", "response"),
        teacher: bool = True,
        text_replies: Batch | None = None,
        features: Tensor | None = None,
    ) -> SpeechLlmOutput:
        """A collated batch (see :class:`~blspkd_fairseq.data.dataset.SpeechTextDataset`) for :class:`SpeechLLM`."""
        return self.speech_llm(
            src_tokens,
            src_lengths,
            spec.build(plan),
            positions,
            teacher,
            text_replies=text_replies,
            samples=samples,
            features=features,
        )

    def set_num_updates(self, num_updates: int) -> None:
        """The trainer says how many updates were made; roll-outs are seeded by it."""
        # Without fairseq's walk over all modules, none of which wants to know.
        self.num_updates = num_updates

    def max_positions(self) -> None:
        """fairseq leaves out nothing: what is too long to train on is said when its manifest is loaded."""
        return None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Trained parameters only: every way in which fairseq saves, averages or copies weights comes through here."""
        return trained_state_dict(self.speech_llm)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> None:
        load_trained_state_dict(self.speech_llm, state_dict)
