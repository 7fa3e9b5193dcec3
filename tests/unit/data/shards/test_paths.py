"""Which shards belong to a split: by a word of their name; what is ambiguous or missing is refused in one sentence."""

import errno
import os

import pytest
from braceexpand import braceexpand

from common.errors import ConfigurationError, Notice, StorageFailed
from data.shards import paths as module
from data.shards.paths import Part, _num_names, parts, shard_paths


def made(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder, split: str, pattern: str = "") -> list[str]:
    location = os.path.join(folder, pattern) if pattern else str(folder)
    return [os.path.relpath(path, folder) for path in shard_paths(location, split)]


def refusal(folder, split: str = "train", pattern: str = "") -> str:
    with pytest.raises(ConfigurationError) as error:
        found(folder, split, pattern)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train-00000.tar", "validation-00000.tar", "test-00000.tar"),
        ("cc3m-train-0000.tar", "cc3m-validation-0000.tar", "cc3m-test-0000.tar"),
        ("train_000.tar", "val_000.tar", "testing_000.tar"),
        ("training.0.tar", "valid.0.tar", "test.0.tar"),
        ("COCO_Train2017_0.tar", "COCO_Val2017_0.tar", "COCO_Test2017_0.tar"),
        ("x 0 TRAIN.TAR", "x 0 DEV.TAR", "x 0 TEST.TAR"),
        ("TrainShard0.tar", "myValShard.tar", "ShardTest.tar"),
        ("trainset-0.tar", "valset-0.tar", "testset-0.tar"),
        ("voc_trainval2012.tar", "heldout.tar", "coco_testdev2017.tar"),
        ("00000-train.tar", "00000-eval.tar", "00000-test.tar"),
        ("train/00000.tar", "dev/00000.tar", "test/00000.tar"),
        ("train/a-train-0.tar", "val/a-val-0.tar", "test/a-test-0.tar"),
    ],
)
def test_a_split_is_a_word_anywhere_in_the_name(tmp_path, train, validation, test):
    made(tmp_path, train, validation, test)
    assert [found(tmp_path, split) for split in ("train", "validation", "test")] == [[train], [validation], [test]]


@pytest.mark.parametrize("name", ["00000.tar", "contest-0.tar", "trainer_0.tar", "latest0.tar", "минитест-0.tar"])
def test_names_without_a_split_are_training_data(tmp_path, name):
    made(tmp_path, name)
    assert found(tmp_path, "train") == [name]
    assert "no validation shards at" in refusal(tmp_path, "validation")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["train-test-0.tar"], "names more than one split (test, train)"),
        (["val/test-0.tar"], "names more than one split"),
        (["train-0.tar", "0.tar"], "/0.tar names none"),
        (["0.tar", "validation/0.tar"], "names a split and"),
        (["train-0.tar", "val-0.tar", "dev-0.tar"], "has validation shards of more than one name (dev, val;"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, names, sentence):
    made(tmp_path, *names)
    assert sentence in refusal(tmp_path, "validation")


def test_a_folder_of_folders_is_read_one_level_deep_where_it_has_no_tars_itself(tmp_path):
    made(tmp_path, "a/0.tar", "b/0.tar", "b/c/0.tar", ".hidden/0.tar", "._1.tar", "notes.txt", "2.tar.index.npz")
    assert found(tmp_path, "train") == ["a/0.tar", "b/0.tar"]
    made(tmp_path, "0.tar")
    with pytest.warns(Notice, match=r"/a holds tars that are not read, as .* holds tars itself"):
        assert found(tmp_path, "train") == ["0.tar"]


def test_missing_splits_name_the_ways_out(tmp_path):
    made(tmp_path, "train-0.tar")
    assert "; the names there are of train." in refusal(tmp_path, "validation")
    assert "data.holdout=0.01" in refusal(tmp_path, "validation")
    assert "evaluation.every_steps=0" in refusal(tmp_path, "validation")
    assert "evaluation.split=validation" in refusal(tmp_path, "test")
    assert f"no train shards at {tmp_path}/none" in refusal(tmp_path, "train", "none")


def test_a_folder_without_tars_is_described(tmp_path):
    numbers = {".jpg": 4, ".json": 3, ".txt": 2, "": 1}
    names = [f"files/00000/{n}{ending}" for ending, number in numbers.items() for n in range(number)]
    made(tmp_path, *names, "tables/0.parquet", "webli/0.tar")
    held = "; it holds images in files (4 x .jpg, 3 x .json, 2 x .txt), which img2dataset"
    assert held in refusal(tmp_path, "train", "files")
    assert "; it holds 1 x .parquet, and no tar; make shards of tables by" in refusal(tmp_path, "train", "tables")
    assert refusal(tmp_path, "train", "weblii").endswith("; there is no such folder, did you mean webli.")


def test_a_pattern_without_split_serves_the_split_of_its_names(tmp_path):
    made(tmp_path, "a-train-0.tar", "a-val-0.tar", "b-0.tar", "b-1.tar")
    assert found(tmp_path, "train", "a-*.tar") == ["a-train-0.tar"]
    assert found(tmp_path, "validation", "a-*.tar") == ["a-val-0.tar"]
    assert found(tmp_path, "train", "b-*.tar") == ["b-0.tar", "b-1.tar"]
    assert "no validation shards" in refusal(tmp_path, "validation", "b-*.tar")
    assert "no validation shards" in refusal(tmp_path, "validation", "a-train-*.tar")
    assert "no train shards" in refusal(tmp_path, "train", "a-val-0.tar")
    assert "names a split and" in refusal(tmp_path, "train", "*.tar")


