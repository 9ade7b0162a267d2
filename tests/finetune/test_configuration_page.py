"""docs/configuration.md, which is generated from the dataclasses."""

from docs.generate_configuration import PAGE, configuration_page
from finetune.args import known_settings


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), "run `make docs`"


def test_every_setting_has_a_description_and_a_row():
    for key, setting in known_settings().items():
        assert setting.description and "|" not in setting.description, key
        assert f"| `{key}` |" in configuration_page() or f"| [`{key}`](#" in configuration_page()
