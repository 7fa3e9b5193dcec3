"""Choose the files of a run's first weights, and check that nothing random is frozen."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from common.errors import ConfigurationError
from model.layers import parameter_parts
from model.pali import PaLI
from parallel.checkpoint.folder import CheckpointFolder
from parallel.checkpoint.initial_weights import check_files, names_in
from train.config import RunConfig
from train.phases import spans

VIT_PREFIXES = ("patches.", "vit_block_", "bridge.vit_norm.")
PROJECTION_PREFIX = "bridge.projection."  # from ViT to mT5; in the file of neither tower
SHOWN = 3  # units named in a message; a tower has dozens


def first_files(config: RunConfig) -> list[str]:
    """List the files that fill the model, in the order of reading."""
    towers = (config.weights.vit, config.weights.mt5)
    return [*(file for file in towers if file is not None), *config.run.initial_weights]


def check_first_weights(config: RunConfig, phases: Sequence[PaLI], expected: Collection[Path] = ()) -> None:
    """Raise ConfigurationError for files that do not fit the model, and for a phase that freezes random weights.

    `phases`: the model of every phase on `meta`, with its frozen parameters. `expected`: files of earlier jobs to come.
    """
    if CheckpointFolder.from_run(config.run.folder).steps():
        return  # the run has weights of its own
    names = {part.name for _, part in parameter_parts(phases[0])}
    given: dict[str, str] = {}
    for key, file in _keys_and_files(config):
        missing = _of_tower(names, key) - set(given)  # a file that does not exist yet is assumed to give all of them
        own = missing if Path(file) in expected else _checked(phases[0], key, file, names)
        if twice := sorted(own & set(given)):
            raise ConfigurationError(
                f"{key}={file} and {given[twice[0]]} both give {twice[0]} ({len(twice)} tensors in all); leave one out."
            )
        given |= dict.fromkeys(own, f"{key}={file}")
    if config.run.initial is not None and (config.weights.vit or config.weights.mt5):
        raise ConfigurationError(
            f"run.initial={config.run.initial} gives the weights of both towers; set weights.vit=null and "
            "weights.mt5=null, or leave run.initial out."
        )
    if config.run.initial is None and not config.run.from_scratch:
        _check_frozen(config, phases, set(given))


def _keys_and_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    for tower in ("vit", "mt5"):
        if (file := getattr(config.weights, tower)) is not None:
            yield f"weights.{tower}", file
    yield from (("run.initial_weights", file) for file in config.run.initial_weights)


def _checked(plan: PaLI, key: str, file: str, names: set[str]) -> set[str]:
    """Return the names in a file; the file of a tower holds all of the tower and nothing else."""
    check_files(plan, [file], key)
    found = names_in(file)
    if key != "run.initial_weights":
        tower = _of_tower(names, key)
        for wrong, what in ((found - tower, "holds other tensors than those of that tower"), (tower - found, "lacks")):
            if wrong:
                raise ConfigurationError(f"{key}={file} {what}: {_some(wrong)}; give a file of this whole tower alone.")
    return found


def _of_tower(names: set[str], key: str) -> set[str]:
    if key == "run.initial_weights":
        return names
    vit = {name for name in names if name.startswith(VIT_PREFIXES)}
    return vit if key == "weights.vit" else {name for name in names - vit if not name.startswith(PROJECTION_PREFIX)}


def _check_frozen(config: RunConfig, phases: Sequence[PaLI], known: set[str]) -> None:
    """Raise ConfigurationError for a frozen tensor that neither a file nor an earlier phase has given a value."""
    for span, model in zip(spans(config), phases, strict=True):
        trained = {part.name for parameter, part in parameter_parts(model) if parameter.requires_grad}
        random = {part.name for _, part in parameter_parts(model)} - trained - known
        if random:
            vit = any(name.startswith(VIT_PREFIXES) for name in random)
            raise ConfigurationError(
                f"phase {span.name!r} freezes {_some(random)}, whose first weights would be random; give them by "
                f"weights.{'vit' if vit else 'mt5'}=<safetensors file>, run.initial_weights or run.initial, or set "
                "run.from_scratch=true."
            )
        known |= trained


def _some(names: Collection[str]) -> str:
    """List the units of tensors, shortened."""
    units = list(dict.fromkeys(name.split(".")[0] for name in sorted(names)))
    more = f" and {len(units) - SHOWN} more units" if len(units) > SHOWN else ""
    return ", ".join(units[:SHOWN]) + more + f" ({len(names)} tensors)"
