"""Configurations and JSON lines that hypothesis makes: whatever they hold, the outcome is what was asked for or one line."""

from __future__ import annotations

import json
import os
import string
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockroll.errors import BlockrollError, ConfigError, DataError
from blockroll.inputs import json_object
from blockroll.model.checkpoint import load_policy
from blockroll.model.conversion.config import ConversionConfig
from blockroll.rollout.conversion.ablation import AblationConfig, cells_of
from blockroll.rollout.input_lines import Line
from blockroll.rollout.offline import _request, _scored
from blockroll.rollout.types import SamplingParams
from blockroll.settings import parse
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig
from blockroll.yaml_reader import read_yaml

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("BLOCKROLL_EXAMPLES", "4000"))
EXAMPLES = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))

SPECIAL = st.sampled_from([0, 1, 2**31, 2**63, 1e308, 1e-320])
NUMBERS = st.one_of(st.integers(), st.integers(-(10**25), 10**25), st.floats(), SPECIAL)
WORDS = st.sampled_from(["", "/", "..", "a/b", "\0", "\ud800", "x" * 5000, "ar", "diffusion", "tasks"])
TEXTS = st.one_of(st.text(max_size=20), WORDS)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def names_of(config: type) -> list[str]:
    """Names of fields, those of sections included."""
    found = set(config.model_fields)  # type: ignore[attr-defined]
    for name in json.dumps(config.model_json_schema()).split('"'):  # type: ignore[attr-defined]
        if name.isidentifier():
            found.add(name)
    return sorted(found)


def values(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=5)),
                        max_leaves=20)  # fmt: skip


GOOD: dict[type, dict[str, Any]] = {
    GrpoConfig: {"output": "out"},
    ConversionConfig: {"output": "out", "stages": [{"name": "s", "kind": "ar", "tokens": 10}]},
    AblationConfig: {"output": "out", "parent": "p", "stage": {"name": "s", "kind": "ar", "tokens": 10}, "variants": {"a": {}}},
}


def one_line(error: BlockrollError) -> None:
    assert str(error) and "\n" not in " ".join(str(error).split())


@pytest.mark.parametrize("config", GOOD, ids=lambda config: config.__name__)
def test_configurations_are_taken_or_refused(config: type) -> None:
    keys = st.one_of(st.sampled_from(names_of(config)), st.text(string.ascii_letters + "_", max_size=8))

    @EXAMPLES
    @given(st.dictionaries(keys, values(keys), max_size=6), st.booleans())
    def check(data: dict[str, Any], completed: bool) -> None:
        try:
            text = yaml.safe_dump(GOOD[config] | data if completed else data, allow_unicode=True)
            made = parse(read_yaml(text.encode(errors="surrogatepass"), "run.yaml"), config, "run.yaml")  # type: ignore[type-var]
            if isinstance(made, AblationConfig):
                list(cells_of(made, "run.yaml"))
        except ConfigError as error:
            one_line(error)
        except UnicodeEncodeError:
            pass

    check()


@EXAMPLES
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")),
                 st.text("[]{}:,&*!-?|>'\"%@` \n\tab01<~.", max_size=80).map(str.encode)))
def test_bytes_are_yaml_or_refused(data: bytes) -> None:
    try:
        parse(read_yaml(data, "run.yaml"), GrpoConfig, "run.yaml")
    except ConfigError as error:
        one_line(error)


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy("tiny-reasoner")


FIELDS = st.sampled_from(["id", "prompt", "prompt_tokens", "seed", "tokens", "sample", "x"])
TOKENS = st.lists(st.one_of(st.integers(-1, 300), SCALARS), max_size=8)
RECORDS = st.dictionaries(FIELDS, st.one_of(SCALARS, TOKENS, values(FIELDS)), max_size=6)


def test_lines_are_taken_or_refused(policy: Any) -> None:
    params = SamplingParams()

    @EXAMPLES
    @given(st.one_of(st.binary(max_size=100), RECORDS.map(lambda record: json.dumps(record).encode()),
                     RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass"))))
    def check(raw: bytes) -> None:
        try:
            line = Line("in.jsonl line 1", json_object(raw, "in.jsonl line 1"))
            json.dumps(line.record, allow_nan=True, ensure_ascii=False).encode()
        except DataError as error:
            one_line(error)
            return
        for use in (lambda: _request(line, policy, params, 1, 0), lambda: _scored(line, policy)):
            try:
                made = use()
            except DataError as error:
                one_line(error)
                continue
            json.dumps(made[0] if isinstance(made, tuple) else made.id, allow_nan=False)

    check()
