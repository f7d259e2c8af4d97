"""Between the command line and a run: checks, resuming, the first and the last line, errors in one line.

Imported by train.py before Hydra reads the command line, so nothing heavy is imported at the top.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from stage import mistakes, paths, processes, resolvers

FULL_ERROR = "HYDRA_FULL_ERROR"
ONE_LINE = "STAGE_ONE_LINE"  # set beside it where it is ours and not the user's wish, for processes started meanwhile
WANTS_TRACEBACK = (
    os.environ.get(FULL_ERROR) == "1" and ONE_LINE not in os.environ
)  # read before `run` sets them
OF_THE_COMMAND = ("resume", "output")  # settings of one command, not of the experiment
FIXED = ("model.", "optimizer.", "scheduler.")  # what a checkpoint brings back, whatever is configured
GROUPS = "algorithm model data reward sampler optimizer scheduler trainer logger callbacks"
SWITCHES = ("reference_on_cpu", "reward_beside_reference", "self_check")
SETTINGS = "seed updates group_size gradient_clip name output resume"
KNOWN = {*GROUPS.split(), *SETTINGS.split(), *SWITCHES}
CARRIED = ("metrics.csv", "code.json")  # that a run which goes on elsewhere begins with
LEAST = {"group_size": 2, "updates": 1, "seed": 0}  # whole numbers, and the smallest value of each


def register_experiments(folder: Path) -> None:
    """Make `experiment=NAME` mean `folder/NAME.yaml`, from whatever directory the program is started."""
    store: Any = ConfigStore.instance()
    store.__deepcopy__ = lambda memo: store  # Hydra copies it 200 times for --help
    for file in sorted(folder.glob("*.yaml")):
        store.store(name=file.stem, node=OmegaConf.load(file), group="experiment", package="_global_")


resolvers.register()


def several(arguments: Sequence[str], group: str) -> list[str]:
    """The command line with `group=[a,b]` as `groups=[a,b]`: several options, each composed by itself.

    Hydra would compose them into one node, and refuses two that choose the same inner group.
    """
    return [
        f"{group}s={item.partition('=')[2]}" if item.startswith(f"{group}=[") else item for item in arguments
    ]


def run(main: Callable[[], Any]) -> None:
    """Call a function made by `hydra.main`; a mistake on its command line is one line and exit status 1 too."""
    before = {name: os.environ.get(name) for name in (FULL_ERROR, ONE_LINE)}
    with mistakes_in_one_line():
        try:
            sys.argv[1:] = processes.arguments(paths.quoted_arguments(sys.argv[1:]))
            os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors instead of printing a traceback
            if not WANTS_TRACEBACK:
                os.environ[ONE_LINE] = "1"
            main()
        finally:  # or whoever is started next would take it for the user's wish
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the program with one line, and exit status 1, for an error that the user can mend.

    Put it around the body of a function that `hydra.main` decorates, or Hydra adds a line of its own.
    Other errors, and all errors under HYDRA_FULL_ERROR=1, are raised with their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(exit_status(signal.SIGINT))
    except Exception as error:
        text = None if WANTS_TRACEBACK else mistakes.explain(error)
        if text is None:
            processes.reason_first(error)
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        shared = bool(getattr(error, "on_all_ranks", False))
        processes.leave(f"error: {text}{notes}\n({FULL_ERROR}=1 shows where)", known_to_all=shared)


class Prepared(NamedTuple):
    """What to run: the configuration, the command line that leads to it, the option chosen for each group."""

    config: DictConfig
    overrides: list[str]
    choices: Mapping[str, str]


def prepare(config: DictConfig) -> Prepared:
    """The configuration of this run, or of the run that is resumed, checked, with the folder that Hydra made.

    Raises ValueError or FileNotFoundError, all before a model is loaded.
    """
    hydra = HydraConfig.get()
    found = Prepared(config, [str(item) for item in hydra.overrides.task], dict(hydra.runtime.choices))
    first = processes.started().rank == 0
    if config.resume is not None:
        found = resumed(str(config.resume), found.overrides, say=first)
        if first:
            carry_metrics(Path(str(config.resume)).expanduser(), Path(hydra.runtime.output_dir))
    found.config.output = hydra.runtime.output_dir
    check(found.config)
    check_folder(config)
    processes.check_strategy(found.choices["strategy"], found.config.trainer.devices)
    check_division(found.config)
    return found._replace(overrides=[item for item in found.overrides if key(item) not in OF_THE_COMMAND])


def check(config: DictConfig) -> None:
    """Raise ValueError for numbers that no run can have, and for settings that nothing reads."""
    unknown = sorted(str(name) for name in set(config) - KNOWN)
    if unknown:
        raise ValueError(f"nothing reads {', '.join(unknown)}; settings are {', '.join(sorted(KNOWN))}")
    for name, least in LEAST.items():
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
    clip = config.gradient_clip
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
        raise ValueError(f"gradient_clip must be a positive number or null; got {clip!r}")
    for name in SWITCHES:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false; got {config[name]!r}")


def accelerator(name: str) -> str:
    """Lightning's name of what trains. `auto` and `gpu` are never Apple's MPS, which Lightning would take.

    Raises ValueError for a GPU that is not there, and for MPS: draws and advantages are float64, which it has not.
    """
    import torch

    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator={name} needs CUDA, and torch finds none. Set trainer.accelerator=cpu"
        )
    if name == "mps":
        raise ValueError(
            "trainer.accelerator must be auto, cpu or gpu (CUDA): draws and advantages are summed in float64, which "
            "MPS does not have; got 'mps'. Set trainer.accelerator=cpu"
        )
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name == "gpu" else name


def check_folder(config: DictConfig) -> None:
    """Raise ValueError for a new run where one has its checkpoints already."""
    checkpoints = config.callbacks.get("checkpoints")
    last = None if checkpoints is None else Path(str(checkpoints.folder)) / "last.ckpt"
    if last is not None and config.resume is None and last.exists():
        raise ValueError(
            f"{short(last.parent.parent)} holds a run already: two runs would have one name. Go on with it by "
            f"resume={short(last)}, or choose another output"
        )


def check_division(config: DictConfig) -> None:
    """Raise ValueError where the samples of an update cannot be dealt out to the processes."""
    from stage.ranks import divide

    found = processes.started()
    if found.world > 1 and "prompts_per_update" in config.data:
        divide(found.rank, found.world, config.data.prompts_per_update, config.group_size)


def resumed(path: str, overrides: Sequence[str], *, say: bool) -> Prepared:
    """The run that a checkpoint belongs to, with the changes of this command line.

    `resume=PATH` alone goes on with that run, `resume=PATH updates=200` makes it longer. Changes are printed if `say`.

    Raises ValueError when nothing is left to do, and for changes that a checkpoint would silently undo.
    """
    from stage.training_checkpoint import read_training_checkpoint

    checkpoint = read_training_checkpoint(Path(path).expanduser())
    merged = {key(override): override for override in [*checkpoint["overrides"], *overrides]}
    config = compose("train", list(merged.values()), return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    config.output = checkpoint["config"]["output"]
    changes = dict(differences(checkpoint["config"], plain(config)))
    # The weights at model.path have a hash in the checkpoint, so they may have moved.
    undone = [name for name in changes if name.startswith(FIXED) and name != "model.path"]
    if undone:
        raise ValueError(
            "a resumed run goes on with the model, optimizer and schedule of its checkpoint; "
            f"{undone[0]} is changed, {changes[undone[0]]}. Leave it, or start a new run."
        )
    if checkpoint["update"] >= config.updates:
        raise ValueError(
            f"{path} has done {checkpoint['update']} of {config.updates} updates: nothing is left to do. "
            f"Set updates above {checkpoint['update']} to train longer."
        )
    if changes and say:
        print("changed since the checkpoint:", "; ".join(f"{k} {v}" for k, v in changes.items()), flush=True)
    return Prepared(config, list(merged.values()), choices)


def carry_metrics(checkpoint: Path, output: Path) -> None:
    """Begin metrics and versions of a run that goes on in another folder with those of the run it comes from."""
    from stage.whole_files import atomic_write

    for name in CARRIED:
        before, now = checkpoint.parent.parent / name, output / name
        if before.is_file() and not now.exists():
            with atomic_write(now) as temporary:
                shutil.copyfile(before, temporary)


def updates_before(resume: str | None) -> int:
    """Rollouts that the checkpoint `resume` has done, 0 for a new run."""
    from stage.training_checkpoint import read_training_checkpoint

    return 0 if resume is None else int(read_training_checkpoint(Path(str(resume)).expanduser())["update"])


def key(override: str) -> str:
    """`a.b` of the override `a.b=value`, `+a.b=value` or `~a.b`."""
    return override.partition("=")[0].lstrip("+~")


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict with all interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, `old -> new`) where two configurations differ, apart from what belongs to one command."""
    if name in OF_THE_COMMAND or old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for part in dict.fromkeys([*old, *new]):
            yield from differences(old.get(part), new.get(part), f"{name}.{part}" if name else str(part))
    else:
        yield name, f"{old!r} -> {new!r}"


