"""Files that must agree: versions, dependencies, the project's address, code layout, citation."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.support.documents import PAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROJECT_URL = PROJECT["urls"]["Repository"]
OWNER, NAME = PROJECT_URL.split("/")[-2:]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    """Return the tested version of each package."""
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_requirements_are_those_of_pyproject() -> None:
    lines = read("requirements.txt").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["dependencies"]


def test_constraints_are_names_and_versions() -> None:
    lines = read("constraints.txt").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []


def test_constraints_lie_within_the_ranges_of_pyproject() -> None:
    tested = constraints()
    extras = PROJECT["optional-dependencies"]
    needed = [
        *PROJECT["dependencies"],
        *(line for name in extras if name not in ("cuda", "mlflow") for line in extras[name]),
    ]
    for requirement in map(Requirement, needed):
        name = canonical(requirement.name)
        if name != PROJECT["name"]:
            assert requirement.specifier.contains(tested[name], prereleases=True), requirement


def planned(target: str) -> str:
    """Return the commands that make would run."""
    return subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_setup_uses_the_constraints() -> None:
    assert "-c constraints.txt" in planned("setup")


def test_both_ends_of_the_supported_versions_are_documented() -> None:
    assert '--resolution lowest-direct -e ".[test]"' in planned("test-oldest")
    needed = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["transformers"]])
    lowest = {one.name: next(bound.version for bound in one.specifier if bound.operator == ">=") for one in needed}
    for name in ("torch", "transformers"):
        for version in (lowest[name], constraints()[name]):
            short = ".".join(version.split(".")[:2])
            assert f"{name} {short}" in read("CONTRIBUTING.md"), (name, short)


def test_every_address_of_the_project_is_the_same() -> None:
    notebooks = sorted((ROOT / "tutorials").glob("*.ipynb"))
    pages = [*PAGES, ROOT / "CITATION.cff", *notebooks]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for start in ("https://github.com/", "colab.research.google.com/github/"):
            found = re.findall(rf"{re.escape(start)}({OWNER}/[\w.-]+)", text)
            assert set(found) <= {f"{OWNER}/{NAME}"}, page
    assert f"git clone {PROJECT_URL}" in read("README.md")
    assert all(f"/github/{OWNER}/{NAME}/blob/main/tutorials/{path.name}" in path.read_text() for path in notebooks)


def test_versions_agree() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    latest = re.search(r"^## (\d\S*)", read("CHANGELOG.md"), re.MULTILINE)
    assert latest and citation["version"] == PROJECT["version"] == latest[1]
    assert citation["repository-code"] == PROJECT_URL and citation["license"] == PROJECT["license"]


def layout() -> list[str]:
    """Return the files and folders that CONTRIBUTING.md describes."""
    block = read("CONTRIBUTING.md").split("```")[1]
    names, folder = [], ""
    for line in block.strip().splitlines():
        words = re.split(r"  +", line.strip())[0]
        if not line.startswith(" "):
            folder = words if words.endswith("/") else ""
            names.append(words)
        elif words:
            names += [f"{folder}{word}" if word.endswith("/") else f"{folder}{word}.py" for word in words.split(", ")]
    return [name for name in names if name.strip()]


def test_code_layout_is_up_to_date() -> None:
    described = layout()
    assert [name for name in described if not (ROOT / name).exists()] == []
    modules = {str(path.relative_to(ROOT)) for folder in ("model", "finetune") for path in (ROOT / folder).glob("*.py")}
    assert {name for name in modules if Path(name).stem != "__init__"} - set(described) == set()
    packages = {f"{path.relative_to(ROOT)}/" for path in (ROOT / "utils").iterdir() if (path / "__init__.py").is_file()}
    assert packages - set(described) == set()


@pytest.mark.parametrize("tool", ["ruff", "mypy", "codespell", "vulture"])
def test_check_and_pre_commit_run_the_same_tools(tool: str) -> None:
    planned = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert f"/{tool}" in planned and any(f"/{tool}" in hook["entry"] for hook in hooks)
