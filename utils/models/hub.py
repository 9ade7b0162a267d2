"""Download models from the Hugging Face Hub and upload exports to it. Only this file opens connections, when asked.

huggingface_hub reads HF_ENDPOINT (a mirror), HF_TOKEN or the token of `hf auth login`, HF_HUB_OFFLINE and HTTPS_PROXY.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.errors import UserError, first_line
from utils.models.known_models import Release

_TIMEOUT_S = 20.0
_FREE_AFTERWARDS = 1 << 28  # bytes: a disk without any is of no use
# What is read of a model folder, in the order of preference: its weights, and its tokenizer.
_LAYOUTS = {
    "params.json": re.compile(r"consolidated(-\d+-of-\d+)?\.safetensors"),
    "config.json": re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
}
_TOKENIZERS = tuple(map(re.compile, (r"tekken\.json", r"tokenizer\.model\.v\d+\w*", r"tokenizer\.model")))
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    sha256: str | None  # of files in large file storage
    git_sha1: str | None  # of other files: git's hash of a blob

    def is_intact(self, path: Path) -> bool:
        """Return whether a local file has the stated size and checksum."""
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            blob = b"blob %d\0" % self.size + file.read()
            return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == self.git_sha1


def import_hub() -> Any:
    """Return the library huggingface_hub; raise UserError if it is not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it reports versions and asks for a list of programs
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError("huggingface_hub is not installed: pip install 'recode-mistral-finetune[hub]'.") from error
    return huggingface_hub


def choose_files(repository: str, present: list[RemoteFile]) -> list[RemoteFile]:
    """Return the files that are read of a model: its shapes, weights and tokenizer, small ones first.

    Raises:
        UserError: the weights or the tokenizer are in formats that are not read.
    """
    named = {file.name: file for file in present}
    for shapes, pattern in _LAYOUTS.items():
        weights = [name for name in named if pattern.fullmatch(name)]
        if shapes in named and weights:
            break
    else:
        raise UserError(
            f"{repository} has no weights that are read: expected params.json with consolidated*.safetensors, or "
            "config.json with model*.safetensors."
        )
    single = [name for name in weights if "-of-" not in name]
    index = [f"{weights[0].partition('-')[0]}.safetensors.index.json"]
    tokenizers = [sorted(name for name in named if pattern.fullmatch(name)) for pattern in _TOKENIZERS]
    tokenizer = next((found[-1:] for found in tokenizers if found), [])
    if not tokenizer:
        raise UserError(f"{repository} has no tokenizer that is read: expected tekken.json or tokenizer.model*.")
    settings = _TOKENIZER_SETTINGS if shapes == "config.json" else ()
    names = [shapes, *tokenizer, *settings, *(single or index + weights)]
    return sorted((named[name] for name in names if name in named), key=lambda file: (file.size, file.name))


def list_files(release: Release) -> tuple[str, list[RemoteFile]]:
    """Return the commit of a release's repository, and the files to read.

    Raises:
        UserError: the hub cannot be reached or refuses, or see `choose_files`.
    """
    hub = import_hub()
    with _explained_errors(str(release.repository), functools.partial(manual_way, release)):
        info = hub.HfApi().model_info(release.repository, files_metadata=True, timeout=_TIMEOUT_S)
    files = [
        RemoteFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in info.siblings or []
    ]
    return info.sha, choose_files(str(release.repository), files)


