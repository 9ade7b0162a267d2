"""The wheels that a GPU machine without network needs besides PyTorch, transformers and PEFT: `make gpu-bundle`.

`python -m benchmarks.acceptance.bundle --out DIR [--python 3.11] [--cuda 126] [--without NAME ...] [--wheels DIR]`
downloads the versions of constraints.txt, and leaves out of them what no run needs: bitsandbytes' libraries for other
versions of CUDA, translations, TensorBoard's pages.
"""

import argparse
import csv
import importlib.metadata
import io
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.measure import ROOT
from finetune.cli import run_cli
from model.errors import UserError

_MIB = 1 << 20
_LIMIT = 60 * _MIB  # of the wheels and the checkout
_COMPLETE, _THERE = ("torch",), ("transformers", "peft")  # on the machine: with all, with what they themselves name
_EXTRAS = ("bitsandbytes",)  # of pyproject.toml; xformers repeats what PyTorch has
_FOR_PAGES = ("tensorboard-data-server", "grpcio", "markdown", "setuptools", "werkzeug")  # of TensorBoard
# Files that no run reads.
_UNUSED = {"pycountry": r"pycountry/locales/.*", "tensorboard": r"tensorboard/webfiles\.zip"}
_PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(17, 35)), "manylinux2014_x86_64", "linux_x86_64"]
_NO_NETWORK = ("connection broken", "Failed to establish", "name resolution", "timed out", "ProxyError", "Max retries")


def needed_packages(python: str, without: Iterable[str] = ()) -> list[str]:
    """Return `NAME==VERSION`, as installed here, of every package that the project needs and the machine lacks.

    Args:
        python: version of Python on the machine, such as 3.11.
        without: more packages that the machine has.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in _EXTRAS for line in project["optional-dependencies"][extra])]
    there = _closure(map(Requirement, _COMPLETE), python, {*_FOR_PAGES, *map(canonicalize_name, (*_THERE, *without))})
    there |= {canonicalize_name(needed.name) for name in _THERE for needed in _needs(Requirement(name), python)}
    names = sorted(_closure(map(Requirement, lines), python, there) - there)
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]


def _closure(requirements: Iterable[Requirement], python: str, known: Iterable[str]) -> set[str]:
    """Return `known` and the names of packages with all that they need."""
    found, waiting = set(known), list(requirements)
    while waiting:
        requirement = waiting.pop()
        if (name := canonicalize_name(requirement.name)) not in found:
            found.add(name)
            waiting += _needs(requirement, python)
    return found


def _needs(requirement: Requirement, python: str) -> Iterator[Requirement]:
    """Yield what a package, installed here, needs on the machine, with the extras that are named."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    machine |= {"sys_platform": "linux", "platform_system": "Linux"}
    for needed in map(Requirement, importlib.metadata.requires(requirement.name) or ()):
        extras = (*requirement.extras, "")
        if needed.marker is None or any(needed.marker.evaluate(machine | {"extra": extra}) for extra in extras):
            yield needed


def download(packages: list[str], python: str, out: Path, wheels: Path | None) -> None:
    """Save the wheels of packages for a version of Python on Linux in `out`, from the index or from a folder.

    Raises:
        UserError: a wheel cannot be found, or the index not reached.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [f"--platform={platform}" for platform in _PLATFORMS]
    command += ["--no-index", "--find-links", str(wheels)] if wheels else []
    done = subprocess.run([*command, "--dest", str(out), *packages], capture_output=True, text=True)
    if not done.returncode:
        return
    if any(part in done.stderr for part in _NO_NETWORK):
        raise UserError(
            "The package index cannot be reached from this machine. Run `make gpu-bundle` on one that reaches it, or "
            "name a folder of wheels: `make gpu-bundle WHEELS=FOLDER`."
        )
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    raise UserError(f"pip found no wheels for Python {python}: {(errors or ['no reason given'])[-1]}")


def shrink(wheel: Path, cuda: str) -> None:
    """Remove from a wheel what no run reads, such as bitsandbytes' libraries for other versions of CUDA.

    Raises:
        UserError: bitsandbytes has no library for this version.
    """
    name = wheel.name.partition("-")[0]
    unused = _UNUSED.get(name)
    with zipfile.ZipFile(wheel) as source:
        if name == "bitsandbytes":
            unused = _other_libraries(wheel.name, source.namelist(), cuda)
        dropped = {each for each in source.namelist() if unused and re.fullmatch(unused, each)}
        if not dropped:
            return
        temporary = wheel.with_suffix(".new")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as target:
            for item in source.infolist():
                if item.filename not in dropped:
                    content = source.read(item)
                    is_record = item.filename.endswith(".dist-info/RECORD")
                    target.writestr(item.filename, _record_without(content, dropped) if is_record else content)
    temporary.replace(wheel)


def _other_libraries(wheel: str, files: Iterable[str], cuda: str) -> str:
    """Return a pattern of all libraries but those for this version of CUDA and for the CPU."""
    versions = sorted(
        match[1] for match in (re.search(r"libbitsandbytes_cuda(\d+)\.so$", file) for file in files) if match
    )
    if cuda not in versions:
        raise UserError(
            f"{wheel} has no library for CUDA {cuda}; it has: {', '.join(versions)}. Set CUDA to one of them."
        )
    return rf"bitsandbytes/libbitsandbytes_(?!cuda{cuda}\.|cpu\.).*\.so"


def _record_without(record: bytes, dropped: set[str]) -> str:
    rows = [row for row in csv.reader(io.StringIO(record.decode())) if row and row[0] not in dropped]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()


def tree_bytes() -> int:
    """Return the size of the files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum((ROOT / name).stat().st_size for name in names.split("\0") if name and (ROOT / name).is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it is replaced")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=here, help=f"version on the GPU machine; default: {here}")
    parser.add_argument("--cuda", default="126", help="of its PyTorch, without a dot; default: 126")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="more packages that it has")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take the wheels from here, not from the index")
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python):
        raise UserError(f"--python is {options.python}; expected a version such as 3.11.")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    download(needed_packages(options.python, options.without), options.python, options.out, options.wheels)
    for wheel in options.out.glob("*.whl"):
        shrink(wheel, options.cuda)
    _report(options)


def _report(options: argparse.Namespace) -> None:
    sizes = {wheel.name.partition("-")[0]: wheel.stat().st_size for wheel in options.out.glob("*.whl")}
    total, tree = sum(sizes.values()), tree_bytes()
    by_size = sorted(sizes, key=lambda name: sizes[name], reverse=True)
    largest = ", ".join(f"{name} {sizes[name] / _MIB:.1f}" for name in by_size[:5])
    print(
        f"{options.out}: {len(sizes)} wheels for Python {options.python} and CUDA {options.cuda}, "
        f"{total / _MIB:.1f} MiB; with the checkout {(total + tree) / _MIB:.1f} MiB. The largest: {largest}."
    )
    if total + tree > _LIMIT:
        raise UserError(
            f"This is more than {_LIMIT // _MIB} MiB. Name packages that the machine has: "
            '`make gpu-bundle WITHOUT="matplotlib tensorboard"`.'
        )


if __name__ == "__main__":
    run_cli(main)
