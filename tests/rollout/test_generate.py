"""`Engine.generate`: prompts of every kind in, one output per prompt out; and the most probable tokens beside each."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ZayaForCausalLM

import blockroll
from blockroll.errors import RequestError
from blockroll.model.tasks import answer, question
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
TEXT = question("47+85-12")


@pytest.fixture(scope="module")
def policy():
    return blockroll.load_policy("tiny-reasoner")


@pytest.fixture
def engine(policy):
    return Engine(policy, max_batch=8)


def test_prompts_of_every_kind_are_the_same_prompt(policy, engine):
    tokens = encode_prompt(policy.tokenizer, TEXT)
    params = SamplingParams("coupled", max_tokens=40, seed=5, n=2)
    prompts = [TEXT, tokens, tuple(tokens), np.array(tokens), {"prompt": TEXT}, {"prompt_token_ids": tokens},
               RolloutRequest("mine", tokens, params)]  # fmt: skip
    outputs = engine.generate(prompts, params)
    assert len(outputs) == len(prompts)
    assert len({tuple(sample.tokens) for output in outputs for sample in output.samples}) == 2
    assert [output.prompt for output in outputs] == [TEXT, None, None, None, TEXT, None, None]
    assert outputs[-1].request_id == "mine"
    for output in outputs:
        assert list(output.prompt_tokens) == output.prompt_token_ids == tokens
        assert output.outputs is output.samples
        for j, sample in enumerate(output.samples):
            assert sample.index == j
            assert sample.token_ids == sample.tokens
            assert sample.text == policy.tokenizer.decode(sample.tokens, skip_special_tokens=True)
            assert len(sample.logprobs) == len(sample.tokens)
            assert sample.cumulative_logprob == pytest.approx(sample.logprobs.sum(), abs=1e-5)
            assert sample.finish_reason == "stop"
            assert sample.tokens_per_forward > 1
    for single in (TEXT, tokens, RolloutRequest("mine", tokens, params)):
        (output,) = engine.generate(single, None if isinstance(single, RolloutRequest) else params)
        assert [s.tokens for s in output.samples] == [s.tokens for s in outputs[0].samples]


def test_one_set_of_parameters_per_prompt_and_the_order_of_prompts(engine):
    prompts = [question(f"{a}+{b}") for a, b in ((1, 2), (30, 40), (5, 600))]
    each = [SamplingParams("coupled", temperature=0.0, max_tokens=3 + i, n=1 + i) for i in range(3)]
    outputs = engine.generate(prompts, each)
    assert [o.prompt for o in outputs] == prompts
    assert [[len(s.tokens) for s in o.samples] for o in outputs] == [[3], [4, 4], [5, 5, 5]]
    with pytest.raises(RequestError, match="^params: 2 for 3 prompts; give one, or one per prompt"):
        engine.generate(prompts, each[:2])


def test_calls_draw_other_numbers_and_a_new_engine_the_same(policy):
    params = SamplingParams(temperature=3.0, max_tokens=12, ignore_eos=True)

    def calls():
        engine = Engine(policy)
        return [tuple(s.tokens) for _ in range(2) for o in engine.generate([TEXT, TEXT], params) for s in o.samples]

    first = calls()
    assert len(set(first)) == 4
    assert calls() == first


def test_chats_go_through_the_tokenizer_s_template(policy, engine):
    chat = [{"role": "user", "content": "47+85-12"}]
    with pytest.raises(RequestError, match=r"^prompts\[0\]: holds chat messages, and .* no chat template; give text"):
        engine.generate([chat])
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ bos_token }}Q:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}S:{% endif %}"
    )
    try:
        params = SamplingParams(temperature=0.0)
        one, many, text = engine.generate(chat, params), engine.generate([chat, chat], params), engine.generate(TEXT, params)
        assert list(one[0].prompt_tokens) == encode_prompt(policy.tokenizer, TEXT)
        assert {o.samples[0].text for o in (*one, *many, *text)} == {text[0].samples[0].text}
        with pytest.raises(RequestError, match=r"^prompts\[1\]: the chat template refuses the messages \(no system\)"):
            engine.generate([chat, [{"role": "system", "content": "x"}]])
    finally:
        policy.tokenizer.chat_template = None


def test_one_refused_prompt_refuses_the_call(engine):
    for bad, text in (("", "is empty; give some text"), ([], "is empty; give at least one"),
                      ([1, "a"], "'a' at place 1 is no token id"),
                      (3.5, "is a float; give text"), ({"text": "a"}, "has the keys text; give one of prompt")):  # fmt: skip
        with pytest.raises(RequestError, match=r"^prompts\[1\]: " + text):
            engine.generate([TEXT, bad])
        assert not engine.has_work
    with pytest.raises(RequestError, match="^prompt_tokens: .* holds token 100000"):
        engine.generate([TEXT, [100000]])
    assert not engine.has_work
    with pytest.raises(RequestError, match="^params: given beside RolloutRequests"):
        engine.generate([RolloutRequest("a", (1,))], SamplingParams())
    assert engine.generate([]) == []


def test_an_engine_of_a_name_and_options(policy):
    engine = Engine("tiny-reasoner", max_batch=2, schedule="ar", device="cpu")
    assert (engine.config.max_batch, engine.schedule.kind, engine.policy.dtype) == (2, "ar", torch.float32)
    assert Engine("tiny-reasoner", dtype="float64", device="cpu").policy.dtype == torch.float64
    ar = EngineConfig(Schedule("ar"), max_batch=3)
    assert Engine(policy, ar, max_batch=4).config == EngineConfig(Schedule("ar"), max_batch=4)
    for options, text in (
        (dict(batch=3), "batch: the engine has no such option; use one of device, dtype, schedule"),
        (dict(device="cpu"), "device: given with a policy that is loaded already"),
        (dict(max_batch=0), "max_batch: 0 is no whole number"),
        (dict(schedule="fast"), "schedule: unknown schedule 'fast'"),
    ):
        with pytest.raises(RequestError, match=f"^{text}"):
            Engine(policy, **options)


def test_a_trajectory_prints_in_one_short_line(engine):
    (output,) = engine.generate(TEXT, SamplingParams(temperature=0.0))
    line = repr(output.samples[0].trajectory)
    assert line.startswith("Trajectory('generate-0-0', sample=0, tokens=[27, 24, ")
    assert line.endswith("finish_reason='stop', tokens_per_forward=7.80)")
    assert len(line) < 160


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_top_logprobs_are_those_of_transformers(make_policy, temperature):
    """At generated tokens and at the prompt's; penalties leave them alone."""
    policy = make_policy(torch.float32, sharpness=0.6)
    model = ZayaForCausalLM(policy.config).eval()
    model.load_state_dict(policy.state_dict(), strict=False)
    params = SamplingParams("coupled", temperature, max_tokens=12, logprobs=3, prompt_logprobs=2, n=2, seed=2,
                            frequency_penalty=1.0)  # fmt: skip
    others = SamplingParams("lossless", max_tokens=5)
    prompt = [5, 9, 11, 30, 9]
    for schedule in ("ar", "two_pass", "fused"):
        output, other = Engine(policy, schedule=schedule, block_size=6).generate([prompt, [4, 4]], [params, others])
        assert other.samples[0].top_logprobs is None
        assert other.prompt_logprobs is None
        for sample in output.samples:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + sample.tokens])).logits[0]
            logp = (logits / (temperature or 1.0)).log_softmax(-1)
            top = logp.topk(3)
            record = sample.trajectory
            assert record.top_tokens.dtype == np.int32
            assert record.top_logprobs.dtype == np.float32
            generated = slice(len(prompt) - 1, -1)
            assert np.array_equal(record.top_tokens, top.indices[generated].numpy())
            np.testing.assert_allclose(record.top_logprobs, top.values[generated].numpy(), atol=3e-5)
            assert np.array_equal(record.prompt_top_tokens, top.indices[: len(prompt) - 1, :2].numpy())
            np.testing.assert_allclose(record.prompt_top_logprobs, top.values[: len(prompt) - 1, :2].numpy(), atol=3e-5)
            expected = logp[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            np.testing.assert_allclose(output.prompt_logprobs, expected.numpy(), atol=3e-5)
            for token, logprob, found in zip(sample.tokens, sample.logprobs, sample.top_logprobs, strict=True):
                assert found[token] == logprob
                assert 3 <= len(found) <= 4
            assert [next(iter(found)) for found in output.prompt_top_logprobs] == top.indices[: len(prompt) - 1, 0].tolist()


def test_chosen_tokens_are_recorded_beside_the_generated_ones(make_policy):
    """With a neighbour in the batch that records the most probable ones, and one that records nothing."""
    policy = make_policy(torch.float32, sharpness=0.6)
    listed = (7, 3, 30)
    params = [SamplingParams("coupled", 0.7, max_tokens=9, logprob_token_ids=listed, seed=2, ignore_eos=True),
              SamplingParams("coupled", 0.7, max_tokens=9, logprobs=5, seed=3, ignore_eos=True),
              SamplingParams("coupled", 0.7, max_tokens=9, seed=4, ignore_eos=True)]  # fmt: skip
    outputs = Engine(policy, block_size=6).generate([[5, 9, 11]] * 3, params)
    records = [output.samples[0].trajectory for output in outputs]
    assert records[0].top_tokens.tolist() == [list(listed)] * 9
    assert (records[1].top_tokens.shape, records[2].top_tokens) == ((9, 5), None)
    every = SamplingParams("coupled", 0.7, max_tokens=9, logprobs=policy.config.vocab_size, seed=2, ignore_eos=True)
    (whole,) = Engine(policy, block_size=6).generate([5, 9, 11], every)
    for tokens, logprobs, row in zip(whole.samples[0].trajectory.top_tokens, whole.samples[0].trajectory.top_logprobs,
                                     records[0].top_logprobs, strict=True):  # fmt: skip
        known = dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        np.testing.assert_array_equal(row, np.array([known[token] for token in listed], np.float32))
    for wrong, said in (((policy.config.vocab_size,), "names token"), (tuple(range(64)) * 16, "names 1024 tokens")):
        with pytest.raises(RequestError, match=f"^logprob_token_ids: .*{said}"):
            Engine(policy).generate([5, 9], SamplingParams(logprob_token_ids=wrong))
    with pytest.raises(RequestError, match="^logprob_token_ids: given beside logprobs=2"):
        SamplingParams(logprob_token_ids=(1,), logprobs=2)


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_s_examples_answer_their_question(capsys):
    """All but vLLM's own, and those that need a service, run as they stand."""
    ours = [block for block in python_blocks() if "from vllm" not in block and "connect(" not in block]
    assert len(ours) >= 2
    exec(ours[0], {})
    printed = capsys.readouterr().out
    assert answer(printed.splitlines()[-1]) == "120" or "A:120" in printed
    for block in ours[1:]:
        exec(block, {})
        assert "120" in capsys.readouterr().out


def test_the_readme_s_vllm_example_differs_in_names_alone():
    """Line by line, ours is vLLM's with other names."""
    vllm, ours = next((a, b) for a, b in zip(python_blocks(), python_blocks()[1:]) if "from vllm" in a)
    names = {"vllm": "blockroll", "LLM": "Engine", "llm": "engine"}
    renamed = re.sub("|".join(rf"\b{name}\b" for name in names), lambda match: names[match[0]], vllm)
    assert renamed.splitlines() == ours.splitlines()
    assert len(ours.splitlines()) >= 8


def test_questions_and_answers():
    assert question(" 47 + 85 - 12 = ? ") == TEXT == "Q:47+85-12\nS:"
    assert question("gcd 12 18") == "Q:gcd 12 18\nS:"
    assert question("310 base 7 to 8") == "Q:310 base 7 to 8\nS:"
    assert answer("85+47:12,13=132;132-12:0,2,1=120\nA:120") == "120"
    assert answer("85+47:12") is None
    assert "progress" in inspect.signature(Engine.generate).parameters
