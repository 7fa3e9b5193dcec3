"""Keys of earlier versions are answered with the keys of today."""

import pytest

from common.errors import ConfigurationError
from common.overrides import check_choices, check_read
from data import digest
from model import describe
from train.entry import CONF


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("parallel.micro_batch=4", "parallel.micro_batch is now parallel.micro_batch_size; write "
                                   "parallel.micro_batch_size=4."),
        ("+data.batch_examples=8", "data.batch_examples is now data.global_batch_size; write"),
        ("parallel.persistent_elements=1", "parallel.persistent_elements is now parallel.param_persistence_threshold;"),
        ("phases.a.batch_examples=8", "phases.a.batch_examples is now phases.a.global_batch_size; write"),
        ("stage=full_588", "stage is now phases; write phases=full_588."),
        ("stage.phases.0.image_size=56", "stage.phases is now phases, a mapping by name; write phases.<name>.im"),
        ("mixture.components=[]", "mixture.components is now mixture, a mapping by name; write mixture.<name>.w"),
    ],
)  # fmt: skip
def test_old_keys(word: str, sentence: str) -> None:
    for refused in (lambda: check_choices([word], CONF), lambda: check_read([word], ("data",), "x"),
                    lambda: digest.main([word]), lambda: describe.main([word])):  # fmt: skip
        with pytest.raises(ConfigurationError) as error:
            refused()
        assert str(error.value).startswith(sentence)


def test_keys_of_today_pass() -> None:
    check_choices(["phases=full_588", "parallel.micro_batch_size=4", "mixture.ocr.weight=0"], CONF)
