"""The one moment at which DeepSpeed takes no for an answer: when it knows the gradient's norm and has not updated.

DeepSpeed itself throws a step away when that norm is not finite, in silence. The gate shows the norm to a judge first,
and turns a refusal into such a norm, so that skipping takes DeepSpeed's own way through buffers and moments. Measured
on DeepSpeed 0.19.8, whose optimizers each compute the norm in a place of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Judge = Callable[[float], bool]
"""Norm of the whole gradient before clipping (inf where not finite) -> whether to update. Asked on every rank alike."""


class NormGate:
    """Stands in a wrapped optimizer's way; `open_for` says who judges the next update."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._judge: Judge | None = None
        self.norm: float | None = None
        """The norm that was judged last; None where DeepSpeed found an overflow before it came to a norm."""
        name = type(optimizer).__name__
        if name == "DeepSpeedZeroOptimizer":
            norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *a, **k: self._pass(norm(*a, **k))
        elif name == "DeepSpeedZeroOptimizer_Stage3":
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._pass(combine_grad_norm_groups(groups()))]
        elif name == "BF16_Optimizer":
            from deepspeed.runtime.utils import get_global_norm_of_tensors

            gradients = optimizer.get_grads_for_norm

            def judged(for_clipping: bool = False) -> Any:
                found = gradients(for_clipping)
                if for_clipping:
                    return found
                whole = get_global_norm_of_tensors(input_tensors=found[0], mpu=None)
                passed = self._pass(whole)
                return found if math.isfinite(float(passed)) else ([torch.full((1,), math.inf)], {})

            optimizer.get_grads_for_norm = judged
        else:
            raise RuntimeError(f"no way to judge the gradients of DeepSpeed's {name}")

    def open_for(self, judge: Judge) -> None:
        """Have `judge` asked at the next update."""
        self._judge, self.norm = judge, None

    def forget_refused(self) -> None:
        """After a step that DeepSpeed has thrown away: see that its gradient is gone, too.

        With an optimizer in host memory, ZeRO 1 and 2 in bf16 would keep it and add the next step's to it.
        """
        if type(self._optimizer).__name__ == "DeepSpeedZeroOptimizer":
            self._optimizer.averaged_gradients = dict.fromkeys(self._optimizer.averaged_gradients)

    def _pass(self, norm: Any) -> Any:
        norm = norm if isinstance(norm, torch.Tensor) else torch.tensor(float(norm))
        value = float(norm)
        self.norm = value if math.isfinite(value) and value >= 0 else math.inf
        assert self._judge is not None
        return norm if self._judge(self.norm) else torch.full_like(norm, math.inf)
