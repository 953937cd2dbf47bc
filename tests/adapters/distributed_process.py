"""What torchrun starts for test_pytorch_distributed: every rank writes down what it saw."""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.adapters import distributed_ddp, distributed_fsdp

SCENARIOS = {**distributed_fsdp.SCENARIOS, **distributed_ddp.SCENARIOS}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    # A rank that waits for another in vain ends before the test does.
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    report: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            report[name] = scenario()
        except Exception:
            report[name] = {"error": traceback.format_exc()}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
