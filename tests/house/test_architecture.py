"""Every path and every name that ARCHITECTURE.md refers to exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
PICTURE = "\n".join(re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL))
REFERENCES = sorted({span for span in SPANS if re.match(r"[\w./-]+\.py: ", span)})
PATHS = sorted({span.split(": ")[0] for span in SPANS if re.fullmatch(r"[\w./-]+(/|\.py)", span.split(": ")[0])})
FLOORS = sorted(set(re.findall(r"^\| (\w+(?:/|\.py))", PICTURE, re.MULTILINE)))
QUESTIONS = {  # What the answer to each question has to refer to, at least.
    "Where is a sampler added?": {"rollout/sampling/sampler.py: _draft_group", "rollout/params.py: SAMPLERS"},
    "Where does a message get its limit?": {"trainer_bridge/wire/limits.py: MAX_REQUEST"},
    "What happens to a draft when a sample is preempted?": {"rollout/sequence.py: Sample.own_drafts"},
    "Who decides that a weight version serves?": {
        "trainer_bridge/gateway/weight_receiver.py: WeightReceiver.settle"},
    "Where would a second model family go?": {"model/policy.py: Policy", "model/checkpoint.py: load_policy"},
}  # fmt: skip


def _defined(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The statement of a module's or a class's body that defines `name`: a class, a function or an assignment."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = {node.name}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        else:
            continue
        if name in names:
            return node
    return None


def _exists(reference: str) -> bool:
    path, name = reference.split(": ")
    body = ast.parse((ROOT / path).read_text()).body
    for part in name.split("."):
        node = _defined(body, part)
        if node is None:
            return False
        body = node.body if isinstance(node, ast.ClassDef) else []
    return True


def test_something_is_checked() -> None:
    assert len(PATHS) > 50 and len(REFERENCES) > 50


def test_the_picture_shows_every_floor() -> None:
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} - {"tests/", "examples/"}
    modules = {path.name for path in ROOT.glob("*.py")} - {"__init__.py"}
    assert set(FLOORS) == folders | modules


@pytest.mark.parametrize("path", PATHS)
def test_path_exists(path: str) -> None:
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


@pytest.mark.parametrize("reference", REFERENCES)
def test_name_is_defined(reference: str) -> None:
    assert _exists(reference)


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_is_answered(question: str) -> None:
    answer = TEXT.split(f"**{question}**")[1].split("\n\n")[0].replace("\n", " ")
    assert {reference for reference in QUESTIONS[question] if f"`{reference}`" in answer} == QUESTIONS[question]


def test_what_is_missing_is_found() -> None:
    assert _exists("rollout/engine.py: Engine.step")
    assert not _exists("rollout/engine.py: Engine.stop")
    assert not _exists("rollout/engine.py: step")
