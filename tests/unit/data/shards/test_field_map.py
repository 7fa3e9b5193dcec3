"""A field map that finds nothing in its source is refused, by every command that reads shards."""

import pytest
from omegaconf import OmegaConf

from common.errors import ConfigurationError
from data import index
from data.config import DataConfig
from data.shards import field_map
from data.shards.writer import write_shard
from data.stream import Stream
from data.tokenizer import main as train_a_tokenizer
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture, png, write_source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            "{webli: {alt_text: alt_txt}}",
            r"fields\.webli\.alt_text=alt_txt is in none of 24 .* did you mean alt_text\.",
        ),
        (
            "{webli: {language: LANG}}",
            r"fields\.webli\.language=LANG is in none of 24 .*, which hold absent_labels, alt",
        ),
        ("{webli: {captions: caption_*}}", r"fields\.webli\.captions=caption_\* is in none of 24 records"),
        ("{webly: {language: language}}", r"fields\.webly names no source; did you mean webli\."),
    ],
)
def test_a_field_map_that_finds_nothing_is_refused(tmp_path, tokenizer, fields, message):
    write_source(tmp_path, "webli")
    for main, words in ((index.main, ["processes=1"]), (train_a_tokenizer, ["vocab_size=600"])):
        with pytest.raises(ConfigurationError, match=message):
            main([f"root={tmp_path}", f"fields={fields}", *words])
    maps = OmegaConf.to_container(OmegaConf.create(fields))
    data = DataConfig(root=str(tmp_path), tokenizer=tokenizer.path, global_batch_size=24, num_streams=4,
                      encoder_length=96, decoder_length=64, images_per_row=3, fields=maps)  # fmt: skip
    with pytest.raises(ConfigurationError, match=f"data.{message}"):
        Stream(data, mixture(("webli", "ocr", 1)), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=0)


def test_a_field_that_the_index_has_found_is_not_missing_whatever_a_sample_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(field_map, "LOOKED_AT", 1)
    records = [{"alt_text": "a cat"}, {"alt_text": "a dog", "signs": [{"text": "exit", "language": "en"}]}]
    write_shard(tmp_path / "webli" / "train-0.tar", [(f"k{n}", record, png(n)) for n, record in enumerate(records)])
    index.main([f"root={tmp_path}", "fields={webli: {ocr: signs}}", "processes=1"])
    with pytest.raises(ConfigurationError, match=r"fields\.webli\.questions=asked is in none of 1 records"):
        index.main([f"root={tmp_path}", "fields={webli: {ocr: signs, questions: asked}}", "processes=1"])
