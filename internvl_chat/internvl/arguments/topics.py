"""Topics of the flags of training, in `internvl train --help` and docs/configuration.md."""

# Topic, as in the page's markers -> flags in the order of the table.
TOPICS = {
    "model": "model_name_or_path vision_path llm_path mlp_path conv_style vision_select_layer down_sample_ratio "
    "ps_version drop_path_rate allow_pickle",
    "trainable": "freeze_backbone freeze_mlp freeze_llm use_backbone_lora use_mlp_lora use_llm_lora "
    "unfreeze_vit_layers unfreeze_lm_head train_new_tokens merge_before_training",
    "parts": "backbone_lora_alpha backbone_lora_dropout backbone_lora_targets backbone_lora_layers "
    "backbone_lora_variant backbone_lr backbone_weight_decay backbone_loraplus_lr_ratio backbone_layer_decay "
    "mlp_lora_alpha mlp_lora_dropout mlp_lora_targets mlp_lora_variant mlp_lr mlp_weight_decay mlp_loraplus_lr_ratio "
    "llm_lora_alpha llm_lora_dropout llm_lora_targets llm_lora_layers llm_lora_variant llm_lr llm_weight_decay "
    "llm_loraplus_lr_ratio",
    "memory": "grad_checkpoint vit_grad_checkpoint grad_checkpoint_ratio grad_checkpoint_keep quantize_backbone "
    "quantize_llm lora_fp32 compile use_liger",
    "data": "meta_path max_seq_length force_image_size dynamic_image_size use_thumbnail min_dynamic_patch "
    "max_dynamic_patch min_num_frame max_num_frame max_image_pixels image_background upstream_image_decoding "
    "normalize_type pad2square group_by_length use_data_resampling max_bad_samples keep_surplus_placeholders "
    "accept_changed_data allow_outside_root",
    "packing": "use_packed_ds max_packed_tokens num_images_expected strict_mode allow_overflow loss_reduction "
    "loss_reduction_all_gather",
    "evaluation": "eval_meta_path eval_share eval_num_samples eval_max_new_tokens eval_base_answers "
    "early_stopping_patience early_stopping_threshold",
    "loop": "warmup_ratio overwrite_output_dir do_train save_full_model no_smoke_save evaluation_strategy "
    "ddp_find_unused_parameters logging_nan_inf_filter log_level log_level_replica optim use_cpu",
    "faults": "ddp_timeout save_on_signal_seconds store_retry_seconds max_skipped_steps skip_above_grad_norm "
    "watchdog_factor watchdog_seconds",
    "preference": "loss_type beta sigmoid_loss_weight bco_pair_loss_weight rpo_alpha label_smoothing reference_free",
    "ignored": "max_buffer_size log_freq replacement split_annotations use_fast_tokenizer use_custom_flash_attn "
    "remove_unused_columns",
}
# Topic -> title of its flags in `internvl train --help`.
TITLES = {
    "model": "model",
    "trainable": "trainable parameters",
    "parts": "LoRA and learning rates per part",
    "memory": "memory and speed",
    "data": "data",
    "packing": "packing",
    "evaluation": "evaluation",
    "loop": "training loop",
    "faults": "signals and faults",
    "preference": "preference optimization",
    "ignored": "ignored",
}
# The flags that matter first, in `internvl train --help`.
FIRST_FLAGS = (
    "model_name_or_path meta_path output_dir use_backbone_lora use_llm_lora learning_rate num_train_epochs "
    "max_packed_tokens"
).split()
# Flags of transformers that runs usually set -> description. All others are in transformers' documentation.
TRANSFORMERS_FLAGS = {
    "output_dir": "folder for checkpoints, log and results; an interrupted run continues in it",
    "learning_rate": "highest learning rate; of LoRA about 1e-4 to 2e-4",
    "num_train_epochs": "how often every sample is trained",
    "max_steps": "number of steps, instead of --num_train_epochs",
    "per_device_train_batch_size": "micro-batch size of a rank: samples, or rows with --use_packed_ds True",
    "gradient_accumulation_steps": "micro-batches per step and rank",
    "weight_decay": "weight decay of AdamW",
    "lr_scheduler_type": "course of the learning rate, such as cosine",
    "warmup_steps": "steps in which the learning rate rises",
    "max_grad_norm": "gradients are clipped to this norm",
    "bf16": "train in bfloat16",
    "deepspeed": "ZeRO: a DeepSpeed file, such as zero_stage2_config.json",
    "dataloader_num_workers": "processes per rank that load samples",
    "logging_steps": "steps between lines of the log",
    "save_strategy": "when checkpoints are saved: steps, epoch or no",
    "save_steps": "steps between checkpoints",
    "save_total_limit": "number of checkpoints that are kept",
    "eval_strategy": "when evaluation sets are evaluated: steps, epoch or no",
    "eval_steps": "steps between evaluations",
    "do_eval": "evaluate, also without training",
    "load_best_model_at_end": "save the model of the best evaluation",
    "report_to": "where metrics are logged, such as tensorboard or wandb",
    "run_name": "name of the run there",
    "seed": "seed of all random numbers",
    "resume_from_checkpoint": "a checkpoint to resume from, instead of the latest one in --output_dir",
}