def quiet_libraries() -> None:
    """Leave the console to this program: no advertisement, no warning about what is meant to be so."""
    import lightning.pytorch  # sets the level of its loggers when it is imported, so it must be by now
    import transformers

    for library in (lightning.pytorch, lightning.fabric):
        logging.getLogger(library.__name__).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    # Frozen parts stay in eval mode on purpose.
    warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")
    # Its new name is not in the older releases of torch that this runs with.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers` is deprecated")
    # What a sliced policy returns is never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Lightning calls an old name of torch's tree functions.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


def base_weights(model: DictConfig) -> dict[str, str]:
    """Path and sha256 of the weights that a policy is loaded from: the identity of a base in checkpoints."""
    from stage.paths import configured_folder
    from stage.training_checkpoint import weights_sha256

    return {"path": str(model.path), "sha256": weights_sha256(configured_folder(model))}


def first_line(prepared: Prepared, module: Any, device: Any) -> str:
    """What will happen and where it goes."""
    images = module.prompts.prompts_per_update * module.group_size
    config, sizes = prepared.config, [(p.numel(), p.requires_grad) for p in module.policy.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    done = f"from a checkpoint of {config.resume} on, " if config.resume else ""
    return (
        f"{updates(config.updates)} of {images} images, {done}algorithm {prepared.choices['algorithm']}, "
        f"model {prepared.choices['model']} ({trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters trained), "
        f"reward {prepared.choices['reward']}, on {places(device)}; writes to {short(config.output)}"
    )


def updates(number: int) -> str:
    """A number of updates in words."""
    return f"{number} update" if number == 1 else f"{number} updates"


def places(device: Any) -> str:
    """The device, and how many of its kind there are."""
    world = processes.started().world
    return str(device) if world == 1 else f"{world} processes with a {device.type} each"


def fit(trainer: Any, module: Any, resume: str | None) -> None:
    """Train, and say in the last line what came of it; after a signal, exit as a shell expects it."""
    begun, path = time.monotonic(), None if resume is None else str(Path(resume).expanduser())
    if trainer.world_size > 1:
        signal.signal(signal.SIGTERM, unless_failing)
    try:
        trainer.fit(module, ckpt_path=path, weights_only=True)
    except SystemExit:  # what Lightning makes of a second Ctrl-C
        say(trainer, f"abandoned update {module.update + 1}; {resume_line(trainer, module)}")
        sys.exit(exit_status(signal.SIGINT))
    except Exception as error:
        if module.update:  # a note, since the reason comes first
            error.add_note(f"failed in update {module.update + 1}; {resume_line(trainer, module)}")
        raise
    number = next((c.signal_number for c in trainer.callbacks if getattr(c, "signal_number", None)), None)
    if number is not None:
        say(trainer, f"stopped after update {module.update}; {resume_line(trainer, module)}")
        sys.exit(exit_status(number))
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    say(trainer, f"{updates(module.update)} done, {minutes}:{seconds:02d} min; {kept(trainer)}")


def say(trainer: Any, text: str) -> None:
    """A line of the first process."""
    if trainer.is_global_zero:
        print(text, flush=True)


def resume_line(trainer: Any, module: Any) -> str:
    """How to go on after a stop."""
    from stage.training_checkpoint import read_training_checkpoint

    last = trainer.checkpoint_callback.last if trainer.checkpoint_callback else None
    if last is None or not last.exists():
        return "nothing was saved, so there is nothing to resume"
    saved = read_training_checkpoint(last)["update"]
    own = [item.path for item in HydraConfig.get().runtime.config_sources if item.provider == "command-line"]
    flags = "".join(f"--config-dir {short(path)} " for path in own)
    return f"update {saved} of {module.updates} is saved, go on with: python train.py {flags}resume={short(last)}"


def kept(trainer: Any) -> str:
    """The checkpoint that a finished run leaves behind."""
    callback = trainer.checkpoint_callback
    return "no checkpoint was kept" if callback is None else f"evaluate {short(callback.last)}"


def unless_failing(number: int, frame: FrameType | None) -> None:
    """Leave on a signal, but not while an error is on its way out: torchrun ends the others as soon as one has died."""
    if sys.exc_info()[1] is None:
        sys.exit(exit_status(number))


def exit_status(number: int) -> int:
    """What a shell reports for a program that a signal ended."""
    return 128 + number


def short(path: str | Path) -> str:
    """A path as the user would type it: relative to the current directory when it lies in it."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
