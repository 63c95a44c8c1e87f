"""What a release needs: one version everywhere, links that lead somewhere, and files that say what is true."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import fftriton
from fftriton.app.cli import app

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = ("fftriton/__init__.py", "kernels/fftriton_kernels/__init__.py", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture
def setup(monkeypatch):
    """Runs setup.py for a publisher's address, and returns its settings."""

    def run(repository):
        settings = {}
        monkeypatch.setenv("FFTRITON_REPOSITORY", repository)
        monkeypatch.setattr("setuptools.setup", settings.update)
        names = runpy.run_path(str(ROOT / "setup.py"))
        return settings | {"for_an_index": names["for_an_index"]}

    return run


def targets(text):
    return LINK.findall(CODE.sub("", text))


@pytest.mark.parametrize("repository", ["https://example.org/own/fftriton", "https://example.org/own/fftriton/"])
def test_links_on_an_index_lead_to_the_repository(setup, repository):
    settings = setup(repository)
    found = targets(settings["long_description"])
    start = rf"https://example\.org/own/fftriton/(blob|raw)/v{re.escape(fftriton.__version__)}/"
    inside = [target for target in found if re.match(start, target)]
    assert len(inside) > 20
    assert all(target.startswith(("https://", "#")) for target in found)
    for target in inside:
        assert (ROOT / re.sub(start, "", target).partition("#")[0]).exists(), target
    assert any("/raw/" in target and target.endswith(".png") for target in inside)
    assert settings["project_urls"]["Source"] == "https://example.org/own/fftriton"


def test_without_an_address_nothing_leads_nowhere(setup):
    settings = setup("")
    found = targets(settings["long_description"])
    assert found
    assert all(target.startswith(("https://", "#")) for target in found)
    assert settings["project_urls"] == {}
    assert "docs/videos.md has the details" in " ".join(settings["long_description"].split())


@pytest.mark.parametrize(
    ("text", "linked", "plain"),
    [
        ("[a](docs/a.md)", "[a](R/blob/vV/docs/a.md)", "a"),
        ("![a](b.png) c", "![a](R/raw/vV/b.png) c", " c"),
        ("[a](b.md#c)", "[a](R/blob/vV/b.md#c)", "a"),
        ("[a](https://b.org) [c](#d)", "[a](https://b.org) [c](#d)", "[a](https://b.org) [c](#d)"),
        ("`[a](b)`", "`[a](b)`", "`[a](b)`"),
        ("```python\nx[0](y)\n```\n[a](b)", "```python\nx[0](y)\n```\n[a](R/blob/vV/b)", "```python\nx[0](y)\n```\na"),
        ("[mail](mailto:a@b.org)", "[mail](mailto:a@b.org)", "[mail](mailto:a@b.org)"),
    ],
)
def test_links_and_code(setup, text, linked, plain):
    expected = linked.replace("R", "https://r.org").replace("V", fftriton.__version__)
    assert setup("https://r.org")["for_an_index"](text) == expected
    assert setup("")["for_an_index"](text) == plain


@pytest.fixture
def tree(tmp_path):
    """Copies of the files that name a version, ready for the release 9.8.7."""
    for name in NAMED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text().replace(fftriton.__version__, "9.8.7")
        (tmp_path / name).write_text(text.replace("## Unreleased", "## 9.8.7 - 2030-01-31", 1))
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release.py", tmp_path / ".ci")
    return tmp_path


def release(tree, tag):
    return subprocess.run(
        [sys.executable, ".ci/release.py", tag], cwd=tree, capture_output=True, text=True, check=False
    )


def test_a_release_is_of_one_version(tree):
    done = release(tree, "v9.8.7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("### Added")
    assert "## 9.8.7" not in done.stdout


@pytest.mark.parametrize("name", NAMED)
def test_a_version_that_was_forgotten_is_named(tree, name):
    text = (tree / name).read_text()
    assert "9.8.7" in text
    (tree / name).write_text(text.replace("9.8.7", "9.8.6"))
    done = release(tree, "v9.8.7")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name} must have")


def test_a_citation_names_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["version"] == fftriton.__version__
    assert found["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    for paper in found["references"]:
        assert {"type", "title", "authors"} <= paper.keys()
        number = paper["url"].removeprefix("https://arxiv.org/abs/")
        assert number in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("form", [form for form in FORMS if form.stem != "config"], ids=lambda form: form.stem)
def test_forms_of_issues(form):
    found = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= found.keys()
    ids = [part["id"] for part in found["body"]]
    assert len(set(ids)) == len(ids)
    commands = typer.main.get_command(app).commands
    for name, option in re.findall(r"`fftriton (\w+) (--\w+)`", form.read_text()):
        assert any(option in parameter.opts for parameter in commands[name].params)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_workflows_run_what_is_there(workflow):
    makefile = (ROOT / "Makefile").read_text()
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        for target in re.findall(r"\bmake ([\w-]+)", command):
            stem = re.sub(r"(?<=test-)(transformers|triton|compiled)-.*", r"\1-%", target)
            assert re.search(rf"^(?:[\w-]+ )*{re.escape(stem)}:", makefile, re.MULTILINE), target
        for file in re.findall(r"\bpython (\S+\.py)", command):
            assert (ROOT / file).is_file()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda dockerfile: dockerfile.suffix[1:])
def test_dockerfiles_use_what_is_there(dockerfile, setup):
    text = dockerfile.read_text()
    hidden = (ROOT / ".dockerignore").read_text().split()
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists()
        assert source not in hidden
    assert not {"fftriton", "kernels", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md"} & set(hidden)
    for extra in re.findall(r"\.whl\)\[(\w+)\]", text):
        assert extra in setup("")["extras_require"]
    assert f"--file docker/{dockerfile.name} " in text


def test_pages_for_those_who_join_are_linked():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("CODE_OF_CONDUCT.md", "SECURITY.md"):
        assert f"]({name})" in text
        assert (ROOT / name).is_file()
