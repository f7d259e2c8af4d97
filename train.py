"""Train a policy. `python train.py --help` says what can be set; conf/train.yaml is the table of contents."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from stage import launch, multirun
from stage.worlds import with_world

launch.register_experiments(Path(__file__).parent / "experiments")

# From what is cheap to make to what is not: a mistake shows before the weights are read.
CHEAP = ("algorithm", "sampler", "optimizer", "scheduler", "data", "reward")
COSTLY = ("logger", "model")


def train(prepared: launch.Prepared) -> None:
    """Instantiate every part of the configuration, and fit."""
    # Imported here, so that --help and mistakes on the command line are answered at once.
    import lightning
    from hydra.utils import instantiate

    from stage.code_version import code_record
    from stage.forecast import announce
    from stage.loggers import finish_wandb, log_code, log_reward
    from stage.module import StageModule
    from stage.optimizer import check_settings
    from stage.paths import configured_folder
    from stage.prompt_files import check_prompts
    from stage.score_checks import check_itself

    config = prepared.config
    accelerator = launch.accelerator(config.trainer.accelerator)
    launch.quiet_libraries()
    lightning.seed_everything(config.seed, verbose=False)
    configured_folder(config.model)  # a reward may read weights for minutes before the model's are missed
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    parts = {name: instantiate(config[name]) for name in CHEAP}
    check_settings(parts["optimizer"], parts["scheduler"])
    check_prompts(parts["reward"], parts["data"].by_name())
    check_itself(parts["reward"], config.self_check)
    parts |= {name: instantiate(config[name]) for name in COSTLY}
    module = StageModule(
        policy=parts["model"],
        sampler=parts["sampler"],
        scorer=parts["reward"],
        objective=parts["algorithm"],
        prompts=parts["data"].stream,
        optimizer=parts["optimizer"],
        scheduler=parts["scheduler"],
        group_size=config.group_size,
        gradient_clip=config.gradient_clip,
        seed=config.seed,
        updates=config.updates,
        base=launch.base_weights(config.model),
        reward_beside_reference=config.reward_beside_reference,
        reference_on_cpu=config.reference_on_cpu,
        config=launch.plain(config),
        overrides=prepared.overrides,
    )
    for logger in parts["logger"]:
        logger.log_hyperparams(module.config)
    log_reward(parts["logger"], module.reward_record)
    log_code(parts["logger"], code_record(Path(__file__).parent), launch.updates_before(config.resume))
    trainer = instantiate(
        config.trainer, accelerator=accelerator, logger=parts["logger"], callbacks=callbacks
    )
    launch.say(trainer, launch.first_line(prepared, module, trainer.strategy.root_device))
    announce(module, trainer.strategy, say=partial(launch.say, trainer))
    try:
        launch.fit(trainer, module, config.resume)
    finally:
        finish_wandb()


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(config: DictConfig) -> float | None:
    if multirun.sweeping():
        return multirun.job(config, Path(__file__).resolve())
    with launch.mistakes_in_one_line():
        train(launch.prepare(config))
    return None


if __name__ == "__main__":
    sys.argv[1:] = with_world(sys.argv[1:], Path(__file__).parent / "conf" / "worlds.yaml")
    launch.run(main)
