"""Configuration files: every mistake names the file, the key, the value and the remedy, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from blockroll.errors import ConfigError, InvalidInput
from blockroll.settings import Config, load_yaml, whole_text


class Optimizer(Config):
    learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)

    @field_validator("learning_rate")
    @classmethod
    def _small(cls, value: float) -> float:
        if value > 1:
            raise ValueError("a learning rate above 1 diverges")
        return value


class Run(Config):
    steps: int = Field(gt=0)
    name: str = "run"
    sampler: Literal["ar", "lossless"] = "ar"
    optimizer: Optimizer = Optimizer()
    stages: list[Optimizer] | None = None

    @model_validator(mode="after")
    def _whole_blocks(self) -> Run:
        if self.steps == 7:
            raise InvalidInput("steps", "7 is not even", "use 8")
        return self


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


class Disk(Config):
    kind: Literal["disk"]
    paths: tuple[str, ...]


class Hub(Config):
    kind: Literal["hub"]
    path: str
    split: Literal["disk", "all"] = "all"


class Sources(Config):
    sources: tuple[Annotated[Disk | Hub, Field(discriminator="kind")], ...]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{kind: disk, path: a}", "sources[0].path: unknown key in FILE; did you mean `paths`? (and 1 more)"),
        ("{kind: hub, pathz: a}", "sources[0].pathz: unknown key in FILE; did you mean `path`? (and 1 more)"),
        ("{kind: hub}", "sources[0].path: missing in FILE; add it"),
        ("{kind: disk, paths: a}", 'sources[0].paths: "a" in FILE cannot be used; it should be a valid array'),
    ],
)
def test_a_section_of_several_kinds_is_told_by_its_own_keys(file: Path, source: str, expected: str) -> None:
    file.write_text(f"sources: [{source}]\n")
    with pytest.raises(ConfigError) as error:
        load_yaml(file, Sources)
    assert str(error.value).replace(str(file), "FILE") == expected


def test_reads_nested_sections_and_is_frozen(file: Path) -> None:
    file.write_text("steps: 3\noptimizer: {learning_rate: 1e-4, betas: [0.5, 1]}\nname: on\n")
    run = load_yaml(file, Run)
    assert (run.steps, run.name, run.optimizer.learning_rate, run.optimizer.betas) == (3, "on", 1e-4, (0.5, 1.0))
    with pytest.raises(ValidationError):
        run.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: three", 'steps: "three" in FILE cannot be used; it should be a valid integer'),
        ("steps: '3'", 'steps: "3" in FILE cannot be used; it should be a valid integer'),
        ("steps: true", "steps: true in FILE cannot be used; it should be a valid integer"),
        ("steps: 010", 'steps: "010" in FILE cannot be used; it should be a valid integer'),
        ("steps: 0", "steps: 0 in FILE cannot be used; it should be greater than 0"),
        ("name: x", "steps: missing in FILE; add it"),
        ("", "steps: missing in FILE; add it"),
        ("stepz: 3", "stepz: unknown key in FILE; did you mean `steps`? (and 1 more)"),
        ("steps: 1\nzzz: 3", "zzz: unknown key in FILE; known keys here: name, optimizer, sampler, stages, steps"),
        ("steps: 1\noptimizer: {lerning_rate: 1.0}",
         "optimizer.lerning_rate: unknown key in FILE; did you mean `learning_rate`?"),
        ("steps: 1\nstages:\n- betas: []\n- beta: []",
         "stages[1].beta: unknown key in FILE; did you mean `betas`?"),
        ("steps: 1\noptimizer: 3",
         "optimizer: 3 in FILE cannot be used; it should be a section of keys and values"),
        ("steps: 1\noptimizer: {learning_rate: 3}",
         "optimizer.learning_rate: 3 in FILE cannot be used; a learning rate above 1 diverges"),
        ("steps: 1\nsampler: best", "sampler: \"best\" in FILE cannot be used; it should be 'ar' or 'lossless'"),
        ("steps: 7", "steps: 7 is not even in FILE; use 8"),
        ("steps: 1\nsteps: 2", "FILE line 2: key `steps` is given twice; correct the YAML there"),
        ("steps: 1\n? [a]\n: b", "FILE line 2: a key must be a word; correct the YAML there"),
        ("- 1", "FILE: holds a list, not keys and values; write `key: value` lines"),
    ],
)
def test_mistakes(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(file, Run)
    assert str(caught.value) == expected.replace("FILE", str(file))


@pytest.mark.parametrize("data", [b"a: [", b"\tx: 1", b"\xff\xfe\xfd", b"a: &b [*b]", b"a: !!python/none 1"])
def test_what_is_not_plain_yaml_is_one_line(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_yaml(file, Run)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read \\(No such file or directory\\); check the path of the YAML file"):
        load_yaml(tmp_path / "none.yaml", Run)


def test_a_file_may_stand_for_a_section_or_be_merged_into_one(file: Path) -> None:
    (file.parent / "parts").mkdir()
    (file.parent / "parts" / "slow.yaml").write_text("<<: !include betas.yaml\nlearning_rate: 1e-5  # small\n")
    (file.parent / "parts" / "betas.yaml").write_text("betas: [0.5]\n")
    file.write_text("steps: 1\nstages:\n- !include parts/slow.yaml\n- {<<: !include parts/slow.yaml, learning_rate: 0.5}\n")
    stages = load_yaml(file, Run).stages
    assert stages == [Optimizer(learning_rate=1e-5, betas=(0.5,)), Optimizer(learning_rate=0.5, betas=(0.5,))]
    whole = file.with_name("whole.yaml")
    whole.write_text(whole_text(file))
    (file.parent / "parts" / "slow.yaml").unlink()
    assert load_yaml(whole, Run).stages == stages
    whole.write_text("steps: 1  # as it stands\n")
    assert whole_text(whole) == "steps: 1  # as it stands\n"


@pytest.mark.parametrize(("text", "included", "expected"), [
    ("!include none.yaml", "", "FILE line 2: DIR/none.yaml cannot be included (No such file or directory)"),
    ("!include [part.yaml]", "", "FILE line 2: !include takes the name of a file"),
    ("!include part.yaml", "betas: [1", "DIR/part.yaml line 1: "),
    ("!include part.yaml", "betas: []\nbetas: []", "DIR/part.yaml line 2: key `betas` is given twice"),
    ("!include part.yaml", "<<: !include part.yaml", "DIR/part.yaml line 1: DIR/part.yaml includes itself"),
    ("!include part.yaml", "<<: !include run.yaml", "DIR/part.yaml line 1: FILE includes itself"),
    ("!include part.yaml", "beta: []", "stages[0].beta: unknown key in FILE"),
])  # fmt: skip
def test_mistakes_of_what_is_included(file: Path, text: str, included: str, expected: str) -> None:
    file.write_text(f"steps: 1\nstages: [{text}]\n")
    (file.parent / "part.yaml").write_text(included)
    with pytest.raises(ConfigError) as caught:
        load_yaml(file, Run)
    assert str(caught.value).startswith(expected.replace("FILE", str(file)).replace("DIR", str(file.parent)))
    assert "\n" not in str(caught.value)
