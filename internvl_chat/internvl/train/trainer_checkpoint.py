"""HF Trainer whose checkpoints hold what was trained, and are whole or not there.

Below `trainer.py`. With adapters a checkpoint has the layout of `internvl_chat/trained.py`; without, or with
--save_full_model, upstream's, that is the whole model. DeepSpeed's states never hold a frozen weight.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from internvl.checkpoint.manifest import checkpoint_step, fsync_paths, list_checkpoints, write_manifest
from internvl.checkpoint.optimizer_state import (
    OPTIMIZER_STATE_FILE,
    load_converted_optimizer_states,
    load_optimizer_states,
    matches_deepspeed_shards,
    save_optimizer_states,
)
from internvl.checkpoint.safe_load import refuse_unsafe_pickles, weights_only_loading
from internvl.dist_utils import is_collective_error, run_on_rank_0, set_collective_timeout
from internvl.model.internvl_chat.adapter_checkpoint import (
    gather_trained_tensors,
    is_adapter_checkpoint,
    load_trained_tensors,
    read_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.safe_loading import refuse_unsafe_files
from internvl.model.lora import is_peft_model

logger = logging.getLogger(__name__)
UNFINISHED_DIR = "unfinished"  # folder in the output folder in which a checkpoint is written before it gets its name
OPTIMIZER_BYTES_PER_PARAMETER = (
    12  # of an optimizer's two moments and of a master weight, in float32, for each trained number
)


class CheckpointingTrainer(Trainer):
    """Trains a chat model.

    Args (beyond transformers.Trainer's):
        preprocessor: content of `preprocessor_config.json`.
    """

    def __init__(self, *args, preprocessor: dict, **kwargs):
        super().__init__(*args, **kwargs)
        adapted = any(is_peft_model(module) for module in self.model.children())
        self.partial = adapted and self.model.base_checkpoint is not None and not self.args.save_full_model
        self.preprocessor = preprocessor
        self.folder_of_checkpoints: str | None = None
        self.saved_step = 0  # of the newest checkpoint of this run, 0 if there is none
        self.seconds_to_save = 0.0  # what the last checkpoint took, 0 if that is not known

    # -- writing -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.partial:
            super().save_model(str(folder), _internal_call)
        else:
            state = gather_trained_tensors(self.model)
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_adapter_checkpoint(self.model, folder, state)
                self.processing_class.save_pretrained(folder)
                torch.save(self.args, folder / "training_args.bin")
        if self.args.should_save:
            (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessor, indent=2) + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.partial:
            if self.model_wrapped.zero_optimization():
                save_optimizer_states(
                    self.model_wrapped, self.trained_parameters(), Path(output_dir), self.args.should_save
                )
            else:
                self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _get_output_dir(self, trial) -> str:
        return self.folder_of_checkpoints or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Written under another name, put on the disk, renamed: a kill at any moment leaves the one before."""
        start = time.monotonic()
        final, unfinished = Path(self.args.output_dir), Path(self.args.output_dir, UNFINISHED_DIR)
        name = f"checkpoint-{self.state.global_step}"
        with one_line_io_errors(f"{name} cannot be written"):
            self._remove(unfinished)
            self.folder_of_checkpoints = str(unfinished)
            super()._save_checkpoint(model, trial)
            self.folder_of_checkpoints = None
            barrier()
            write_manifest(unfinished / name, self.args.should_save, alone=self.args.save_on_each_node)
            if self.args.should_save:
                if (final / name).exists():  # of a run that this one starts afresh, or a damaged one
                    os.replace(final / name, unfinished / "replaced")
                os.replace(unfinished / name, final / name)
                fsync_paths(final)
                shutil.rmtree(unfinished)
                self.rotate(final / name)
            barrier()
        self.saved_step, self.seconds_to_save = self.state.global_step, time.monotonic() - start

    def rotate(self, newest: Path) -> None:
        """Leave --save_total_limit checkpoints: what lies behind the newest, of a future that was given up, goes first,
        then the oldest."""
        others = [path for path in list_checkpoints(newest.parent) if path != newest]
        going = sorted(
            others, key=lambda path: (checkpoint_step(path) < checkpoint_step(newest), checkpoint_step(path))
        )
        limit = self.args.save_total_limit or 0
        for path in going[: max(0, len(others) + 1 - limit)] if limit > 0 else []:
            shutil.rmtree(path, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        barrier()

    def smoke_save(self) -> None:
        """Writes and reads a checkpoint before the first step: hours later is too late to hear that it cannot be done.

        Raises:
            OSError: the disk does not take it, or is too small for the optimizer's states as well.
            ValueError: it cannot be read again.
        """
        start, folder = time.monotonic(), Path(self.args.output_dir, UNFINISHED_DIR)
        with one_line_io_errors(f"no checkpoint can be written to {self.args.output_dir}"):
            self._remove(folder)
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            barrier()
        if self.args.should_save:  # another node may have another disk
            if self.partial:
                read_trained_tensors(self.model, folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
            free = shutil.disk_usage(folder).free
            if free < (need := size + OPTIMIZER_BYTES_PER_PARAMETER * trained):
                raise OSError(f"{self.args.output_dir} has {free:,} bytes free, a checkpoint needs {need:,}")
            logger.info("a checkpoint of %.1f MB was written and read in %.1f s", size / 1e6, time.monotonic() - start)
        self._remove(folder)
        self.seconds_to_save = time.monotonic() - start

    # -- reading -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As transformers', but what is gone on from may be a stranger's: no code in it runs."""
        if resume_from_checkpoint:
            run_on_rank_0(lambda: refuse_unsafe_pickles(Path(resume_from_checkpoint)))
        with weights_only_loading(deepspeed=self.is_deepspeed_enabled):
            return super().train(resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if Path(resume_from_checkpoint, OPTIMIZER_STATE_FILE).is_file():
            raise ValueError(f"{resume_from_checkpoint} was written under DeepSpeed: go on with --deepspeed.")
        if is_adapter_checkpoint(resume_from_checkpoint):
            load_trained_tensors(self.model, resume_from_checkpoint)
        else:
            refuse_unsafe_files(resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As transformers', whose way of resuming under DeepSpeed insists on frozen weights and as many ranks."""
        own = resume_from_checkpoint and self.is_deepspeed_enabled
        asked = None if own else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, asked)
        set_collective_timeout(self.args.ddp_timeout_delta)
        if own:
            self.resume_deepspeed(Path(resume_from_checkpoint))
        elif not resume_from_checkpoint and not self.args.no_smoke_save:
            self.smoke_save()
        return prepared

    def resume_deepspeed(self, checkpoint: Path) -> None:
        engine, trained_alone = self.model_wrapped, is_adapter_checkpoint(checkpoint)
        if trained_alone:
            load_trained_tensors(self.model, checkpoint)
        if (checkpoint / OPTIMIZER_STATE_FILE).is_file():
            load_optimizer_states(engine, self.trained_parameters(), checkpoint)
        elif matches_deepspeed_shards(engine, checkpoint):
            deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=not trained_alone)
        else:
            logger.info("%s was written by other ranks or at another ZeRO stage: its states are converted", checkpoint)
            load_converted_optimizer_states(engine, self.trained_parameters(), checkpoint, self.args.process_index == 0)
        self._load_optimizer_and_scheduler(str(checkpoint))
        for group, rate in zip(engine.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def one_line_io_errors(what: str) -> Iterator[None]:
    """A full or broken disk is an OSError of one sentence: the libraries that write each tell it in their own way."""
    try:
        yield
    except ValueError:  # a sentence already
        raise
    except Exception as error:
        if is_collective_error(error):  # nothing is wrong with the disk
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"{what}: {lines[0]}") from error


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
