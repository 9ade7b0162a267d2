"""The example of serving: its units start what its page says, and what test_serving.py starts."""

import configparser
import shlex
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "example/serve"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


class RepeatedKeys(dict):
    """Joins the values of a key that is given several times, as systemd does for Environment."""

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, [*self[key], *value] if isinstance(value, list) and key in self else value)


@pytest.mark.parametrize("unit", sorted(FOLDER.glob("*.service")), ids=lambda path: path.stem)
def test_a_unit_serves_this_machine_only_and_without_the_hub(unit: Path) -> None:
    parser = configparser.RawConfigParser(dict_type=RepeatedKeys, strict=False)
    parser.optionxform = str
    parser.read(unit, encoding="utf-8")
    service = parser["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    started = shlex.join([Path(program).name, *arguments])
    assert started in PAGE.splitlines()
    assert "--host 127.0.0.1" in started
    assert (service["IPAddressDeny"], service["IPAddressAllow"]) == ("any", "localhost")
    assert "HF_HUB_OFFLINE=1" in service["Environment"].split()
    assert f"]({unit.name})" in PAGE
