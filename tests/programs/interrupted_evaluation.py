"""Fine-tune, and send a signal to one rank in the middle of an evaluation.

INTERRUPTED="RANK STEP SIGNAL" interrupted_evaluation.py FLAGS
"""

import os
import signal
import time

if __name__ == "__main__":
    from internvl.runtime.process import prepare_rank

    prepare_rank()

from internvl.dist_utils import get_rank
from internvl.runtime.signals import preemption
from internvl.train import trainer as trainer_module
from internvl.train.internvl_chat_finetune import main

RANK, STEP, SIGNAL = (int(word) for word in os.environ["INTERRUPTED"].split())


def send_signal_in_evaluation() -> None:
    """Let each evaluation of the step send the signal after its first batch."""
    evaluate = trainer_module.evaluate

    def evaluate_and_interrupt(model, tokenizer, data, settings, folder, step, *args):
        check_stop = settings.check_stop_fn

        def send_and_check() -> None:
            if step == STEP and get_rank() == RANK and preemption.signal is None:
                os.kill(os.getpid(), SIGNAL)
                while SIGNAL != signal.SIGKILL and preemption.signal is None:
                    time.sleep(0.01)
            check_stop()

        object.__setattr__(settings, "check_stop_fn", send_and_check)
        return evaluate(model, tokenizer, data, settings, folder, step, *args)

    trainer_module.evaluate = evaluate_and_interrupt


if __name__ == "__main__":
    send_signal_in_evaluation()
    main()
