"""`triptych plan`: memory, time and data of a run before it is queued, and why it could not work.

`reject` is what a submission asks; `plan_run` returns everything. The model itself is run on shapes alone
(`passes`, `trace`), on the sizes of the samples that the ranks will get (`batches`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Config


def reject(
    config: Config, world: int, accelerator: str | None, time_limit_s: float | None, num_nodes: int = 1
) -> list[str]:
    """Why a run cannot work, one line each with what would; empty where it can. See `verdict.reject`."""
    from launch.plan import verdict

    return verdict.reject(config, world, accelerator, time_limit_s, num_nodes)
