"""A fine-tuning takes its recipe from its task, learns from official files, and keeps its best checkpoint."""

import pytest
from hydra import compose, initialize_config_dir

from common.errors import ConfigurationError
from common.overrides import as_typed, open_names
from train.compose import to_run_config
from train.config import RunConfig
from train.entry import CONF, TEXT, register
from train.phases import for_phase, phase_learning_rate, spans

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
