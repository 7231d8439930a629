"""From a user's messages to tokens, and where an answer ends: chat templates in the style of the public families."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from reading import asked as said
from reading import encode, response_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from pyrite import cli
from pyrite.data import text
from pyrite.models.policy import Policy, RewardEnsemble
from tests.conftest import tiny_config

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPLIT = (  # reasoning of its own field, or from the text
    "{% set r = m.reasoning_content if m.reasoning_content is string else '' %}{% set c = m.content %}"
    "{% if not r and '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    + SPLIT
    + "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}"
    "{% else %}{{ c }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
QWEN35 = QWEN3.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}",
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}",
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    + SPLIT
    + "{{ '<think>' + r.strip() + '</think>\n' + c.strip() }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINK = ("<think>", "</think>")
IM = ("<|im_start|>", "<|im_end|>")
FAMILIES: dict[str, dict] = {  # template, its tags, the end-of-sequence token, further ends; the end that it writes
    "gemma": {"template": GEMMA, "tags": ("<start_of_turn>", "<end_of_turn>"), "eos": "<eos>", "end": "<end_of_turn>"},
    "phi3": {
        "template": PHI3, "tags": ("<|user|>", "<|assistant|>", "<|end|>"), "eos": "<|endoftext|>", "end": "<|end|>",
    },
    "llama3": {
        "template": LLAMA3, "tags": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "eos": "<|end_of_text|>", "ends": ("<|eom_id|>", "<|eot_id|>"), "end": "<|eot_id|>",
    },
    "qwen25": {"template": CHATML, "tags": IM, "eos": "<|im_end|>", "ends": ("<|endoftext|>",), "end": "<|im_end|>"},
    "qwen3": {"template": QWEN3, "tags": (*IM, *THINK), "eos": "<|im_end|>", "end": "<|im_end|>"},
    "qwen35": {"template": QWEN35, "tags": (*IM, *THINK), "eos": "<|endoftext|>", "end": "<|im_end|>"},
    "r1": {"template": R1, "tags": ("<|User|>", "<|Assistant|>", *THINK), "eos": "<|eos|>", "end": "<|eos|>"},
    "glm": {
        "template": GLM, "tags": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", *THINK),
        "eos": "<|endoftext|>", "ends": ("<|user|>", "<|observation|>"), "end": "<|user|>",
    },
    "harmony": {
        "template": HARMONY,
        "tags": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        "eos": "<|return|>", "ends": ("<|call|>",), "end": "<|return|>",
    },
    "mistral": {"template": MISTRAL, "tags": ("[INST]", "[/INST]"), "eos": "</s>", "end": "</s>"},
    "plain": {"template": None, "tags": (), "eos": "</s>", "end": "</s>"},
}  # fmt: skip


def build(
    folder: Path, template: str | None, *tags: str, eos: str = "</s>", ends: tuple[str, ...] = (), seed: int = 0
) -> Path:
    """A tiny random policy in `folder` that spells letter by letter, with a template and the tags it writes.

    Think tags are added tokens and not special, as the families have them; `ends` are in the generation config.
    """
    names = list(dict.fromkeys(["<pad>", "<s>", eos, "<unk>", *tags, *ends]))
    tokens = [*names, *LETTERS]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )
    tokenizer.add_tokens([tag for tag in names if tag in THINK])
    tokenizer.add_tokens([tag for tag in names if tag not in THINK], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ids = [tokens.index(name) for name in dict.fromkeys((eos, *ends))]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(vocab_size=len(tokens), max_position_embeddings=128, eos_token_id=ids)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def family(folder: Path, name: str) -> Path:
    """The tiny policy of a family."""
    about = FAMILIES[name]
    return build(folder / name, about["template"], *about["tags"], eos=about["eos"], ends=about.get("ends", ()))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pyrite(*options: object) -> None:
    """The command line, in this process."""
    before, sys.argv = sys.argv, ["pyrite", *map(str, options)]
    try:
        cli.main()
    finally:
        sys.argv = before


def refused(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """What the command line says to a command it does not run."""
    with pytest.raises(SystemExit) as caught:
        pyrite(*options)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


SHORT = ("--batch-size", 2, "--epochs", 1, "--lr", 1e-3)
SYSTEM = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize("job", ["sft", "dpo", "reward"])
def test_a_row_that_the_template_refuses_is_named_by_its_line_after_the_random_split(tmp_path, capsys, job):
    model = build(tmp_path / "model", MISTRAL)
    rows = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    rows[6]["prompt"] = SYSTEM
    if job == "sft":
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    data = write(tmp_path / "data.jsonl", [*rows[:3], *rows[3:]])
    data.write_text("\n" + data.read_text())  # lines are counted as an editor counts them
    for seed in (0, 1, 2):
        said = refused(capsys, job, "--model", model, "--data", data, "--out", tmp_path / f"{seed}", "--seed", seed,
                       "--held-out", 0.3, *SHORT)  # fmt: skip
        assert f"{data}, line 8: " in said
        assert "must alternate" in said


def test_a_row_of_a_held_out_file_is_named_by_that_file(tmp_path, capsys):
    model = build(tmp_path / "model", MISTRAL)
    good = write(tmp_path / "good.jsonl", [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(4)])
    bad = write(
        tmp_path / "bad.jsonl",
        [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": SYSTEM, "chosen": "a", "rejected": "b"}],
    )
    for job in ("dpo", "reward"):
        said = refused(
            capsys, job, "--model", model, "--data", good, "--held-out", bad, "--out", tmp_path / job, *SHORT
        )
        assert f"{bad}, line 2: " in said


@pytest.mark.parametrize("job", ["generate", "online", "ppo", "evaluate"])
def test_a_prompt_that_the_template_refuses_is_named_by_its_line(tmp_path, capsys, job):
    model = build(tmp_path / "model", MISTRAL)
    rows = [{"prompt": f"ask {i}"} for i in range(8)]
    rows[5] = {"prompt": SYSTEM}
    prompts = write(tmp_path / "prompts.jsonl", rows)
    more = {"online": ("--judge", "bradley_terry(gold='length()')"), "ppo": ("--reward", "length()")}.get(job, ())
    said = refused(capsys, job, "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *more,
                   "--max-new-tokens", 4)  # fmt: skip
    assert f"{prompts}, line 6" in said


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}</s>{% endfor %}"


@pytest.mark.parametrize(("template", "role"), [(NO_SYSTEM, "system"), (PARTS, "user")])
def test_a_template_that_leaves_a_turn_of_the_prompt_out_is_refused(tmp_path, capsys, template, role):
    """The model would be asked something else, or nothing at all."""
    model = build(tmp_path / "model", MISTRAL)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").write_text(template)
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = [{"role": "system", "content": "be red"}, {"role": "user", "content": "hi"}]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": turns[0 if role == "system" else 1 :]}])
    said = refused(capsys, "generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "out",
                   "--max-new-tokens", 4)  # fmt: skip
    assert f"{prompts}, line 1" in said and f"leaves out what the {role} says" in said


LEARN = (
    "--epochs",
    80,
    "--batch-size",
    4,
    "--lr",
    2e-2,
    "--lr-scheduler-type",
    "cosine(warmup_steps=0)",
    "--held-out",
    0,
)
ASK = [{"role": "user", "content": "hi"}]


def taught(tmp_path: Path, model: Path, rows: list[dict], *more: object) -> Path:
    """The model after `pyrite sft` on some rows, by heart."""
    demos = write(tmp_path / "demos.jsonl", rows * 4)
    pyrite("sft", "--model", model, "--data", demos, "--out", tmp_path / "sft", *LEARN, *more)
    return tmp_path / "sft" / "model"


def drawn(tmp_path: Path, model: Path, *more: object, prompt: object = "hi") -> list[dict]:
    """What `pyrite generate` draws greedily."""
    prompts = write(tmp_path / "asked.jsonl", [{"prompt": prompt}])
    pyrite("generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "drawn", "--k", 1,
           "--temperature", 0, "--max-new-tokens", 50, *more)  # fmt: skip
    return pq.read_table(tmp_path / "drawn" / "candidates.parquet").to_pylist()


def stock(model: Path, **told: object) -> list[int]:
    """What transformers draws from a folder, by the template and the folder's own files alone."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False, **told)
    else:
        ids = [tokenizer.bos_token_id, *tokenizer("hi", add_special_tokens=False)["input_ids"]]
    every = policy.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False, eos_token_id=[999])
    return every[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_learned_as_the_template_shows_it_and_drawn_to_its_end(tmp_path, name):
    model, end = family(tmp_path, name), FAMILIES[name]["end"]
    answer = "so\n</think>\n\nyes" if name == "r1" else "yes"
    learned = taught(tmp_path, model, [{"prompt": "hi", "response": answer}])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = stock(learned)
    if name == "r1":
        whole = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False) + answer + end
    elif name == "plain":
        whole = "<s>hi" + answer + end
    else:
        whole = tokenizer.apply_chat_template([*ASK, {"role": "assistant", "content": answer}], tokenize=False)
    asked = (
        "<s>hi" if name == "plain" else tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    )
    want = whole[len(asked) :]
    want = want[: want.rindex(end) + len(end)] if end in want else want + end
    assert tokenizer.decode(tokens[: tokens.index(tokenizer.convert_tokens_to_ids(end)) + 1]) == want

    (row,) = drawn(tmp_path, learned)
    assert row["finished"]
    assert row["response"] == answer
    read = Policy.load(learned).tokenizer
    again = encode(read, "hi", row["response"])
    assert again.response == tokens[: len(again.response)]
    assert len(again.response) == row["length"]
    assert read.convert_ids_to_tokens(again.response[-1]) == end