def download(release: Release, out: Path) -> None:
    """Download a release to the folder `out`, which appears when all of its checksums are right.

    Until then the files are in `out`.incomplete, where the next call continues.

    Raises:
        UserError: see `list_files`; the disk is too small, the connection was lost, or a checksum differs.
    """
    commit, files = list_files(release)
    folder = out.with_name(f"{out.name}.incomplete")
    parts = {file: folder / f"{file.name}.{(file.sha256 or file.git_sha1 or '')[:12]}.part" for file in files}
    missing = sum(file.size for file in files) - sum(part.stat().st_size for part in parts.values() if part.exists())
    missing -= sum(file.size for file in files if (folder / file.name).exists())
    _require_space(out, missing)
    have = sum(file.size for file in files) - missing
    print(
        f"{release.repository} ({release.license}, revision {commit[:12]}): {len(files)} files, "
        f"{_gigabytes(missing)} to download" + (f", {_gigabytes(have)} are here already." if have else "."),
        flush=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (folder / file.name).exists():
            with _explained_errors(str(release.repository), functools.partial(manual_way, release)):
                _download_file(str(release.repository), commit, file, parts[file])
            os.replace(parts[file], folder / file.name)
    for leftover in set(folder.iterdir()) - {folder / file.name for file in files}:
        leftover.unlink()
    if out.exists():  # an empty folder
        out.rmdir()
    os.replace(folder, out)


def _download_file(repository: str, commit: str, file: RemoteFile, part: Path) -> None:
    """Complete `part` and compare its checksum; a part with a wrong one is removed."""
    from huggingface_hub.file_download import http_get  # its hf_hub_download does not continue a killed download
    from huggingface_hub.utils import build_hf_headers

    url = import_hub().hf_hub_url(repository, file.name, revision=commit)
    with part.open("ab") as target:
        if (have := target.tell()) < file.size:
            http_get(
                url,
                target,
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
    print(f"Verifying {file.name}.", flush=True)
    if not file.is_intact(part):
        part.unlink()
        raise UserError(
            f"{file.name} of {repository} does not have the checksum that the hub states: "
            f"{file.sha256 or file.git_sha1}. What was downloaded of it is removed: run the command again. If that "
            "repeats, a proxy changes files."
        )


def find_differences(release: Release, folder: Path) -> list[str]:
    """Compare a model folder with a release; return a line for each file that is missing or differs."""
    _, files = list_files(release)
    lines = []
    for file in files:
        path = folder / file.name
        if not path.is_file():
            lines.append(f"{file.name} is missing")
            continue
        print(f"Verifying {file.name}.", flush=True)
        if not file.is_intact(path):
            lines.append(f"{file.name} differs: {path.stat().st_size:,} bytes, the hub has {file.size:,}")
    return lines


def _require_space(out: Path, needed: int) -> None:
    existing = next(folder for folder in out.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed + _FREE_AFTERWARDS > free:
        raise UserError(
            f"{existing} has {_gigabytes(free)} of free space, and {_gigabytes(needed)} are to be downloaded: free "
            "some, or choose --out on another disk."
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_push(repository: str, public: bool) -> None:
    """Check that an export may be uploaded, before it is computed.

    Raises:
        UserError: the name is not owner/name, there is no token, the hub refuses, or the repository exists and is
            public, but `public` is not set.
    """
    hub = import_hub()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push: {repository!r} is not the name of a repository; expected owner/name.")
    if hub.get_token() is None:
        raise UserError("--push needs a token with write access: run `hf auth login`, or set HF_TOKEN.")
    with _explained_errors(repository, _unreachable):
        api = hub.HfApi()
        is_public = api.repo_exists(repository) and not api.model_info(repository, timeout=_TIMEOUT_S).private
    if is_public and not public:
        raise UserError(
            f"--push: {repository} exists and is public, so everybody could download the weights. Choose another name, "
            "or give --public if that is intended."
        )


def push(folder: Path, repository: str, public: bool) -> None:
    """Upload a folder to a repository, which is created if needed: private, unless `public` is set.

    Raises:
        UserError: see `check_push`; the folder stays.
    """
    files = sorted(folder.iterdir())
    size = _gigabytes(sum(file.stat().st_size for file in files))
    print(
        f"Uploading to {_endpoint()}/{repository} ({'PUBLIC' if public else 'private'}): "
        f"{', '.join(file.name for file in files)}, {size}. These files leave this machine, nothing else does. Weights "
        "that were trained on notes can reproduce parts of them.",
        flush=True,
    )
    try:
        check_push(repository, public)  # again: writing a large export takes a while
        with _explained_errors(repository, _unreachable):
            api = import_hub().HfApi()
            api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an export")
    except UserError as error:
        private = "" if public else " --private"
        raise UserError(
            f"{error}\nThe export in {folder} is complete. To upload it: hf upload {repository} {folder} .{private}"
        ) from error
    print(f"Uploaded to {_endpoint()}/{repository}.")


@contextlib.contextmanager
def _explained_errors(repository: str, way_out: Callable[[str], str]) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of its HTTP library into a UserError with the remedy.

    Args:
        repository: that is read or written.
        way_out: what to say if the hub cannot be reached, given the reason.
    """
    errors = import_hub().errors
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(_gated(repository)) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{_endpoint()} has no repository {repository}, or it is private. Check the name; for a private one, log "
            "in with `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(
            f"{_endpoint()} answers with {status}: {first_line(error)}{_TOKEN_HINT.get(status, '')}"
        ) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            raise  # the disk's, not the network's
        raise UserError(way_out(first_line(error))) from error
    except UnicodeEncodeError as error:  # the message of the error has a character of the token
        raise UserError(
            "The token (HF_TOKEN, or that of `hf auth login`) has a character that no token has: copy it again."
        ) from error
    except ValueError as error:  # files that huggingface_hub does not download over plain HTTP
        raise UserError(f"{repository}: {first_line(error)}") from error
    except Exception as error:  # of the HTTP library: no route, no name, a proxy, a timeout
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(way_out(first_line(error))) from error


_TOKEN_HINT = {
    401: " The token (HF_TOKEN, or that of `hf auth login`) is not valid: create another one, or remove it.",
    403: " The token does not allow this: create one with more permissions at https://huggingface.co/settings/tokens.",
}


def _gated(repository: str | None) -> str:
    known = import_hub().get_token() is not None
    token = (
        "The token that is set belongs to an account without access (or does not include gated repositories)."
        if known
        else "No token is set."
    )
    return (
        f"{repository} is gated: its license must be accepted once. {token}\n"
        f"  1. Log in at https://huggingface.co/{repository} and accept the license.\n"
        "  2. Create a token with read access at https://huggingface.co/settings/tokens.\n"
        "  3. Run `hf auth login`, or set HF_TOKEN, and run the same command again."
    )


def _endpoint() -> str:
    return str(import_hub().constants.ENDPOINT)


def _unreachable(reason: str) -> str:
    return f"{_endpoint()} cannot be reached: {reason.removesuffix('.')}."


def manual_way(release: Release, reason: str) -> str:
    """Return what to say when the hub cannot be used: how to download on another computer, and how to check it."""
    lines = [_unreachable(reason) if release.repository else reason]
    lines.append(
        "Run the command again to continue; behind a proxy, set HTTPS_PROXY. HF_ENDPOINT names a mirror. Without a "
        "connection, run this on a computer that has one, then copy the folder here:"
    )
    if release.repository:
        patterns = " ".join(f"'{name}'" if "*" in name else name for name in release.files.split())
        option = " ".join(f"--include {name}" for name in patterns.split()) if "*" in patterns else patterns
        lines += [
            "  pip install huggingface_hub",
            f"  hf download {release.repository} {option} --local-dir MODEL",
            f"  The checksums are at https://huggingface.co/{release.repository}/tree/main, one page a file.",
        ]
    if release.archive:
        name = release.archive.url.rpartition("/")[2]
        lines += [
            *(["or"] if release.repository else []),
            f"  wget -c {release.archive.url}",
            f"  echo '{release.archive.md5}  {name}' | md5sum -c",
            f"  mkdir MODEL && tar -xf {name} -C MODEL",
        ]
    return "\n".join(lines)
