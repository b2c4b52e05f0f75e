"""Upload a run's model, RUN/model/ with its model card, to the Hugging Face hub.

gnunet push runs/NAME OWNER/NAME --dry_run
gnunet push runs/NAME OWNER/NAME --private

It needs `hf auth login`, or a token that may write in HF_TOKEN. A model card that was edited on the hub stays as it is
there. `gnunet sample OWNER/NAME` and `gnunet train --init_from OWNER/NAME` use what was uploaded.
"""

import argparse
from pathlib import Path

from gnunet.commands.options import Parser, check_exists
from gnunet.errors import CheckpointError, ConfigError, expand, first_line, run_cli, truncate

HIDDEN = [".*", "*/.*"]  # files that are not uploaded, such as those of git


def main(argv: list[str]) -> int:
    parser = Parser("push", __doc__)
    parser.add_argument("run", type=Path, help="run, or the model/ of one")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="model on the hub, which is created if there is none")
    parser.add_argument("--private", action="store_true", help="create it as private")
    parser.add_argument("--dry_run", action="store_true", help="list the files and show the card; upload nothing")
    arguments = parser.parse_args(argv)
    return run_cli(lambda: push(arguments))


def push(arguments: argparse.Namespace) -> None:
    """Upload the export, or show what would be. Raises CheckpointError if there is none, or the hub does not take it,
    and ConfigError for an invalid name and without a login."""
    check_exists(arguments.run)
    # Imported here so that --help does not wait for torch.
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id

    from gnunet.checkpoint.export import exported_images
    from gnunet.checkpoint.model_card import CARD, is_unedited

    repo, folder = arguments.repo_id, expand(arguments.run)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{truncate(repo)}: no name on the hub ({first_line(error)}); valid: OWNER/NAME") from None
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if (images := exported_images(folder)) is None:
        raise CheckpointError(f"{arguments.run}: no export yet; valid: a run of which a checkpoint has written model/")
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if not file.is_dir()}
    names = [*filter_repo_objects(files, ignore_patterns=HIDDEN)]
    if links := [name for name in names if files[name].is_symlink()]:
        raise CheckpointError(f"{files[links[0]]} is a link, whose target would be uploaded; valid: regular files")
    if arguments.dry_run:
        sizes = [f"{files[name].stat().st_size:>15,} bytes  {name}" for name in names]
        card = files[CARD].read_text("utf-8", "replace") if CARD in files else "none"
        print(*sizes, f"would be uploaded to {repo}; {CARD}, its model card:\n\n{card}", sep="\n")
        return
    if huggingface_hub.get_token() is None:
        raise ConfigError("not logged in to the hub; valid: `hf auth login`, or HF_TOKEN with a token that may write")
    api, ignored = huggingface_hub.HfApi(), [*HIDDEN]
    try:
        url = api.create_repo(repo, private=arguments.private or None, exist_ok=True)
        if api.file_exists(url.repo_id, CARD) and not is_unedited(Path(api.hf_hub_download(url.repo_id, CARD))):
            ignored.append(CARD)
            print(f"{CARD} was edited on the hub and stays as it is there")
        message = f"{images} images seen"
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=ignored, commit_message=message)
    except Exception as error:  # of any of the libraries that it uses
        reason = truncate(" ".join(str(error).split()), 300)
        raise CheckpointError(f"{repo}: the hub does not take {folder}: {reason}") from None
    print(f"uploaded {folder} to {url}")
