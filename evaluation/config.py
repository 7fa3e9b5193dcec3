"""Define the settings of validation and evaluation: the group `evaluation` of a run's configuration."""

from dataclasses import dataclass, field

from common.values import above, at_least, one_of


@dataclass
class Component:
    """Name an objective on a source, as `{source: vq2a, objective: vqa}`."""

    source: str = ""
    """Name of the source."""
    objective: str = ""
    """Name of the objective."""


@dataclass
class EvaluationConfig:
    """Validate while training, and generate on a held-out split after it (`python -m train.evaluate`)."""

    every_steps: int = 1000
    """Validate after every so many steps, and at the end; 0 never. 1000 by default."""
    steps: int = 4
    """Validation batches that the loss is measured on. 4 by default: it takes as long as 2 steps."""
    samples: int = 8
    """Predictions that are shown at each validation. 8 by default: one of each objective."""
    task_items: int = 1000
    """Validation items of each task that a fine-tuning is scored on at each validation, evenly spread; 0 none. 1000 by
    default: VQA accuracy within 3 points."""
    split: str = "test"
    """Split of `train.evaluate`: `validation` or `test`. Test by default: validation may have been tuned on."""
    examples: int = 512
    """Examples of each component in `train.evaluate`. 512 by default: scores within 2 % or so."""
    batch: int = 32
    """Examples that are generated at once. 32 by default; lower it where memory runs out."""
    max_new_tokens: int = 64
    """Tokens of a prediction at most. 64 by default: longer than captions and answers."""
    components: list[Component] = field(default_factory=list)
    """Components to evaluate, by source and objective. Empty by default: all of the mixture."""
    languages: list[str] = field(default_factory=list)
    """Languages to evaluate, by code. Empty by default: all."""
    average: bool = False
    """Evaluate, and validate, the average of the weights (`optimizer.average_decay`) in place of the weights. False by
    default."""
    follow: bool = False
    """Score every checkpoint of a run that is still training, until that of its last step; with `task` alone. False by
    default: one checkpoint."""
    follow_s: float = 3600.0
    """Seconds to wait for the next checkpoint before the command ends. An hour by default."""
    step: int | None = None
    """Step of the checkpoint to evaluate, as `checkpoint=FOLDER@STEP` sets it. Null by default: the latest."""

    def __post_init__(self) -> None:
        at_least(
            "evaluation.",
            1,
            steps=self.steps,
            examples=self.examples,
            batch=self.batch,
            max_new_tokens=self.max_new_tokens,
        )
        above("evaluation.", 0, follow_s=self.follow_s)
        at_least("evaluation.", 0, every_steps=self.every_steps, samples=self.samples, task_items=self.task_items)
        one_of("evaluation.split", self.split, ("validation", "test"))