PAIRS = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
ONE_STEP = ("--batch-size", 4, "--epochs", 1, "--lr", 1e-4)


@pytest.mark.parametrize("name", ["gemma", "phi3"])
def test_every_job_ends_an_answer_where_the_template_ends_a_turn(tmp_path, name):
    """From a policy that says "yes" and its turn's end: answers are drawn, measured, learned and scored to that end."""
    about = FAMILIES[name]
    policy = taught(tmp_path, family(tmp_path, name), [{"prompt": f"ask {i}", "response": "yes"} for i in range(6)])
    end = AutoTokenizer.from_pretrained(policy).convert_tokens_to_ids(about["end"])
    asked, pairs = write(tmp_path / "p.jsonl", PAIRS), write(tmp_path / "pairs.jsonl", PAIRS)
    pyrite("reward", "--model", policy, "--data", pairs, "--held-out", 0.4, "--out", tmp_path / "reward", *ONE_STEP)
    (score,) = RewardEnsemble.load(tmp_path / "reward").members
    assert score.encode(said(["ask 1"], ["yes"])).ids[-1] == end
    pyrite(
        "dpo",
        "--model",
        policy,
        "--data",
        pairs,
        "--held-out",
        0.4,
        "--lora",
        "lora(r=2)",
        "--out",
        tmp_path / "dpo",
        *ONE_STEP,
    )
    assert end in json.loads((tmp_path / "dpo/model/tokenizer_config.json").read_text()).get("pyrite", {}).get(
        "ends", [end]
    )
    assert (tmp_path / "dpo" / "model" / "generation_config.json").exists()  # beside adapters too
    rewards = ("--proxy", tmp_path / "reward", "--max-new-tokens", 12)
    for model in (policy, tmp_path / "dpo" / "model"):
        out = tmp_path / f"evaluate-{model.parent.name}"
        pyrite("evaluate", "--model", model, "--prompts", asked, "--gold", "length()", *rewards, "--out", out)
        assert json.loads((out / "done.json").read_text())["missing_eos"]["mean"] == 0
    rounds = ("--rounds", 1, "--judge", "bradley_terry(gold='length()')")
    pyrite("online", "--model", policy, "--prompts", asked, *rounds, *rewards, "--out", tmp_path / "online", *ONE_STEP)
    ppo = ("--steps", 1, "--prompts-per-step", 4, "--reward", tmp_path / "reward")
    pyrite("ppo", "--model", policy, "--prompts", asked, *ppo, *rewards, "--out", tmp_path / "ppo", *ONE_STEP)
    for job in ("online", "ppo"):
        rows = [json.loads(line) for line in (tmp_path / job / "metrics.jsonl").read_text().splitlines()]
        assert all(row["missing_eos"] == 0 for row in rows if "missing_eos" in row)
        assert all(row["cut"] == 0 for row in rows if "cut" in row)


