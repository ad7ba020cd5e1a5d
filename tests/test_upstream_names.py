"""Upstream's public names are importable from upstream's modules. Missing ones are listed, with the reason."""

import importlib

import pytest

UPSTREAM_NAMES = {
    "internvl.conversation": """
        SeparatorStyle Conversation conv_templates register_conv_template get_conv_template""",
    "internvl.dist_utils": "timeout init_dist",
    "internvl.model": "split_model load_model_and_tokenizer",
    "internvl.model.internvl_chat": "InternVisionConfig InternVisionModel InternVLChatConfig InternVLChatModel",
    "internvl.model.internvl_chat.configuration_intern_vit": "InternVisionConfig",
    "internvl.model.internvl_chat.configuration_internvl_chat": "InternVLChatConfig",
    "internvl.model.internvl_chat.modeling_intern_vit": """
        has_flash_attn FlashAttention InternRMSNorm NORM2FN InternVisionEmbeddings InternAttention InternMLP
        InternVisionEncoderLayer InternVisionEncoder InternVisionModel""",
    "internvl.model.internvl_chat.modeling_internvl_chat": "version_cmp InternVLChatModel",
    "internvl.model.internlm2.configuration_internlm2": "InternLM2Config INTERNLM2_PRETRAINED_CONFIG_ARCHIVE_MAP",
    "internvl.model.internlm2.modeling_internlm2": """
        has_flash_attn flash_attn_func flash_attn_varlen_func pad_input index_first_axis unpad_input InternLM2RMSNorm
        InternLM2RotaryEmbedding InternLM2LinearScalingRotaryEmbedding InternLM2DynamicNTKScalingRotaryEmbedding
        rotate_half apply_rotary_pos_emb InternLM2MLP repeat_kv InternLM2Attention InternLM2FlashAttention2
        INTERNLM2_ATTENTION_CLASSES InternLM2DecoderLayer InternLM2PreTrainedModel InternLM2Model InternLM2ForCausalLM
        InternLM2ForSequenceClassification""",
    "internvl.model.internlm2.tokenization_internlm2": "InternLM2Tokenizer",
    "internvl.model.internlm2.tokenization_internlm2_fast": "InternLM2TokenizerFast InternLM2Converter",
    "internvl.model.phi3.configuration_phi3": "Phi3Config PHI3_PRETRAINED_CONFIG_ARCHIVE_MAP",
    "internvl.model.phi3.modeling_phi3": """
        has_flash_attn Phi3RMSNorm Phi3RotaryEmbedding Phi3SuScaledRotaryEmbedding Phi3YarnScaledRotaryEmbedding
        rotate_half apply_rotary_pos_emb repeat_kv Phi3MLP Phi3Attention Phi3FlashAttention2 Phi3SdpaAttention
        PHI3_ATTENTION_CLASSES Phi3DecoderLayer Phi3PreTrainedModel Phi3Model Phi3ForCausalLM
        Phi3ForSequenceClassification Phi3ForTokenClassification""",
    "internvl.train.constants": """
        IMG_CONTEXT_TOKEN IMG_START_TOKEN IMG_END_TOKEN QUAD_START_TOKEN QUAD_END_TOKEN REF_START_TOKEN REF_END_TOKEN
        BOX_START_TOKEN BOX_END_TOKEN IMAGENET_MEAN IMAGENET_STD CLIP_MEAN CLIP_STD SIGLIP_MEAN SIGLIP_STD""",
    "internvl.train.dataset": """
        IGNORE_TOKEN_ID calculate_ngram_repetition check_conversations_repetition get_frame_indices read_frames_gif
        read_frames_decord read_frames_folder extract_frame_number sort_frames WeightedConcatDataset ConcatDataset
        pil_loader TCSLoader expand2square simulate_jpeg_degradation qualities jpeg_degrade_functions build_transform
        preprocess preprocess_mpt preprocess_phi3 preprocess_internlm preprocess_internvl2_5
        find_closest_aspect_ratio dynamic_preprocess
        preprocess_pretrain preprocess_internvl3_5_gpt_oss preprocess_internvl3_5_gpt_oss_with_think""",
    "internvl.train.dataset_packed": """
        IGNORE_TOKEN_ID get_world_size get_rank PackedDataset packed_collate_fn is_dist_avail_and_initialized
        WARNING_CNT""",
    "internvl.train.internvl_chat_finetune": """
        IGNORE_INDEX ModelArguments DataTrainingArguments LazySupervisedDataset len2weight main build_datasets
        MaximumDecompressedSize MegaByte""",
    "internvl.train.internvl_chat_pretrain": """
        IGNORE_INDEX ModelArguments DataTrainingArguments LazySupervisedDataset len2weight main build_datasets""",
    "internvl.train.internvl_chat_mpo": """
        IGNORE_INDEX ModelArguments DataTrainingArguments DPOConfig LazySupervisedDataset main build_datasets""",
    "internvl.train.trainer_dpo": "MultimodalDPOTrainer",
    "internvl.patch": """
        apply_liger_kernel_to_internvit concat_pad_data_collator dpo_concat_pad_data_collator pad_data_collator
        replace_gpt_oss_with_flash_sink_attn replace_internlm2_attention_class replace_llama2_attn_with_flash_attn
        replace_llama_attention_class replace_llama_attn_with_flash_attn replace_llama_rmsnorm_with_fused_rmsnorm
        replace_phi3_attention_class replace_qwen2_attention_class replace_qwen3_attention_class
        replace_train_dataloader replace_train_sampler""",
    "internvl.patch.flash_sink_attn_monkey_patch": "replace_gpt_oss_with_flash_sink_attn",
    "internvl.patch.internlm2_packed_training_patch": """
        replace_internlm2_attention_class InternLM2FlashAttention2ForPackedTraining""",
    "internvl.patch.internvit_liger_monkey_patch": "apply_liger_kernel_to_internvit",
    "internvl.patch.llama2_flash_attn_monkey_patch": "replace_llama2_attn_with_flash_attn",
    "internvl.patch.llama_flash_attn_monkey_patch": "replace_llama_attn_with_flash_attn",
    "internvl.patch.llama_packed_training_patch": """
        replace_llama_attention_class LlamaFlashAttention2ForPackedTraining""",
    "internvl.patch.llama_rmsnorm_monkey_patch": "replace_llama_rmsnorm_with_fused_rmsnorm",
    "internvl.patch.pad_data_collator": "concat_pad_data_collator dpo_concat_pad_data_collator pad_data_collator",
    "internvl.patch.phi3_packed_training_patch": """
        replace_phi3_attention_class Phi3FlashAttention2ForPackedTraining""",
    "internvl.patch.qwen2_packed_training_patch": """
        replace_qwen2_attention_class Qwen2FlashAttention2ForPackedTraining""",
    "internvl.patch.qwen3_flash_monkey_patch": "replace_qwen3_attention_class",
    "internvl.patch.train_dataloader_patch": "replace_train_dataloader get_train_dataloader",
    "internvl.patch.train_sampler_patch": """
        LengthGroupedSampler get_length_grouped_indices replace_train_sampler split_to_even_chunks""",
    "tools.extract_video_frames": "transform_video get_index fetch_images fetch_images_parallel",
    "tools.images_stitching": "custom_image get_images",
    "tools.internvl_custom2hf": "compute_l2_distance convert_keys_to_hf",
    "tools.internvl_hf2custom": "compute_l2_distance convert_keys_back",
}  # fmt: skip
# Names that do not exist here -> the reason.
ABSENT = {
    **dict.fromkeys(
        ["FlashAttention", "flash_attn_func", "flash_attn_varlen_func", "pad_input", "index_first_axis", "unpad_input"],
        "details of a flash-attn kernel: transformers calls it",
    ),
    **dict.fromkeys(
        [f"{llm}FlashAttention2ForPackedTraining" for llm in ("InternLM2", "Llama", "Phi3", "Qwen2")],
        "packed rows need no other attention class",
    ),
    **dict.fromkeys(
        [f"InternLM2{kind}ScalingRotaryEmbedding" for kind in ("Linear", "DynamicNTK")]
        + [f"Phi3{kind}ScaledRotaryEmbedding" for kind in ("Su", "Yarn")],
        "one class scales by the configuration",
    ),
    "InternLM2Converter": "the fast tokenizer builds itself from the SentencePiece file",
    "build_datasets": "train/build_data.py takes other arguments",
    "get_train_dataloader": "batches come from the epoch plan",
    "is_dist_avail_and_initialized": "get_rank and get_world_size need no process group",
    **dict.fromkeys(["WARNING_CNT", "MaximumDecompressedSize", "MegaByte"], "a detail of upstream's implementation"),
}


@pytest.mark.parametrize("module_name", UPSTREAM_NAMES)
def test_names_exist_unless_listed(module_name):
    module = importlib.import_module(module_name)
    missing = {name for name in UPSTREAM_NAMES[module_name].split() if not hasattr(module, name)}
    assert missing == {name for name in UPSTREAM_NAMES[module_name].split() if name in ABSENT}
