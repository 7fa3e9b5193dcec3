"""Average the weights of several checkpoints (a model soup) into a new run's folder.

    python -m train.average checkpoints=[runs/vit_a,runs/vit_b] output=runs/vit
    python -m train.average checkpoints=[runs/vit@800,runs/vit@900,runs/vit@1000] output=runs/vit_mean
    python -m train.average checkpoints=[runs/coco@best,runs/coco_2@best] output=runs/coco_mean

PaLI's ViT-e is the mean of two cool-downs of one run (paper, appendix A.1). The result is a checkpoint without
optimizer state: `weights.vit`, `run.initial`, `train.evaluate` and `train.export` read it. Memory for one piece of a
tensor is taken, whatever the size of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.files import check_new_folder, write_text, writes
from common.values import PATH
from parallel.checkpoint.averaging import write_mean
from parallel.checkpoint.stored_weights import StoredWeights
from train.settings.saved_run import read_settings
from train.weights.saved_checkpoint import CONFIG, find_checkpoint

KEPT = ("config", "tokenizer")  # of what the first checkpoint was saved with; the rest is of its training


@dataclass
class Options:
    """Average the weights of several checkpoints into a new run's folder."""

    checkpoints: list[str] = field(default_factory=list)
    """Two or more: a run's folder (its newest checkpoint), `FOLDER@STEP` or `FOLDER@best`. Required."""
    output: str = field(default=MISSING, metadata=PATH)
    """New or empty folder to write, as that of a run. Required."""


def main(words: Sequence[str]) -> None:
    """Average as the words of the command line set it, and print the checkpoint."""
    options = parse(words, Options)
    print(average(options.checkpoints, options.output))


def average(checkpoints: Sequence[str], output: str) -> str:
    """Write the mean of the checkpoints' weights, and return a sentence about it.

    Raises ConfigurationError for fewer than two, for checkpoints that are missing, damaged, of different models or
    tokenizers, and for an output that is not empty.
    """
    if len(checkpoints) < 2:
        raise ConfigurationError(f"checkpoints={list(checkpoints)} are fewer than two; name those to average.")
    found = [StoredWeights(*find_checkpoint(name, "checkpoints")[:2]) for name in checkpoints]
    folder, extra = Path(output), {key: value for key, value in found[0].extra.items() if key in KEPT}
    check_new_folder(folder)
    for each in found[1:]:
        if each.extra.get("tokenizer") != extra.get("tokenizer"):
            raise ConfigurationError(
                f"{each.path} was trained with another tokenizer, or list of labels, than {found[0].path}; average "
                "checkpoints of one."
            )
    settings = read_settings(found[0].run)
    if settings is None:
        raise ConfigurationError(f"{found[0].run} holds no settings ({CONFIG}); bring them back from a copy.")
    settings.run.folder, settings.run.name = str(folder), folder.name
    with writes(f"output={folder}", "another folder"):
        path = write_mean(found, folder, extra, lambda name: print(f"averaging {name}", flush=True))
        write_text(folder / CONFIG, OmegaConf.to_yaml(settings))
    return f"{path}: the mean of {', '.join(str(each.path) for each in found)}"


if __name__ == "__main__":
    run_command(main)
