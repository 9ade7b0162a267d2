"""Write the table of docs/models.md from utils/models/known_models.py: `make docs`."""

from pathlib import Path

from utils.models.known_models import RELEASES, Release

PAGE = Path(__file__).with_name("models.md")
_HEADER = "| `NAME` | repository on Hugging Face | files | weights | license | archive, and its MD5 |"


def models_page() -> str:
    """Return the page with the table of now; the text around it is kept."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_HEADER)
    after = rest.partition("\n\n")[2]
    rows = [_row(name, release) for name, release in RELEASES.items()]
    return before + "\n".join([_HEADER, "| --- | --- | --- | --- | --- | --- |", *rows]) + "\n\n" + after


def _row(name: str, release: Release) -> str:
    repository = release.repository
    link = f"[{repository.partition('/')[2]}](https://huggingface.co/{repository})" if repository else ""
    archive = f"[tar]({release.archive.url}) `{release.archive.md5}`" if release.archive else ""
    return f"| `{name}` | {link} | `{release.files}` | {release.gigabytes:.0f} GB | {release.license} | {archive} |"


if __name__ == "__main__":
    PAGE.write_text(models_page(), encoding="utf-8")
