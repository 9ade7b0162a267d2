"""Download a model from the Hugging Face Hub, and verify its checksums: `python -m utils.fetch_model NAME --out DIR`.

NAME is one of those below, or a repository: owner/name. Only the files that training reads are downloaded. Run the same
command again to continue after an interruption, or to verify a folder. Needs the extra `hub`.
"""

import argparse
import difflib
from pathlib import Path

from finetune.cli import run_cli
from model.errors import UserError
from utils.models.hub import download, find_differences, manual_way
from utils.models.known_models import RELEASES, Release


def find_release(name: str) -> Release:
    """Return a release by its name, or by its repository.

    Raises:
        UserError: the name is not in the table and not of the form owner/name.
    """
    if found := RELEASES.get(name.lower()):
        return found
    if name.count("/") == 1 and all(name.split("/")) and not Path(name).exists():
        listed = (release for release in RELEASES.values() if (release.repository or "").lower() == name.lower())
        return next(
            listed, Release("", "license: see its page", name, "config.json params.json *.safetensors tok* tek*")
        )
    close = difflib.get_close_matches(name.lower(), RELEASES, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "."
    raise UserError(
        f"{name!r} is not a known model{hint} Known are {', '.join(RELEASES)}; any other model of the hub can be named "
        "as owner/name."
    )


def fetch_model(name: str, out: Path) -> None:
    """Download a model to the folder `out`; if it is there already, verify it.

    Raises:
        UserError: see `find_release` and `download`; there is no repository, or the folder differs from it.
    """
    release = find_release(name)
    if release.repository is None:
        raise UserError(manual_way(release, f"{name} is not on the hub, only in an archive."))
    if out.is_file():
        raise UserError(f"--out: {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()):
        if differences := find_differences(release, out):
            lines = "\n".join(f"  - {line}" for line in differences)
            raise UserError(
                f"{out} exists and is not {release.repository} as the hub has it:\n{lines}\n"
                "Remove the folder or choose another --out to download the model."
            )
        print(f"{out} has all files of {release.repository}, and their checksums are right.")
        return
    try:
        download(release, out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written: {error.strerror}. Free some space, or check permissions; "
            "then run the same command again, which continues."
        ) from error
    print(f"{out} is complete, and its checksums are right. Use it in a YAML as `model_id_or_path: {out}`.")


def main() -> None:
    names = "\n".join(f"  {name:30} {item.gigabytes:6.1f} GB  {item.license}" for name, item in RELEASES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"names:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a name below, or owner/name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    args = parser.parse_args()
    fetch_model(args.name, args.out)


if __name__ == "__main__":
    run_cli(main)
