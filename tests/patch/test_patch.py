"""What code written for upstream finds in `internvl.patch`."""

import json

import pytest
import torch

import internvl.patch
from internvl.data import collators
from internvl.patch.train_sampler_patch import LengthGroupedSampler, get_length_grouped_indices, split_to_even_chunks


def test_every_name_is_there_and_the_collators_are_the_real_ones():
    from internvl.patch.pad_data_collator import concat_pad_data_collator, dpo_concat_pad_data_collator

    assert concat_pad_data_collator is collators.concat_pad_data_collator is internvl.patch.concat_pad_data_collator
    assert dpo_concat_pad_data_collator is collators.dpo_concat_pad_data_collator
    assert internvl.patch.pad_data_collator is collators.pad_data_collator, "the function, not the module of its name"
    for name in internvl.patch.__all__:
        if name.startswith(("replace_", "apply_")):
            assert getattr(internvl.patch, name)() is None
    assert internvl.patch.replace_qwen3_attention_class(torch.nn.Linear(1, 1)) is None
    assert internvl.patch.replace_gpt_oss_with_flash_sink_attn(torch.nn.Linear(1, 1), use_varlen=True) is None


def test_recorded_order_of_the_sampler(goldens):
    for line in (goldens / "sampler.jsonl").read_text().splitlines():
        row = json.loads(line)
        lengths, batch_size, world_size = row["lengths"], row["batch_size"], row["world_size"]

        def generator(row=row):
            return torch.Generator().manual_seed(row["generator_seed"])

        assert get_length_grouped_indices(lengths, batch_size, world_size, generator=generator()) == row["indices"]
        sampler = LengthGroupedSampler(batch_size, world_size, lengths=lengths, generator=generator())
        assert list(sampler) == row["indices"] and len(sampler) == len(lengths)
        dataset = [{"input_ids": torch.zeros(n)} for n in lengths]
        assert list(LengthGroupedSampler(batch_size, world_size, dataset, generator=generator())) == row["indices"]


def test_chunks_as_upstream_documents_them():
    assert split_to_even_chunks([4, 0, 3, 1, 2, 5], [10, 8, 6, 9, 12, 5], 2) == [[4, 1, 5], [0, 3, 2]]
    assert split_to_even_chunks([4, 0, 3], [10, 8, 6, 9, 12, 5], 2) == [[4, 3], [0]]


def test_a_sampler_needs_lengths():
    with pytest.raises(ValueError, match="needs a dataset or lengths"):
        LengthGroupedSampler(2, 2)
