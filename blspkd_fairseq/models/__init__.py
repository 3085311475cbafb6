"""fairseq models; importing this folder registers them."""

from blspkd_fairseq import compat

compat.require_fairseq()  # one sentence instead of a missing module

from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402

__all__ = ["BlspKdModel"]
