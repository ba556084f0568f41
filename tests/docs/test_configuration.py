"""docs/configuration.md is what the classes of the config say."""

from rlfr_vlm.config import Config, parse_config
from scripts.config_reference import PAGE, render, section_of, sections


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python scripts/config_reference.py"


def test_every_setting_has_its_line():
    text = PAGE.read_text(encoding="utf-8")
    chapters = {part.split("\n", 1)[0].lstrip("# "): part for part in text.split("\n\n#")}
    for path, section, _ in sections(Config):
        for name, field in section.model_fields.items():
            if section_of(field) is None:
                assert f"| `{name}` |" in chapters[path], f"{path}.{name}"
                assert field.description, f"{path}.{name} has no description"


def test_what_it_names_as_paths_are_keys_of_a_config():
    cfg = parse_config({"output_dir": "x", "model": {"path": "y", "lora": {}}, "flow": {}})
    for path, _, optional in sections(Config):
        found: object = cfg
        for part in path.split("."):
            found = getattr(found, part)
            if found is None:
                break
        assert optional or found is not None, path