def test_drawing_ends_at_every_token_of_the_generation_config(tmp_path):
    model = taught(tmp_path, family(tmp_path, "plain"), [{"prompt": "hi", "response": "yes"}])
    letter = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("s")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, letter]}))
    (row,) = drawn(tmp_path, model)
    assert (row["response"], row["finished"], row["length"]) == ("ye", True, 3)


def test_a_model_without_an_end_is_refused_with_both_names(tmp_path, capsys):
    model = build(tmp_path / "model", CHATML.replace("<|im_end|>", "### End"), "<|im_start|>", eos="</s>")
    demos = write(tmp_path / "demos.jsonl", [{"prompt": "hi", "response": "yes"}])
    said = refused(capsys, "sft", "--model", model, "--data", demos, "--out", tmp_path / "sft", "--held-out", 0)
    assert "'### End'" in said and "'</s>'" in said
    assert not (tmp_path / "sft").exists()


def test_template_arguments_are_used_recorded_saved_and_checked(tmp_path, capsys):
    model = family(tmp_path, "qwen35")
    learned = taught(tmp_path, model, [{"prompt": "hi", "response": "yes"}], "--template-args", "enable_thinking=false")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert config["template"]["template_args"] == ["enable_thinking=false"]
    tokens = stock(learned, enable_thinking=False)
    assert AutoTokenizer.from_pretrained(learned).decode(tokens).startswith("yes<|im_end|>")
    (row,) = drawn(tmp_path, learned)  # as it was trained, without being told again
    assert (row["response"], row["length"]) == ("yes", 4)
    demos = tmp_path / "demos.jsonl"
    for model, args, words in (
        (family(tmp_path, "qwen3"), "enable_thinkin=false", "did you mean enable_thinking?"),
        (family(tmp_path, "plain"), "enable_thinking=false", "no chat template"),
        (family(tmp_path, "qwen3"), "enable_thinking", "write NAME=VALUE"),
    ):
        more = ("--out", tmp_path / "no", "--held-out", 0, "--template-args", args)
        assert words in refused(capsys, "sft", "--model", model, "--data", demos, *more)


