"""`gnunet push`: what is uploaded, by a stand-in for the hub, and what is refused."""

import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from gnunet.__main__ import main


class Hub:
    """What HfApi does to a repository, whose card is `card`; `calls` has the options of each call."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.files: list[str] = []
        self.card: Path | None = None

    def create_repo(self, repo_id: str, **options: Any) -> huggingface_hub.RepoUrl:
        self.calls["create_repo"] = {"repo_id": repo_id, **options}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return self.card is not None

    def hf_hub_download(self, repo_id: str, name: str) -> str:
        return str(self.card)

    def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str], **options: Any) -> None:
        self.calls["upload_folder"] = options
        names = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        self.files = sorted(filter_repo_objects(names, ignore_patterns=ignore_patterns))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return hub


FILES = [
    "README.md", "curves.png", "gnunet.json", "samples.png", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]  # fmt: skip


def test_a_model_is_uploaded_with_its_card_and_shown_before(run, hub, capsys):
    (run / "model/.git").mkdir()
    (run / "model/.git/config").write_text("")
    assert main(["push", str(run), "me/faces", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in FILES) and ".git" not in shown and not hub.calls
    assert f"{(run / 'model/samples.png').stat().st_size:,} bytes" in shown and "library_name: diffusers" in shown
    for given, private in ((run, True), (run / "model", None)):
        assert main(["push", str(given), "me/faces", *(["--private"] if private else [])]) == 0
        assert hub.files == FILES
        assert hub.calls["create_repo"] == {"repo_id": "me/faces", "private": private, "exist_ok": True}
        assert hub.calls["upload_folder"]["repo_id"] == "me/faces"
        assert "https://huggingface.co/me/faces" in capsys.readouterr().out


def test_a_card_edited_on_the_hub_stays(run, hub, tmp_path):
    hub.card = Path(shutil.copy(run / "model/README.md", tmp_path / "theirs.md"))
    main(["push", str(run), "me/faces"])
    assert hub.files == FILES
    hub.card.write_text(hub.card.read_text().replace("# flow", "# My flow"))
    main(["push", str(run), "me/faces"])
    assert hub.files == FILES[1:]


@pytest.mark.parametrize("name", ["faces of mine", "me/faces/model", "https://huggingface.co/me/faces", ""])
def test_what_is_not_a_name_is_refused(run, hub, capsys, name):
    assert main(["push", str(run), name, "--dry_run"]) == 2
    assert "valid: OWNER/NAME" in capsys.readouterr().err


def test_errors_say_what_to_do(run, hub, capsys, monkeypatch):
    def error(*arguments: str) -> str:
        assert main(["push", *arguments]) == 2 and not hub.files
        return capsys.readouterr().err

    def fail(*given: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(hub, "create_repo", fail)
    assert "me/faces" in (said := error(str(run), "me/faces")) and "no network" in said
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in error(str(run), "me/faces")
    os.symlink("/etc/hostname", run / "model/unet/more.json")
    assert "more.json is a link" in error(str(run), "me/faces", "--dry_run")
    shutil.rmtree(run / "model")
    assert "no export yet" in error(str(run), "me/faces", "--dry_run")
    assert "nosuch" in error(str(run.parent / "nosuch"), "me/faces")
