"""The generated parts of the documentation."""

from docs.generate_configuration import MIGRATION_PAGE, PAGE, configuration_page, migration_page
from finetune.args import known_settings


def test_the_pages_are_current():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), "run `make docs`"
    assert MIGRATION_PAGE.read_text(encoding="utf-8") == migration_page(), "run `make docs`"
    assert "| `load_in_4bit`, `use_4bit`, " in migration_page()


def test_every_setting_has_a_description_and_a_row():
    for key, setting in known_settings().items():
        assert setting.description and "|" not in setting.description, key
        assert f"| `{key}` |" in configuration_page() or f"| [`{key}`](#" in configuration_page()
