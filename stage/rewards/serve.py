"""Serve a reward by HTTP. `python -m stage.rewards.serve --help` says what can be set."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import hydra
from omegaconf import DictConfig

from stage import launch


@hydra.main(config_path="../../conf", config_name="serve", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        serve(config)


def serve(config: DictConfig) -> None:
    """Build the scorer, say where it listens, and answer until stopped."""
    # Imported here, so that --help and mistakes on the command line are answered at once.
    import uvicorn
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from stage.rewards.service import Limits, Service, build_app, check_exposure, scorer_identity
    from stage.score_checks import check_itself

    launch.quiet_libraries()
    token = find_token(config.token, bool(config.authentication))
    check_exposure(config.host, token)
    limits = Limits(**config.limits)
    scorer = instantiate(config.reward)
    check_itself(scorer, config.self_check)
    plain = OmegaConf.to_container(config.reward, resolve=True)
    assert isinstance(plain, dict)
    reward = str(HydraConfig.get().runtime.choices["reward"])
    identity = scorer_identity({str(key): value for key, value in plain.items()}, scorer)
    service = Service(scorer, reward=reward, identity=identity, token=token, limits=limits)
    print(f"reward {reward} at http://{config.host}:{config.port}, scorer {identity}", flush=True)
    uvicorn.run(
        build_app(service),
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=config.shutdown_seconds,
    )


def find_token(given: str | None, wanted: bool) -> str | None:
    """The token of the configuration, or a fresh one in a file that only this user can read; None without
    authentication.
    """
    if not wanted:
        return None
    if given is not None:
        return given
    token, folder = secrets.token_urlsafe(24), Path("outputs") / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "token"
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(token)
    print(f"the token is in {file}: export STAGE_REWARD_TOKEN=$(cat {file})", flush=True)
    return token


if __name__ == "__main__":
    launch.run(main)
