"""Write which optimizer of torch or DeepSpeed takes the steps of a run.

    python optimizer_kernels.py FLAGS

The output folder gets `optimizer.json`: the class of the innermost optimizer, and whether its step is one fused kernel.
"""

import json
import sys
from pathlib import Path

from helpers.training_runs import prepare_trainer

from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group


def main() -> None:
    with abort_all_ranks_on_error():
        join_process_group()
        trainer = prepare_trainer(sys.argv[1:])
        trainer.train()
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # within those of accelerate and DeepSpeed
            optimizer = optimizer.optimizer
        found = [type(optimizer).__name__, optimizer.defaults.get("fused")]
        Path(trainer.args.output_dir, "optimizer.json").write_text(json.dumps(found))
    exit_process_group(0)


if __name__ == "__main__":
    main()
