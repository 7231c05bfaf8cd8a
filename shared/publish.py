"""Give a pipeline away: `python -m shared.publish --run RUN [--to OWNER/NAME] [--private] [--out DIR]`.

Writes a model card and a picture of samples into the run's pipeline folder (or a copy of it in DIR), and with
--to uploads the whole folder to the Hugging Face hub. Without network or token that is one line, and the
folder stays ready.
"""

import argparse
import shutil
from pathlib import Path

from shared import config, disk
from shared.config import InputError
from shared.recipe import Recipe, without_places
from shared.run import RunFolder, measured, model_of, newest_model, open_run
from shared.show.card import PICTURE, card, edited

CARD = "README.md"


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.publish", description="Write a pipeline's model card; upload it."
    )
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument("--to", metavar="OWNER/NAME", help="upload to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="a repository that only you see")
    parser.add_argument(
        "--license", metavar="NAME", help="of the weights, as the hub knows it: cc-by-4.0, mit"
    )
    parser.add_argument("--out", metavar="DIR", help="a copy here (default: the run's own pipeline folder)")
    return parser.parse_args()


def write(run: RunFolder, recipe: Recipe, folder: Path, place: str, licence: str | None) -> None:
    """The run's pipeline with its card, in a folder; whole or not at all. Raises InputError.

    Arguments:
        run: with a finished pipeline.
        recipe: that it was made with.
        folder: where it goes.
        place: where the card says that it lies.
        licence: of the weights.
    """
    index = disk.read_json(run.pipeline / "model_index.json", "train its last stage again")
    if index is None:
        raise InputError(f"{run}: no finished pipeline yet: train its last stage first")
    newest = newest_model(run, recipe)
    if newest != run.pipeline and model_of(newest) not in (None, model_of(run.pipeline)):
        cure = "run its last train command to its end, which exports it"
        raise InputError(f"{run.pipeline} is of other weights than {newest.name}: {cure}")
    wrong = [fault for fault in disk.faults(run.pipeline) if not fault.startswith((CARD, PICTURE))]
    if wrong:
        raise InputError(
            f"{run.pipeline}: {wrong[0]}; run its last train command again, which writes it anew"
        )
    disk.check_writable(folder)
    listed = disk.sealed(run.pipeline)

    def fill(temporary: Path) -> None:
        for name in listed.keys() - {CARD, PICTURE}:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run.pipeline / name, temporary / name)

    # The card is for people to change, and the picture changes with each drawing: neither is sealed.
    own = _own_card(folder)
    if folder.resolve() != run.pipeline.resolve() or CARD in listed:
        disk.replace_folder(folder, fill, carry=True)
    picture = run.samples / "grid.png"
    if picture.is_file():
        disk.write_file(folder / PICTURE, lambda temporary: shutil.copy(picture, temporary))
    if own is not None:
        disk.write_file(folder / CARD, lambda temporary: temporary.write_bytes(own))
        config.say(f"note: {folder}/{CARD} was edited and stays as it is; remove it for a new one")
        return
    recipe, figures = without_places(recipe), measured(run, run.pipeline)
    text, settings = config.dump(recipe), config.flatten(recipe)
    vae = disk.read_json(run.pipeline / "vae" / "config.json", "train its last stage again") or {}
    content = card(run.path.name, place, text, settings, index, vae, figures, licence, picture.is_file())
    disk.write_text(folder / CARD, content)


def _own_card(folder: Path) -> bytes | None:
    """The card of a folder that a person has edited, or written; None where there is none.

    Earlier versions sealed theirs: it is ours as long as it is as it was.
    """
    file = folder / CARD
    if not file.is_file() or not edited(file.read_text(errors="replace")):
        return None
    listed = disk.sealed(folder)
    ours = CARD in listed and not disk.faults(folder, {CARD: listed[CARD]})
    return None if ours else file.read_bytes()


def upload(folder: Path, place: str, private: bool) -> str:
    """Upload a whole folder, and return its address. Raises InputError where the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        hub = HfApi()
        hub.create_repo(place, private=private, exist_ok=True)
        hub.upload_folder(repo_id=place, folder_path=folder, commit_message="A pipeline of Latent Stack")
        return f"{hub.endpoint}/{place}"
    except HFValidationError as error:
        raise InputError(f"--to: {place!r} is no name of a repository ({_line(error)})") from None
    except Exception as error:  # no token, no network, no right to write: the hub's HTTP library varies
        cure = "log in with `hf auth login`, or set HF_TOKEN"
        raise InputError(f"--to: {place}: {_line(error)}; {cure}; {folder} is ready") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def main() -> None:
    options = parse()
    run, recipe = open_run(options.run)
    folder = Path(options.out) if options.out else run.pipeline
    if options.out and folder.exists() and not (folder / "model_index.json").is_file():
        raise InputError(f"--out: {folder} is there and holds no pipeline; name another folder")
    write(run, recipe, folder, options.to or str(folder), options.license)
    config.say(f"model card: {folder}/{CARD}")
    if options.to:
        config.say(f"uploaded: {upload(folder, options.to, options.private)}")


if __name__ == "__main__":
    config.run(main)
