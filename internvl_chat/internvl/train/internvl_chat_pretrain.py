"""Run `internvl_chat_finetune.py` under upstream's other path."""

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.runtime.process import prepare_rank

    prepare_rank()

from internvl.train.internvl_chat_finetune import (  # noqa: F401
    IGNORE_INDEX,
    DataTrainingArguments,
    LazySupervisedDataset,
    ModelArguments,
    len2weight,
    main,
)

if __name__ == "__main__":
    main()
