"""Plain paths and paths inside packages."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from stage.paths import configured_folder, model_folder, quoted_arguments, resolve


def test_a_path_with_hydras_own_signs_is_quoted_where_it_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = Path("runs/lr=1,seed=2/it's.ckpt")
    file.parent.mkdir(parents=True)
    file.touch()
    parser = OverridesParser.create()
    for path in (str(file), str(file.absolute()), f"~/{file}"):
        [word] = quoted_arguments([f"checkpoint={path}"])
        assert parser.parse_override(word).value() == path
    others = [
        "seed=1,2",
        "--cfg",
        "job",
        "runs",
        "x=tag(a=1)",
        f"x='{file.parent}'",
        "x=a=b",
        "x=" + "a=" * 5000,
    ]
    assert quoted_arguments(others) == others


def test_plain_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("a/b.jsonl") == Path("a/b.jsonl")
    assert resolve(tmp_path) == tmp_path
    assert resolve("~/x") == tmp_path / "x"


def test_package_paths_from_any_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("package://stage/types.py") == root / "stage" / "types.py"
    assert resolve("package://stage/shapes/assets") == root / "stage" / "shapes" / "assets"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("package://stage", ValueError),
        ("package://stage/", ValueError),
        ("package:///types.py", ValueError),
        ("package://stage/../secret", ValueError),
        ("package://stage//types.py", ValueError),
        ("package://..stage/types.py", ValueError),
        ("package://no_such_package/x", FileNotFoundError),
        ("package://stage/no/such.file", FileNotFoundError),
    ],
)
def test_package_paths_that_name_nothing(path: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="package"):
        resolve(path)


class TestModelFolder:
    """Where the weights of a model lie."""

    def test_a_folder_and_a_folder_inside(self, tmp_path: Path) -> None:
        (tmp_path / "inner").mkdir()
        assert model_folder(tmp_path) == tmp_path
        assert model_folder(tmp_path, None, "inner") == tmp_path / "inner"
        assert configured_folder({"path": str(tmp_path), "subfolder": "inner"}) == tmp_path / "inner"
        with pytest.raises(FileNotFoundError, match=r"other does not exist.*model\.subfolder"):
            model_folder(tmp_path, None, "other")

    def test_neither_folder_nor_repository(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*model\.path"):
            model_folder(tmp_path / "nowhere")

    def test_a_folder_counts_before_a_repository(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert model_folder("owner/name") == Path("owner/name")

    def test_a_repository_that_was_downloaded_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """huggingface_hub's cache, laid out by hand: a branch names a commit, a commit has files."""
        commit = "0" * 40
        snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
        (snapshot / "ours").mkdir(parents=True)
        (snapshot / "ours" / "config.json").write_text("{}")
        refs = tmp_path / "models--owner--name" / "refs"
        refs.mkdir()
        for name in ("main", "v2"):
            (refs / name).write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert model_folder("owner/name", "v2", "ours") == snapshot / "ours"
        assert model_folder("owner/name") == snapshot

    def test_a_repository_without_a_network(self) -> None:
        with pytest.raises(
            FileNotFoundError, match="owner/absent is no local folder, and could not be downloaded"
        ):
            model_folder("owner/absent")

    def test_a_network_that_swallows_requests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hub that takes connections and never answers: asked once, not again and again for minutes."""
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(16)
            monkeypatch.setattr("stage.paths.HUB_SECONDS", 0.5)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            monkeypatch.setattr(
                "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}"
            )
            began = time.monotonic()
            with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*[Tt]ime"):
                model_folder("owner/absent")
            assert time.monotonic() - began < 10

    @pytest.mark.parametrize("name", ["stage_geneval", "stage_hps_gdino_git", "stage_ocr"])
    def test_the_published_weights_of_stage(
        self, name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The subfolder of each configuration, in a cache as a download leaves it."""
        folder = {"stage_geneval": "geneval_ours", "stage_ocr": "ocr_ours"}.get(name, "hps_gdino_git_ours")
        commit, repository = "0" * 40, tmp_path / "models--krennic--STAGE"
        (repository / "snapshots" / commit / folder).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        model = OmegaConf.load(root / "conf" / "model" / f"{name}.yaml")
        assert isinstance(model, DictConfig)
        assert configured_folder(dict(model)) == repository / "snapshots" / commit / folder
