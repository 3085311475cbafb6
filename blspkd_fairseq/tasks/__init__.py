"""fairseq tasks; importing this folder registers them."""

from blspkd_fairseq import compat

compat.require_fairseq()  # one sentence instead of a missing module

from blspkd_fairseq.tasks.blsp_kd import BlspKdTask  # noqa: E402

__all__ = ["BlspKdTask"]