def test_a_plain_answer_is_not_learned_inside_an_open_think_block(tmp_path, capsys):
    model = family(tmp_path, "r1")
    rows = [{"prompt": "hi", "response": "<think>\nso\n</think>\n\nyes"}, {"prompt": "ho", "response": "no"}]
    for job, data in (
        ("sft", rows),
        ("dpo", [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "a</think>b"} for row in rows]),
    ):
        file = write(tmp_path / f"{job}.jsonl", data)
        said = refused(capsys, job, "--model", model, "--data", file, "--out", tmp_path / job, "--held-out", 0.5)
        assert f"{file}, line 2" in said and "opens <think>" in said


CALL = [{"name": "look"}]


@pytest.mark.parametrize("fields", [{"reasoning_content": "so"}, {"tool_calls": CALL}])
def test_reasoning_and_tool_calls_are_learned_or_refused_by_line(tmp_path, capsys, fields):
    turn = {"role": "assistant", "content": "yes", **fields}
    learned = taught(tmp_path, family(tmp_path, "qwen3"), [{"messages": [*ASK, turn]}])
    tokenizer = AutoTokenizer.from_pretrained(learned)
    whole, asked = (
        tokenizer.apply_chat_template(turns, add_generation_prompt=ask, tokenize=False)
        for turns, ask in (([*ASK, turn], False), (ASK, True))
    )
    want = whole.removeprefix(asked).removesuffix("\n")
    assert ("so" if "reasoning_content" in fields else "look") in want
    tokens = stock(learned)
    end = tokens.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert tokenizer.decode(tokens[: end + 1]) == want

    model, (name,) = family(tmp_path, "qwen25"), fields
    plain = {"role": "assistant", "content": "no"}
    cases = (
        ("sft", {"messages": [*ASK, turn]}),
        ("dpo", {"prompt": ASK, "chosen": [turn], "rejected": [plain]}),
        ("reward", {"prompt": ASK, "chosen": [turn], "rejected": [plain]}),
        ("reward", {"prompt": [*ASK, turn, *ASK], "chosen": "yes", "rejected": "no"}),
    )
    for i, (job, row) in enumerate(cases):
        others = [{"prompt": f"{n}", "response": "a", "chosen": "a", "rejected": "b"} for n in range(8)]
        if job == "sft":
            others = [{"messages": [{"role": "user", "content": f"{n}"}, plain]} for n in range(8)]
        file = write(tmp_path / "rows.jsonl", [others[0], row, *others[1:]])
        said = refused(capsys, job, "--model", model, "--data", file, "--out", tmp_path / f"no{i}", "--held-out", 0.3)
        assert f"{file}, line 2" in said and f"leaves out {name}" in said
        assert not (tmp_path / f"no{i}").exists()


