"""What the documentation shows is run: every block that is tagged, page by page."""

import pytest

from tests.docs.pages import DOCS, pages, run, script


def test_blocks_share_one_script():
    text = (
        "```bash run\nx=1\n```\ntext\n```bash\nnot run\n```\n"
        "  ```yaml run file=a.yaml\n  key: [1]\n  ```\n```python run\nprint(1)\n```\n"
    )
    made = script(text)
    assert made.splitlines()[2] == "x=1"
    assert "not run" not in made
    assert "cat > a.yaml <<'END_OF_BLOCK_2'\nkey: [1]\nEND_OF_BLOCK_2" in made
    assert "python <<'END_OF_BLOCK_3'\nprint(1)\n" in made


def test_every_tutorial_is_run():
    tutorials = {page for page in (DOCS / "tutorials").glob("*.md") if page.name != "index.md"}
    assert tutorials
    assert tutorials <= set(pages())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_page(page, tmp_path):
    done = run(script(page.read_text()), tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
