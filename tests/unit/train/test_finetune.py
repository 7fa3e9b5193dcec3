"""A fine-tuning takes its recipe from its task, learns from official files, and keeps its best checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from common.errors import ConfigurationError, Notice
from common.overrides import as_typed, open_names
from data.corpus_text import corpus_texts
from data.miniature import official
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.objectives import NAMES
from data.tokenizer import train_tokenizer
from train import evaluate, pretrain
from train.config import RunConfig
from train.entry import CONF, TEXT, entry, register
from train.inference import PaLIPipeline
from train.phases import for_phase, phase_learning_rate, spans
from train.settings.compose import to_run_config
from train.weights.saved_checkpoint import find_checkpoint

SIZES = ("vit=mini", "mt5=mini", "data.tokenizer=t")


def composed(*words: str, sizes: tuple[str, ...] = SIZES) -> RunConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_run_config(compose("finetune", open_names(as_typed([*sizes, *words], TEXT), TEXT)))


@pytest.mark.parametrize(
    ("task", "steps", "rate", "size", "rows"),
    [  # PaLI's table of fine-tuning, at PaLI-3B's resolution; a row is one image of (size / 14)^2 tokens and text
        ("coco", 20_000, 3e-5, 490, 1296),
        ("textcaps", 10_000, 1e-4, 490, 1552),
        ("vizwiz_caps", 5_000, 1e-4, 490, 1552),
        ("vqav2", 20_000, 1e-4, 490, 1296),
        ("textvqa", 5_000, 1e-4, 490, 1552),
        ("vizwiz_vqa", 5_000, 1e-4, 490, 1552),
        ("okvqa", 5_000, 3e-5, 490, 1296),
        ("stvqa", 5_000, 1e-4, 490, 1552),
    ],
)
def test_recipes_are_the_papers(task: str, steps: int, rate: float, size: int, rows: int) -> None:
    config = composed(f"task={task}")
    (span,) = spans(config)
    phase = for_phase(config, span)
    assert (config.run.steps, config.schedule.peak, phase.model.image_size) == (steps, rate, size)
    assert (phase.data.global_batch_size, phase.model.dropout_rate, phase.data.encoder_length) == (256, 0.1, rows)
    assert config.optimizer.name == "adafactor" and config.schedule.name == "linear_decay"
    assert [phase_learning_rate(config, span, at) for at in (steps // 2, steps)] == pytest.approx([rate / 2, 0])
    assert config.data.tasks[task].train.is_given and config.checkpoint.keep_best == 1


def test_a_task_without_training_files_is_for_evaluation() -> None:
    config = composed("task=nocaps")
    with pytest.raises(ConfigurationError, match=r"^task\.train\.files names no file, so nocaps has nothing to train"):
        config.data.tasks["nocaps"].for_part("train")


def test_the_chain_of_resolutions_is_phases_of_one_run() -> None:
    words = ("task=coco", "phases=chained_task", "mixture=paper_and_task", "run.steps=40000")
    config = composed(*words, "data.root=d")
    first, second, last = spans(config)
    sizes = [for_phase(config, span).model.image_size for span in (first, second, last)]
    assert sizes == [224, 588, 588] and (last.last - last.first + 1, second.last - second.first + 1) == (20_000, 10_000)
    assert list(for_phase(config, last).mixture) == ["task"] and "task" not in for_phase(config, first).mixture
    assert phase_learning_rate(config, last, last.first) == pytest.approx(3e-5 * (1 - 1 / 20_000))
    assert phase_learning_rate(config, first, 1000) == pytest.approx(5e-3)
    assert [for_phase(config, span).model.dropout_rate for span in (first, last)] == [0.0, 0.1]


SMALL = (
    "task.image_size=84", "task.recipe.text_length=28", "task.recipe.batch_size=32", "model.dropout_rate=0",
    "parallel.micro_batch_size=32", "evaluation.samples=0", "evaluation.steps=1", "run.precision=fp32", "tracker=none",
)  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, name: str, main: Any, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    entry(name, main)


TASK = ("task=vqav2", "task.root=official", "task.image_size=84", "tracker.name=none")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature corpus, its official files, a pretrained run, and a fine-tuned one with an average of its weights."""
    home = tmp_path_factory.mktemp("finetune")
    corpus = home / "corpus"
    make_corpus(MiniatureConfig(folder=str(corpus), scale=0.03, languages=["en"], workers=1))
    train_tokenizer(corpus_texts(corpus, "train"), corpus / "tokenizer.model", 1024)
    official.main(official.Options(str(corpus), str(home / "official")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        command(
            patch, "pretrain", pretrain.main, "run.folder=before", "data.root=corpus", "vit=micro", "mt5=micro",
            "phases.mini.image_size=84", "mixture=demo", "data.global_batch_size=16", "parallel.micro_batch_size=16",
            "data.num_streams=2", "data.encoder_length=160", "run.steps=40", "schedule.warmup_steps=10",
            "evaluation.every_steps=0", "run.precision=fp32", "tracker=none",
        )  # fmt: skip
        command(
            patch, "finetune", pretrain.main, "task=vqav2", "task.root=official", "run.initial=before@40",
            "run.folder=after", "task.recipe.learning_rate=1e-2", "task.recipe.steps=120", "evaluation.every_steps=40",
            "evaluation.task_items=60", "optimizer.average_decay=0.9", "checkpoint.keep_last=1", *SMALL,
        )  # fmt: skip
    return home


def scores(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, float]]:
    """(evaluation.json, points by question) of VQAv2 at a step."""
    place = folder / "tasks" / "vqav2" / f"step_{step:08d}"
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    points = {line["id"]: float(line["prediction"] == line["references"][0]) for line in lines}  # all annotators agree
    return json.loads((place / "evaluation.json").read_text(encoding="utf-8")), points


@pytest.fixture(scope="module")
def followed(home: Path) -> Path:
    """The folder once an evaluation has followed the fine-tuning; workers of pytest-xdist may divide these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        command(patch, "evaluate", evaluate.main, "run.folder=after", "evaluation.follow=true", *TASK)
    return home


def test_fine_tuning_beats_the_pretrained_model(followed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than chance: the interval of the paired differences over questions lies above 0."""
    home = followed
    monkeypatch.chdir(home)
    command(monkeypatch, "evaluate", evaluate.main, "run.folder=before", *TASK)
    before, after = scores(home / "before", 40), scores(home / "after", 120)
    assert after[0]["scores"]["vqa_accuracy"]["score"] == pytest.approx(sum(after[1].values()) / len(after[1]))
    assert after[0]["seen_in_training"] == 0 and len(after[1]) > 40
    differences = np.array([after[1][id_] - points for id_, points in before[1].items()])
    drawn = np.random.default_rng(0).choice(differences, (2000, len(differences))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    print(f"VQA accuracy rises by {differences.mean():.3f} (95 % interval {low:.3f} to {high:.3f})")
    assert low > 0.05


def test_the_best_checkpoint_stays_and_is_named(followed: Path) -> None:
    home = followed
    lines = [json.loads(line) for line in (home / "after" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["step"]: line["validation/vqav2/vqa_accuracy"] for line in lines if "validation/loss" in line}
    best = max(reversed(found), key=found.__getitem__)
    kept = sorted(int(path.name[5:]) for path in (home / "after" / "checkpoints").glob("step_*"))
    assert list(found) == [40, 80, 120] and kept == sorted({best, 120})
    assert find_checkpoint(f"{home / 'after'}@best").step == best
    for name in (home / "after" / "tasks" / "vqav2").iterdir():  # the evaluation that followed scored all of them
        assert (name / "evaluation.json").exists() and int(name.name[5:]) in kept


def test_the_average_is_evaluated_on_request(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    task = ("task=vqav2", "task.root=official", "task.image_size=84", "task.name=averaged", "tracker.name=none")
    command(monkeypatch, "evaluate", evaluate.main, "run.folder=after", "evaluation.average=true", *task)
    place = home / "after" / "tasks" / "averaged" / "step_00000120"
    found = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))["scores"]["vqa_accuracy"]["score"]
    assert found > 0.25  # of a random model: 0
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "evaluate", evaluate.main, "run.folder=before", "evaluation.average=true", *task)
    assert end.value.code == 2


def test_training_images_among_those_evaluated_are_counted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers go to wandb too, as a run of their own, here without a network."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    files = "[v2_OpenEnded_mscoco_train2014_questions.json,v2_mscoco_train2014_annotations.json]"
    words = (f"task.files={files}", "task.image_name='COCO_train2014_{image_id:0>12}.jpg'", "task.limit=3")
    words = (*words, "task.name=seen", "tracker.name=wandb", "tracker.mode=offline", "task.image_size=84")
    command(monkeypatch, "evaluate", evaluate.main, "run.folder=after", "task=vqav2", "task.root=official", *words)
    place = home / "after" / "tasks" / "seen" / "step_00000120"
    assert json.loads((place / "evaluation.json").read_text(encoding="utf-8"))["seen_in_training"] == 3
    (run,) = (place / "wandb").glob("offline-run-*")
    assert not run.name.endswith("-another")
    (table,) = (run / "files" / "media" / "table").glob("answers_*.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert len(content["data"]) == 3 and content["columns"][:2] == ["image", "id"]


CHAIN = (  # of conf/phases/chained_task.yaml: what makes it small
    "phases=chained_task", "mixture=paper_and_task", "mixture.object_vqa.source=objects",
    "mixture.detection.source=objects", "phases.frozen_224.image_size=56", "phases.full_588.image_size=84",
    "phases.task.image_size=84", "phases.frozen_224.global_batch_size=8", "phases.full_588.global_batch_size=8",
    "data.global_batch_size=8", "phases.full_588.steps=1", "phases.task.steps=2", "run.steps=4",
)  # fmt: skip


def test_one_command_trains_two_resolutions_and_the_task(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase reads its own objectives, and the frozen phase leaves the ViT as it was."""
    monkeypatch.chdir(home)
    words = ("task=vqav2", "task.root=official", "data.root=corpus", "run.initial=before", "run.folder=chain", *SMALL)
    words = (*words, *CHAIN, "data.pool_examples=16", "evaluation.every_steps=1", "evaluation.task_items=4")
    command(monkeypatch, "finetune", pretrain.main, *words, "checkpoint.keep_every=1", "checkpoint.every_steps=1")
    lines = [json.loads(line) for line in (home / "chain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    read = [{key.partition("/")[2] for key in line if key.startswith("share/")} for line in lines]
    pretraining = {*NAMES} - {"task", "labels"}
    assert read == [pretraining, {"ocr", "captioning", "vqa"}, {"task"}, {"task"}]
    assert [line["lr"] for line in lines] == pytest.approx([5e-6, 2.6e-4, 5e-5, 0.0])
    assert ["validation/vqav2/vqa_accuracy" in line for line in lines] == [False, False, True, True]
    assert [line["examples/task"] for line in lines] == [0, 0, 8, 8]
    models = [PaLIPipeline.from_folder(name).model for name in ("before", "chain@1", "chain@2")]
    first, frozen, trained = (model.get_parameter("vit_block_0.mlp_in.weight") for model in models)
    assert torch.equal(frozen, first) and not torch.equal(trained, first)


def test_several_tasks_train_by_their_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    other = ("+task@data.tasks.vqav2=vqav2", "data.tasks.vqav2.root=official")
    words = ("task=coco", "task.root=official", "run.initial=before", "run.folder=both", *SMALL, *other)
    words = (*words, "mixture.vqav2={source: vqav2, objective: task, weight: 2}", "task.recipe.batch_size=12")
    words = (*words, "task.recipe.steps=2", "evaluation.every_steps=2", "evaluation.task_items=4")
    with pytest.warns(Notice, match=r"^4 of 4 validation items of coco are trained on \(such as "):
        command(monkeypatch, "finetune", pretrain.main, *words, "task.validation.split=train")
    *_, line = map(json.loads, (home / "both" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert (line["share/task"], line["share/vqav2"]) == pytest.approx((1 / 3, 2 / 3))
    assert {"validation/coco/cider", "validation/vqav2/vqa_accuracy"} <= line.keys()
    assert find_checkpoint("both@best").step == 2


def test_classes_are_ranked_by_their_likelihood(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of classes, as ImageNet's: of all names, the five most likely are the prediction."""
    monkeypatch.chdir(home)
    names = {"n1": "red", "n2": "blue", "n3": "green", "n4": "black", "n5": "white", "n6": "a dog"}
    images = sorted((home / "official" / "images").glob("*.jpg"))
    for number, wnid in enumerate(names):
        folder = home / "classes" / "val" / wnid
        folder.mkdir(parents=True)
        (folder / "x.JPEG").write_bytes(images[number].read_bytes())
    classes = {str(number): [wnid, name] for number, (wnid, name) in enumerate(names.items())}
    (home / "classes" / "imagenet_class_index.json").write_text(json.dumps(classes), encoding="utf-8")
    words = ("task.root=classes", "task.image_size=84", "tracker.name=none", "run.folder=after")
    command(monkeypatch, "evaluate", evaluate.main, "task=imagenet", *words)
    place = home / "after" / "tasks" / "imagenet" / "step_00000120"
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    ranked = [line["prediction"].split("\n") for line in lines]
    assert [line["references"] for line in lines] == [[name.replace("_", " ")] for name in names.values()]
    assert all(len({*row}) == 5 for row in ranked)
    found = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    hits = [line["references"][0] in row for line, row in zip(lines, ranked, strict=True)]
    assert found["top_5"]["score"] == pytest.approx(sum(hits) / 6)
    pipeline, prompt = PaLIPipeline.from_folder("after"), lines[0]["prompt"]
    likely = pipeline.score(home / "classes" / "val" / "n1" / "x.JPEG", prompt, list(names.values()))
    ordered = [name for _, name in sorted(zip(likely, names.values(), strict=True), reverse=True)]
    assert ranked[0] == [name.replace("_", " ") for name in ordered[:5]]