@pytest.mark.parametrize("kind", ["first", "prepend"])
def test_a_leading_space_comes_back_from_sentencepiece(tmp_path, kind):
    """What is learned behind a prompt is the very text, and what is drawn there, encoded again, the very tokens."""
    model = family(tmp_path, "plain")
    letters = ["▁", "▁y", "y", "e", "s", "h", "i"]
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}, [("▁", "y")])
    )
    if kind == "first":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence(steps)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(model)
    for answer, first in ((" yes", "▁y"), ("yes", "y"), ("  yes", "▁")):
        out = tmp_path / f"{len(answer)}"
        out.mkdir()
        learned = taught(out, model, [{"prompt": "hi", "response": answer}])
        tokens = stock_of(learned)
        assert AutoTokenizer.from_pretrained(learned).convert_ids_to_tokens(tokens[0]) == first
        (row,) = drawn(out, learned)
        assert (row["response"], row["finished"]) == (answer, True)
        read = Policy.load(learned).tokenizer
        assert response_ids(read, row["response"]) == tokens[: row["length"]]


def stock_of(model: Path) -> list[int]:
    """What transformers draws behind the start token and the prompt "hi"."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = [tokenizer.bos_token_id, *tokenizer("hi", add_special_tokens=False)["input_ids"]]
    every = policy.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=[999])
    return every[0, len(ids) :].tolist()


def test_a_turn_in_tags_is_no_open_think_block(tmp_path):
    """A tag that opens every answer, and that the template closes by itself."""
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    asking = "{% if add_generation_prompt %}<assistant>{% endif %}"
    folder = build(tmp_path / "m", turns + asking, "<user>", "</user>", "<assistant>", "</assistant>")
    tokenizer, _ = text.load_tokenizer(folder)
    encoded = encode(tokenizer, "hi", "yes")
    assert tokenizer.convert_ids_to_tokens(encoded.ids)[-5:] == ["<assistant>", "y", "e", "s", "</assistant>"]
