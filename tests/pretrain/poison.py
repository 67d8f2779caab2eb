"""Ways in which a batch does harm; and the program itself, `pretrain.train`, with some batches poisoned.

`python -m tests.pretrain.poison CONFIG ...` takes what `pretrain.train` takes, and from TRIPTYCH_TEST_POISON a JSON
list of [rank, batch number, how].
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda x: x * math.nan,
    # The same value, and a gradient that is not a number.
    "gradient": lambda x: x + (x - x.detach()).sqrt() * 0.0,
    "spike": lambda x: x * 1000.0,
}


def main() -> int:
    from pretrain import train

    wanted = json.loads(os.environ["TRIPTYCH_TEST_POISON"])
    rank = int(os.environ.get("RANK", "0"))

    def poisoned(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        if type(module).__name__ != "OmniPretrainer":
            return None
        for who, batch, how in wanted:
            if who == rank and batch == arguments[0]["step"]:
                output = replace(output, text=POISONS[how](output.text))
        return output

    torch.nn.modules.module.register_module_forward_hook(poisoned)
    return train.main()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
