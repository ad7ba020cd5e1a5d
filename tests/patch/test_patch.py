"""`internvl.patch` has the names that code written for upstream imports."""

import json

import pytest
import torch
from transformers import Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import internvl.patch
from internvl.data import collators
from internvl.patch.train_sampler_patch import LengthGroupedSampler, get_length_grouped_indices, split_to_even_chunks


def test_every_name_exists_and_collators_are_the_real_ones():
    from internvl.patch.pad_data_collator import concat_pad_data_collator, dpo_concat_pad_data_collator

    assert concat_pad_data_collator is collators.concat_pad_data_collator is internvl.patch.concat_pad_data_collator
    assert dpo_concat_pad_data_collator is collators.dpo_concat_pad_data_collator
    assert internvl.patch.pad_data_collator is collators.pad_data_collator, "the function, not the module of its name"
    assert all(callable(getattr(internvl.patch, name)) for name in internvl.patch.__all__)


@pytest.mark.parametrize("name", [name for name in internvl.patch.__all__ if name.startswith(("replace_", "apply_"))])
def test_replace_functions_change_nothing(name):
    """Upstream's replace attention functions, and methods of Trainer and model."""
    model = torch.nn.Linear(1, 1)
    attention_functions, trainer, attributes = dict(ALL_ATTENTION_FUNCTIONS), dict(vars(Trainer)), set(vars(model))
    function = getattr(internvl.patch, name)
    function()
    function(model, use_varlen=True)  # InternVL 3.5 passes arguments
    assert dict(ALL_ATTENTION_FUNCTIONS) == attention_functions and dict(vars(Trainer)) == trainer
    assert set(vars(model)) == attributes


def test_the_sampler_has_upstreams_order(goldens):
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


def test_chunks_equal_upstreams_examples():
    assert split_to_even_chunks([4, 0, 3, 1, 2, 5], [10, 8, 6, 9, 12, 5], 2) == [[4, 1, 5], [0, 3, 2]]
    assert split_to_even_chunks([4, 0, 3], [10, 8, 6, 9, 12, 5], 2) == [[4, 3], [0]]


def test_a_sampler_requires_a_dataset_or_lengths():
    with pytest.raises(ValueError, match="requires a dataset or lengths"):
        LengthGroupedSampler(2, 2)
