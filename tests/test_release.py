"""What a release has besides the code: one version, workflows, fragments, the rule of changes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import metafocus as mf

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.*)"'),
        ("CITATION.cff", r"^version: (.*)"),
        ("conda/recipe.yaml", r'^  version: "(.*)"'),
        ("CHANGELOG.md", r"^## (\S+)"),
    ],
)
def test_every_file_names_the_same_version(file, pattern):
    assert re.findall(pattern, (ROOT / file).read_text(), re.M)[0] == mf.__version__


def test_the_recipe_needs_what_the_package_needs():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    wanted = {"python": project["requires-python"]}
    for word in project["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(.*)", word).groups()
        wanted[names.get(name, name)] = version
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    found = [f"{word} ".split(" ")[:2] for word in recipe["requirements"]["run"]]
    assert dict(found) == wanted


def test_the_matrix_of_the_workflow():
    text = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    matrix = text["jobs"]["quick"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert matrix["torch"] == ["2.11", "2.13", "2.14"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_do_no_more_than_they_say(path):
    """Nothing may write to the repository, and no step takes a password."""
    text = path.read_text()
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "secrets." not in text


def test_files_and_scripts_that_workflows_name_exist():
    for path in WORKFLOWS:
        for name in re.findall(r"(?:python |-r )((?:docs|tests)/[\w/]+\.py)", path.read_text()):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize(("tag", "code"), [(f"v{mf.__version__}", 0), ("v9.9", 1)])
def test_a_release_begins_with_the_check_that_its_tag_is_the_version(tag, code):
    """pyproject.toml has a second `version`, that of towncrier."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    (line,) = (
        s["run"] for s in jobs["build"]["steps"] if s.get("name") == "the tag is the version"
    )
    env = {**os.environ, "GITHUB_REF_NAME": tag}
    assert subprocess.run(["bash", "-c", line], cwd=ROOT, env=env).returncode == code


def test_fragments_have_the_names_that_towncrier_reads():
    kinds = "added|changed|deprecated|removed|fixed"
    for path in (ROOT / "changelog.d").iterdir():
        good = re.fullmatch(rf"(\d+|\+[\w-]+)\.({kinds})(\.\d+)?\.md", path.name)
        assert good or path.name == "README.md", path.name


def test_without_a_tag_there_is_nothing_to_compare(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("api_changes", ROOT / "docs" / "api_changes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "last_tag", lambda: None)
    assert module.main() == 0
    assert "nothing to compare with" in capsys.readouterr().out


def test_issues_ask_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {field["id"]: field for field in form["body"]}
    assert "metafocus doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]