def test_split_in_a_pattern_is_for_the_split_or_one_synonym(tmp_path):
    made(tmp_path, "train/0.tar", "val/0.tar", "x-train-0.tar", "x-dev-0.tar", "x-valid-0.tar", "test-train-0.tar")
    assert found(tmp_path, "validation", "{split}/*.tar") == found(tmp_path, "validation", "{split}") == ["val/0.tar"]
    assert found(tmp_path, "train", "x-{split}-{0..0}.tar") == ["x-train-0.tar"]
    assert "more than one name (dev, valid;" in refusal(tmp_path, "validation", "x-{split}-*.tar")
    assert "names another split (test)" in refusal(tmp_path, "train", "*-{split}-*.tar")
    assert "no test shards" in refusal(tmp_path, "test", "x-{split}-*.tar")


def test_braces_must_match_every_name_they_spell_out(tmp_path):
    made(tmp_path, *(f"train-0000{number}.tar" for number in (0, 2, 5)), "a/0.tar")
    message = refusal(tmp_path, "train", "{split}-{00000..00005}.tar")
    assert "3 of the names" in message and "train-00001.tar" in message and "train-00004.tar" in message
    assert "1 of the names" in refusal(tmp_path, "train", "{a,b}/*.tar")
    assert "no train shards" in refusal(tmp_path, "train", "{00007..00009}.tar")
    assert found(tmp_path, "train", "train-0000{0..5..5}.tar") == [
        "train-00000.tar", "train-00005.tar",
    ]  # fmt: skip
    assert found(tmp_path, "train", "{a,a}") == ["a/0.tar"]


def test_no_pattern_matches_more_levels_than_it_seems(tmp_path):
    made(tmp_path, "a/0.tar", "a/b/1.tar")
    assert "write a * for each level" in refusal(tmp_path, "train", "**/*.tar")
    assert found(tmp_path, "train", "{*,*/*}/*.tar") == ["a/0.tar", "a/b/1.tar"]


@pytest.mark.parametrize("pattern", ["{00000..00005.tar", "0..5}.tar", "{a,{b}.tar", "a}{b.tar", "{" * 3000])
def test_braces_that_do_not_match_are_one_sentence(tmp_path, pattern):
    assert "has braces that do not match" in refusal(tmp_path, "train", pattern)


@pytest.mark.parametrize(
    "pattern", ["{0..1000000000}.tar", "{0..2000}{0..2000}.tar", "{a..z}" * 6, "{x{0..999999}{0..9},y}", "{a,b}" * 40]
)
def test_braces_that_spell_out_too_much_are_one_sentence(tmp_path, pattern):
    assert "more than 1,000,000 names" in refusal(tmp_path, "train", pattern)


def test_alternatives_add_up_and_do_not_multiply(tmp_path):
    made(tmp_path, "0.tar")
    assert "no train shards" in refusal(tmp_path, "train", "{b{00000..09999},c{20000..29999}}.tar")


def test_patterns_match_files_that_are_tars(tmp_path):
    made(tmp_path, "0.tar", "0.tar.index.npz", "stats.json", "folder.tar/x", "deep/1.tar", "a[1].tar", ".hidden.tar")
    assert found(tmp_path, "train", "*") == ["0.tar", "a[1].tar"]
    assert found(tmp_path, "train", "a[1].tar") == ["a[1].tar"]
    assert found(tmp_path, "train", "*/[0-9].tar") == ["deep/1.tar"]
    assert found(tmp_path, "train", "d*/*") == ["deep/1.tar"]


def test_compressed_tars_are_not_passed_over_in_silence(tmp_path):
    made(tmp_path, "train-0.tar.gz")
    assert "train-0.tar.gz is compressed" in refusal(tmp_path)
    made(tmp_path, "train-1.tar")
    with pytest.warns(Notice, match=r"train-0\.tar\.gz is compressed and not read"):
        assert found(tmp_path, "train") == ["train-1.tar"]


def test_a_share_is_held_out_of_a_source_without_validation_shards(tmp_path):
    made(tmp_path, "without/train-0.tar", "with/train-0.tar", "with/val-0.tar")
    without, both = str(tmp_path / "without"), str(tmp_path / "with")
    assert parts(without, "train", 0.1) == ([f"{without}/train-0.tar"], Part(0.1, 1.0))
    assert parts(without, "validation", 0.1) == ([f"{without}/train-0.tar"], Part(0.0, 0.1))
    assert parts(both, "train", 0.1) == ([f"{both}/train-0.tar"], Part())
    assert parts(both, "validation", 0.1) == ([f"{both}/val-0.tar"], Part())
    assert parts(without, "train", 0.0) == ([f"{without}/train-0.tar"], Part())
    with pytest.raises(ConfigurationError, match="no test shards"):
        parts(without, "test", 0.1)
    with pytest.raises(ConfigurationError, match="no validation shards"):
        parts(without, "validation", 0.0)


@pytest.mark.parametrize(
    ("code", "expected", "message"),
    [
        (errno.EIO, StorageFailed, "Input/output error, EIO"),
        (errno.ESTALE, StorageFailed, "ESTALE"),
        (errno.EACCES, ConfigurationError, "may not be read"),
    ],
)
def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch, code, expected, message):
    made(tmp_path, "train-0.tar")

    def failing(path):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(module.os, "scandir", failing)
    for pattern in ("", "train-*.tar", "train-{0..0}.tar"):
        with pytest.raises(expected, match=message) as raised:
            shard_paths(os.path.join(tmp_path, pattern), "train", patience_s=0.0)
        assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "pattern", ["x", "{a,b}{c,d}", "{0..9}-{a,b}", "{x{0..2},y}{a,b}", "{0..10..5}{a,{b,c}}", "{a,b}{0..3}{c,d,e}"]
)
def test_names_are_counted_as_they_are_made(pattern):
    assert _num_names(pattern) == len(list(braceexpand(pattern)))
