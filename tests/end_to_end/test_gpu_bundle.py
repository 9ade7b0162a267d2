"""make gpu-bundle: the wheels for a machine without network, from a folder of wheels here, not from the index."""

import csv
import io
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks.acceptance import bundle
from tests.support.documents import ROOT

OTHER_FILES = {
    "bitsandbytes": [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126", "cuda130", "rocm63")],
    "pycountry": ["pycountry/locales/fr/iso3166.mo"],
    "tensorboard": ["tensorboard/webfiles.zip"],
}


def write_wheel(folder: Path, requirement: str) -> None:
    name, _, version = requirement.partition("==")
    name = name.replace("-", "_")
    record = f"{name}-{version}.dist-info/RECORD"
    files = {f"{name}/__init__.py": "", f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\n"}
    files[f"{name}-{version}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files |= dict.fromkeys(OTHER_FILES.get(name, ()), "content")
    files[record] = "".join(f"{file},,\n" for file in (*files, record))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder with a wheel of every package that is needed."""
    folder = tmp_path_factory.mktemp("wheels")
    for requirement in bundle.needed_packages("3.11"):
        write_wheel(folder, requirement)
    return folder


def test_packages_that_the_machine_lacks_are_needed():
    names = {requirement.partition("==")[0] for requirement in bundle.needed_packages("3.11")}
    assert {
        "mistral-common",
        "pydantic",
        "pydantic-core",
        "fire",
        "simple-parsing",
        "tiktoken",
        "bitsandbytes",
    } <= names
    assert not names & {
        "torch",
        "transformers",
        "peft",
        "numpy",
        "jinja2",
        "safetensors",
        "wandb",
        "pytest",
        "xformers",
    }
    assert "rpds-py" in names  # of mistral-common's jsonschema
    fewer = bundle.needed_packages("3.11", without=["matplotlib", "tensorboard"])
    assert not {"matplotlib", "tensorboard", "fonttools", "protobuf"} & {each.partition("==")[0] for each in fewer}


def test_the_bundle_has_what_a_run_reads_and_says_how_large_it_is(wheels, tmp_path, run_command):
    out = tmp_path / "bundle"
    options = ("--out", out, "--python", "3.11", "--cuda", "126", "--wheels", wheels)
    code, output = run_command(bundle, *options)
    needed = bundle.needed_packages("3.11")
    assert code == 0, output
    assert f"{len(needed)} wheels for Python 3.11 and CUDA 126, 0.0 MiB; with the checkout " in output
    assert len(list(out.iterdir())) == len(needed)
    for name, others in OTHER_FILES.items():
        [path] = out.glob(f"{name}-*.whl")
        with zipfile.ZipFile(path) as wheel:
            [record] = [file for file in wheel.namelist() if file.endswith("/RECORD")]
            recorded = [row[0] for row in csv.reader(io.StringIO(wheel.read(record).decode()))]
            assert recorded == wheel.namelist()
            kept = {f"{name}/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126")}
            assert {file for file in recorded if file in others} == kept & {*others}


def copied(packages: list[str], python: str, out: Path, wheels: Path) -> None:
    """Replace pip, which takes a second."""
    shutil.copytree(wheels, out, dirs_exist_ok=True)


def test_too_large_a_bundle_is_refused(wheels, tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(bundle, "download", copied)
    monkeypatch.setattr(bundle, "tree_bytes", lambda: 61 << 20)
    code, output = run_command(bundle, "--out", tmp_path / "bundle", "--python", "3.11", "--wheels", wheels)
    assert code == 1 and "with the checkout 61.0 MiB" in output and "This is more than 60 MiB" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--python", "3.11", "--cuda", "99"), "has no library for CUDA 99; it has: 126, 130. Set CUDA to one of them"),
        (("--python", "three"), "--python is three; expected a version such as 3.11"),
    ],
)
def test_impossible_versions_are_refused(options, message, wheels, tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(bundle, "download", copied)
    code, output = run_command(bundle, "--out", tmp_path / "bundle", "--wheels", wheels, *options)
    assert code == 1 and message in output and "Traceback" not in output


def test_a_missing_wheel_is_named(tmp_path, run_command):
    code, output = run_command(bundle, "--out", tmp_path / "bundle", "--python", "3.11", "--wheels", tmp_path)
    first = bundle.needed_packages("3.11")[0]
    assert code == 1 and "pip found no wheels for Python 3.11" in output and first in output


def test_an_index_that_cannot_be_reached_is_reported(tmp_path, run_command, monkeypatch):
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens
    code, output = run_command(bundle, "--out", tmp_path / "bundle", "--python", "3.11")
    assert code == 1 and "The package index cannot be reached from this machine" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("given", "options"),
    [((), "--cuda 126"), (("PYTHON=3.12", "CUDA=130", "WITHOUT=matplotlib"), "--cuda 130 --python 3.12")],
)
def test_make_passes_what_is_given(given, options):
    command = ["make", "-n", "-o", "setup", "gpu-bundle", *given]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"-m benchmarks.acceptance.bundle --out gpu-bundle {options}" in planned
    assert ("--without matplotlib" in planned) == bool(given)
