"""Every job that loads a model refuses a broken, foreign or incomplete one: one line, status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from families import build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from pyrite import cli
from pyrite.data import rows as data
from pyrite.feedback.scorers import mean_logps
from pyrite.models.loading import Lora, load_model
from pyrite.models.policy import Policy, RewardModel

Command = Callable[..., tuple[int, str]]
IDS = {"vocab_size": 27, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **IDS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
        )
    ),
}


@pytest.fixture
def pyrite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit status and standard error of a command."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["pyrite", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        return status, capsys.readouterr().err

    return run


def refused(pyrite: Command, out: Path, *arguments: object) -> str:
    """The one line with which a command is refused that has written nothing."""
    status, said = pyrite(*arguments, "--out", out)
    assert status == 2, said
    lines = [line for line in said.splitlines() if not line.startswith("  note: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith("pyrite: ")
    assert "Traceback" not in said
    assert not out.exists()
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """Sound models of every kind, and the smallest data that every job takes."""
    top = tmp_path_factory.mktemp("world")
    made = {"policy": tiny, "reward": top / "reward", "adapters": top / "adapters", "judge": top / "judge"}
    RewardModel.load(tiny, head_seed=0).save(made["reward"])
    RewardModel.load(tiny, head_seed=0, lora=Lora(r=2)).save(made["judge"])
    Policy.load(tiny, lora=Lora(r=2)).save(made["adapters"])
    words = "the cat sat on a red mat then ran".split()
    asked = [{"prompt_id": str(i), "prompt": f"tell me {words[i]}"} for i in range(8)]
    rows: dict[str, list[dict[str, Any]]] = {
        "prompts": asked,
        "demos": [{**row, "response": "a big dog"} for row in asked],
        "pairs": [{**row, "chosen": "a big dog", "rejected": "the bird"} for row in asked],
        "candidates": [
            {**row, "response": text, "sample": k, "finished": True, "length": 2, "logp": -5.0, "gold": float(k)}
            for row in asked
            for k, text in enumerate(("a dog", "the small cat", "on the mat"))
        ],
    }
    for name, some in rows.items():
        made[name] = top / f"{name}.jsonl"
        data.write(some, made[name])
    return made


def policy_jobs(world: dict[str, Path], model: Path) -> dict[str, list[object]]:
    """Commands that read a model as a policy, a reference or a start of training."""
    prompts, pairs, demos = world["prompts"], world["pairs"], world["demos"]
    draws = ["--max-new-tokens", 4]
    return {
        "sft": ["sft", "--model", model, "--data", demos],
        "generate": ["generate", "--model", model, "--prompts", prompts, "--k", 2, *draws],
        "dpo": ["dpo", "--model", model, "--data", pairs],
        "dpo --ref": ["dpo", "--model", world["policy"], "--data", pairs, "--ref", model],
        "online": [
            "online",
            "--model",
            model,
            "--prompts",
            prompts,
            "--judge",
            "bradley_terry(gold='length()')",
            "--rounds",
            1,
            "--prompts-per-round",
            2,
            *draws,
        ],
        "ppo": ["ppo", "--model", model, "--prompts", prompts, "--reward", "length()", "--steps", 1, *draws],
        "evaluate": ["evaluate", "--model", model, "--prompts", prompts, *draws],
        "evaluate --ref": ["evaluate", "--model", world["policy"], "--ref", model, "--prompts", prompts, *draws],
        "reference": ["reference", "--model", model, "--data", pairs],
        "label": [
            *("label", "--no-pairs", "--candidates", world["candidates"]),
            *("--gold", f"distillation(strong={str(world['policy'])!r}, weak={str(model)!r})"),
        ],
        "soup": ["soup", "--ingredients", model, model, "--mode", "full"],
    }


def reward_jobs(world: dict[str, Path], model: Path) -> dict[str, list[object]]:
    """Commands that read a model as a trained reward model."""
    policy, prompts, candidates = world["policy"], world["prompts"], world["candidates"]
    draws = ["--max-new-tokens", 4]
    return {
        "ppo --reward": ["ppo", "--model", policy, "--prompts", prompts, "--reward", model, "--steps", 1, *draws],
        "best_of_n": ["best_of_n", "--candidates", candidates, "--proxy", model],
        "evaluate --proxy": ["evaluate", "--model", policy, "--prompts", prompts, "--proxy", model, *draws],
        "label": ["label", "--candidates", candidates, "--no-pairs", "--gold", f"reward_model(path={str(model)!r})"],
        "label --judge": [
            *("label", "--candidates", candidates),
            *("--judge", f"bradley_terry(gold={f'reward_model(path={str(model)!r})'!r})"),
        ],
        "ppo --reward gold": [
            *("ppo", "--model", policy, "--prompts", prompts, "--steps", 1, *draws),
            *("--reward", f"noisy(gold={f'reward_model(path={str(model)!r})'!r}, sd=0.1)"),
        ],
        "online --annotator": [
            *(
                "online",
                "--model",
                policy,
                "--prompts",
                prompts,
                "--judge",
                "bradley_terry(gold='length()')",
                "--rounds",
                1,
                "--prompts-per-round",
                2,
                *draws,
            ),
            *("--annotator", f"reward(path={str(model)!r})"),
        ],
    }


@pytest.mark.slow
def test_a_sound_model_passes_everywhere(world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    """What the commands below refuse, they refuse for the model alone."""
    for kind in ("policy", "adapters"):
        for name, command in policy_jobs(world, world[kind]).items():
            if (kind, name) != ("adapters", "soup"):
                status, said = pyrite(*command, "--out", tmp_path / f"{kind} {name}")
                assert (status, name) == (0, name), said
    for kind in ("reward", "judge"):
        for name, command in reward_jobs(world, world[kind]).items():
            status, said = pyrite(*command, "--out", tmp_path / f"{kind} {name}")
            assert (status, name) == (0, name), said


# Broken in one place -----------------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def cut(folder: Path, file: str, share: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(share * len(whole))])


def without(part: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return lambda folder: edited(folder, change)


def settings(file: str, **options: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **options}))

    return change


def pickled(folder: Path) -> None:
    """The same weights, sound, as transformers saved them before safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def sharded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


def a_shard_missing(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def a_shard_cut(folder: Path) -> None:
    sharded(folder)
    cut(folder, "model-00002-of-00002.safetensors", 0.7)


def a_shard_without_a_tensor(folder: Path) -> None:
    sharded(folder)
    file = "model-00001-of-00002.safetensors"
    edited(folder, lambda tensors: tensors.__delitem__(min(tensors)), file)


def garbage_index(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def ids_beyond(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)


def put(file: str, content: str | bytes) -> Callable[[Path], None]:
    what = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(what) and None


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no attention": (without("self_attn"), "8 missing"),
    "one tensor less": (without("norm.weight"), "missing"),
    "no embedding": (without("embed_tokens"), "1 missing"),
    "a tensor more": (lambda f: edited(f, lambda t: t.update({"model.layers.9.x": torch.ones(2)})), "1 left over"),
    "another shape": (
        lambda f: edited(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        "of another shape",
    ),
    "not finite": (lambda f: edited(f, not_finite), "not finite"),
    "other layers": (settings("config.json", num_hidden_layers=3), "9 missing"),
    "fewer layers": (settings("config.json", num_hidden_layers=1), "9 left over"),
    "other width": (settings("config.json", hidden_size=16, head_dim=4), "of another shape"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
    "cut": (lambda f: cut(f, "model.safetensors", 0.6), "cut short or damaged"),
    "cut in the header": (lambda f: cut(f, "model.safetensors", 0.01), "cut short or damaged"),
    "empty": (put("model.safetensors", ""), "is empty"),
    "garbage": (put("model.safetensors", b"\x80\x04garbage" * 9), "cut short or damaged"),
    "pickled": (pickled, "pickled (pytorch_model.bin)"),
    "pickled shards": (pickled_shards, "pickled"),
    "a shard missing": (a_shard_missing, "1 of 2 files"),
    "a shard cut": (a_shard_cut, "cut short or damaged"),
    "a shard without a tensor": (a_shard_without_a_tensor, "1 of its tensors are not in the files"),
    "garbage index": (garbage_index, "index.json: is damaged"),
    "garbage config": (put("config.json", "{not json"), "config.json: is damaged"),
    "empty config": (put("config.json", ""), "config.json: is damaged"),
    "config is a list": (put("config.json", "[1]"), "list in place of an object"),
    "unknown family": (settings("config.json", model_type="nonsense"), "no model could be loaded"),
    "text for a number": (settings("config.json", hidden_size="wide"), "no model could be loaded"),
    "no heads": (settings("config.json", num_attention_heads=0), "no model could be loaded"),
    "garbage tokenizer": (put("tokenizer.json", "{not json"), "tokenizer.json: is damaged"),
    "empty tokenizer": (put("tokenizer.json", ""), "tokenizer.json: is damaged"),
    "no tokenizer in it": (put("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "garbage tokenizer config": (put("tokenizer_config.json", "x"), "tokenizer_config.json: is damaged"),
    "ids beyond the embedding": (ids_beyond, "its embedding 27 rows"),
}


def some(commands: dict[str, list[object]], faults: dict[str, Any], fault: str) -> dict[str, list[object]]:
    """Two of the commands, others for every fault, so that all take part."""
    names, first = list(commands), list(faults).index(fault)
    return {name: commands[name] for name in (names[first % len(names)], names[(first * 2 + 1) % len(names)])}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model(fault: str, every: bool, world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    change, message = BROKEN[fault]
    for kind, jobs in (("policy", policy_jobs), ("reward", reward_jobs)):
        model = Path(shutil.copytree(world[kind], tmp_path / kind))
        change(model)
        commands = jobs(world, model)
        for name, command in (commands if every else some(commands, BROKEN, fault)).items():
            said = refused(pyrite, tmp_path / "out", *command)
            assert message in said, (name, said)
            assert str(model) in said, (name, said)


# Broken adapters ---------------------------------------------------------------------------------------------------


def pickled_adapters(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "layers.1." in name)
    tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def adapter(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda folder: edited(folder, change, "adapter_model.safetensors")


def wide(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.zeros(5, tensors[name].shape[1])


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0] = float("inf")


BROKEN_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda f: cut(f, "adapter_model.safetensors", 0.6), "cut short or damaged"),
    "empty": (put("adapter_model.safetensors", ""), "is empty"),
    "no tensors": (adapter(lambda tensors: tensors.clear()), "holds no tensors"),
    "gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickled": (pickled_adapters, "pickled (adapter_model.bin)"),
    "one less": (adapter(lambda tensors: tensors.__delitem__(min(tensors))), "1 missing"),
    "one more": (adapter(lambda tensors: tensors.update(more=torch.ones(2))), "1 left over (more)"),
    "of a deeper model": (adapter(renamed), "1 missing"),
    "another shape": (adapter(wide), "of another shape"),
    "not finite": (adapter(infinite), "not finite"),
    "another rank": (settings("adapter_config.json", r=5), "of another shape"),
    "other targets": (settings("adapter_config.json", target_modules=["nothing"]), "do not go onto their base"),
    "garbage config": (put("adapter_config.json", "{"), "adapter_config.json: is damaged"),
    "no base": (settings("adapter_config.json", base_model_name_or_path=None), "names no model below"),
    "base gone": (settings("adapter_config.json", base_model_name_or_path="/no/where"), "is not at /no/where"),
    "garbage note": (put("base.json", "x"), "base.json: is damaged"),
    "ids beyond the embedding": (ids_beyond, "its embedding 27 rows"),
}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", BROKEN_ADAPTERS)
def test_broken_adapters(fault: str, every: bool, world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    change, message = BROKEN_ADAPTERS[fault]
    for kind, jobs in (("adapters", policy_jobs), ("judge", reward_jobs)):
        model = Path(shutil.copytree(world[kind], tmp_path / kind))
        change(model)
        commands = {**jobs(world, model), "merge": ["merge", "--model", model]}
        commands.pop("soup", None)
        for name, command in (commands if every else some(commands, BROKEN_ADAPTERS, fault)).items():
            said = refused(pyrite, tmp_path / "out", *command)
            assert message in said, (name, said)
            assert str(model) in said, (name, said)
    soup = ["soup", "--ingredients", tmp_path / "adapters", world["adapters"]]
    assert str(tmp_path / "adapters") in refused(pyrite, tmp_path / "out", *soup)


# Of another kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reward", "judge"])
def test_a_reward_model_is_no_policy(kind: str, world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    for name, command in policy_jobs(world, world[kind]).items():
        if name != "soup":
            said = refused(pyrite, tmp_path / "out", *command)
            assert "give a language model here" in said or "a language model (CAUSAL_LM) is needed" in said, (
                name,
                said,
            )


@pytest.mark.parametrize("kind", ["policy", "adapters"])
def test_a_policy_is_no_reward_model(kind: str, world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    for name, command in reward_jobs(world, world[kind]).items():
        said = refused(pyrite, tmp_path / "out", *command)
        assert "train one with `pyrite reward`" in said or "a reward model (SEQ_CLS) is needed" in said, (name, said)
        assert str(world[kind]) in said


def test_a_head_starts_new_in_reward_and_in_critics_alone(
    world: dict[str, Path], tmp_path: Path, pyrite: Command
) -> None:
    train = ["reward", "--data", world["pairs"], "--held-out", 0.4, "--epochs", 1]
    ppo = ["ppo", "--model", world["policy"], "--prompts", world["prompts"], "--reward", "length()", "--steps", 1]
    ppo += ["--max-new-tokens", 4]
    for name, command in {
        "reward": [*train, "--model", world["policy"]],
        "reward from a reward model": [*train, "--model", world["reward"]],
        "critic": [*ppo, "--value", world["policy"]],
        "critic from a reward model": [*ppo, "--value", world["reward"]],
        "critic from its adapters": [*ppo, "--value", world["judge"]],
    }.items():
        status, said = pyrite(*command, "--out", tmp_path / name)
        assert (status, said) == (0, said), name
    bare = Path(shutil.copytree(world["reward"], tmp_path / "bare"))
    without("score")(bare)
    assert "1 missing (score.weight)" in refused(pyrite, tmp_path / "out", *ppo, "--value", bare)
    for part in ("self_attn", "embed_tokens"):
        broken = Path(shutil.copytree(world["policy"], tmp_path / part))
        without(part)(broken)
        assert "missing" in refused(pyrite, tmp_path / "out", *train, "--model", broken)
        assert "missing" in refused(pyrite, tmp_path / "out", *ppo, "--value", broken)


# Sound, whatever it looks like -------------------------------------------------------------------------------------


def old_buffers(folder: Path) -> None:
    """As checkpoints were saved when rotary frequencies were buffers of every layer."""
    edited(
        folder, lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)})
    )


def pickle_beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def tied(folder: Path) -> None:
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def a_token_of_images(folder: Path) -> None:
    """As Gemma 3's text models: a special token that no text is given, behind the embedding."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert len(tokenizer) == 28
    tokenizer.save_pretrained(folder)


def tied_and_written(folder: Path) -> None:
    tied(folder)
    edited(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


@pytest.mark.parametrize("look", [sharded, old_buffers, pickle_beside, a_token_of_images, tied, tied_and_written])
def test_sound_policies(look: Callable[[Path], None], world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    model = Path(shutil.copytree(world["policy"], tmp_path / "model"))
    look(model)
    commands = policy_jobs(world, model)
    for name in ("dpo", "generate", "ppo", "soup"):
        status, said = pyrite(*commands[name], "--out", tmp_path / name)
        assert (status, said) == (0, said), name
    assert Policy.load(tmp_path / "soup" / "model")
    status, said = pyrite(
        "reward", "--model", model, "--data", world["pairs"], "--held-out", 0.4, "--out", tmp_path / "reward"
    )
    assert (status, said) == (0, said)
    if look in (sharded, old_buffers, pickle_beside, a_token_of_images):
        texts = ["tell me"], ["the cat sat"]
        assert torch.equal(mean_logps(Policy.load(model), *texts), mean_logps(Policy.load(world["policy"]), *texts))


@pytest.mark.parametrize(("family", "inside"), [("gpt2", "attn"), ("gpt_neo", "attn.attention")])
def test_masks_that_old_versions_saved_are_no_weights(family: str, inside: str, tmp_path: Path) -> None:
    made = build(family)
    made.save_pretrained(tmp_path)
    at = f"transformer.h.0.{inside}"
    mask = {f"{at}.bias": torch.ones(1, 1, 64, 64).bool(), f"{at}.masked_bias": torch.tensor(-1e9)}
    edited(tmp_path, lambda tensors: tensors.update(mask))
    loaded = load_model(AutoModelForCausalLM, tmp_path, dtype="float32")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in made.state_dict().items())
    edited(tmp_path, lambda tensors: tensors.update({f"{at}.q_proj.bias": torch.ones(1, 1, 64, 64)}))
    with pytest.raises(ValueError, match=f"1 left over .{at}.q_proj.bias"):
        load_model(AutoModelForCausalLM, tmp_path, dtype="float32")


@pytest.mark.filterwarnings("ignore")  # of peft, in saving
def test_adapters_of_embeddings_bring_these_along(world: dict[str, Path], tmp_path: Path) -> None:
    """peft saves the whole embedding beside adapters on it."""
    model = LlamaForCausalLM.from_pretrained(world["policy"])
    made: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "lora_" in name:
                value += 0.1
        made.get_input_embeddings().weight[3] += 1.0
    made.save_pretrained(str(tmp_path / "a"))
    assert any(
        key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / "a/adapter_model.safetensors")
    )
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    Policy.load(tmp_path / "a").save(tmp_path / "b")
    ids = torch.tensor([[3, 4, 3]])
    want = made.eval()(input_ids=ids).logits
    for name in "ab":
        torch.testing.assert_close(Policy.load(tmp_path / name).eval().model(input_ids=ids).logits, want)


def test_an_encoder_keeps_the_pooler_that_was_drawn_for_it(world: dict[str, Path], tmp_path: Path) -> None:
    """A masked language model has no pooler: one is drawn with the head, learned, and saved with it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=27, **sizes)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    texts = ["tell me", "about"], ["the cat", "a dog"]
    for name, lora in (("whole", None), ("adapters", Lora(r=2))):
        model = RewardModel.load(tmp_path / "bert", head_seed=7, head_std=1.0, lora=lora)
        model.save(tmp_path / name)
        again = RewardModel.load(tmp_path / name)
        torch.testing.assert_close(again.scores(*texts), model.scores(*texts), atol=1e-5, rtol=1e-5)
    bare = Path(shutil.copytree(tmp_path / "adapters", tmp_path / "bare"))
    adapter(lambda t: [t.pop(name) for name in [name for name in t if "pooler" in name]] and None)(bare)
    with pytest.raises(ValueError, match="pooler"):
        RewardModel.load(bare)


# The base below adapters -------------------------------------------------------------------------------------------


def test_adapters_open_from_elsewhere(
    world: dict[str, Path], tmp_path: Path, pyrite: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world["policy"], tmp_path / "here" / "base")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train = ["--model", "base", "--lora", "lora(r=2)"]
    assert pyrite("sft", "--data", world["demos"], *train, "--out", "tuned")[0] == 0
    assert (
        pyrite("reward", "--data", world["pairs"], "--held-out", 0.4, *train, "--members", 2, "--out", "rewards")[0]
        == 0
    )
    shutil.move("tuned/model", tmp_path / "there" / "adapters")
    monkeypatch.chdir(tmp_path / "there")
    draw = ["generate", "--model", "adapters", "--prompts", world["prompts"], "--k", 1, "--max-new-tokens", 4]
    status, said = pyrite(*draw, "--out", "drawn")
    assert (status, said) == (0, said)
    measure = ["best_of_n", "--candidates", world["candidates"], "--proxy", "../here/rewards"]
    status, said = pyrite(*measure, "--out", "measured")
    assert (status, said) == (0, said)
    note = json.loads(Path("adapters/base.json").read_text())
    assert note["base"] == str(tmp_path / "here" / "base")
    (tmp_path / "here" / "base").rename(tmp_path / "here" / "bass")
    said = refused(pyrite, Path("out"), *draw)
    assert "the model below these adapters is not at" in said
    assert f"did you mean {str(tmp_path / 'here' / 'bass')!r}?" in said
    settings("adapter_config.json", base_model_name_or_path=str(tmp_path / "here" / "bass"))(Path("adapters"))
    status, said = pyrite(*draw, "--out", "again")
    assert (status, said) == (0, said)


def test_adapters_on_other_weights(world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    base = Path(shutil.copytree(world["policy"], tmp_path / "base"))
    lora = Lora(r=2)
    made = {"adapters": Policy.load(base, lora=lora), "judge": RewardModel.load(base, head_seed=0, lora=lora)}
    for name, model in made.items():
        model.save(tmp_path / name)
    sharded(base)  # the same weights in other files
    assert Policy.load(tmp_path / "adapters")
    name = "model-00001-of-00002.safetensors"
    edited(base, lambda t: t.update({key: value + 1e-3 for key, value in t.items() if key == min(t)}), name)
    for kind, jobs in (("adapters", policy_jobs), ("judge", reward_jobs)):
        commands = jobs(world, tmp_path / kind)
        commands.pop("soup", None)
        for name, command in {**commands, "merge": ["merge", "--model", tmp_path / kind]}.items():
            said = refused(pyrite, tmp_path / "out", *command)
            assert "were trained on other weights than those now at" in said, (name, said)
    (tmp_path / "adapters" / "base.json").unlink()  # as other libraries save them
    assert Policy.load(tmp_path / "adapters")


# Names -------------------------------------------------------------------------------------------------------------


def test_a_misspelled_path_fails_at_once(
    world: dict[str, Path], tmp_path: Path, pyrite: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without network, and not told so: the Hub is asked once where the name could be one of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    shutil.copytree(world["policy"], tmp_path / "models" / "mellow")
    monkeypatch.chdir(tmp_path)
    hints = {
        "models/melow": "did you mean 'models/mellow'?",
        "modles/mellow": "did you mean 'models/mellow'?",
        str(tmp_path / "models" / "mello"): "did you mean",
        "./models/melow": "did you mean 'models/mellow'?",
        "some-org/some-model": "neither a folder here nor reachable on the Hub",
        "gpt2": "neither a folder here nor reachable on the Hub",
        "a/b/c/d": "there is no such folder",
        str(tmp_path / "models" / "mellow" / "config.json"): "is a file; give the folder",
        "models": "holds no tokenizer",
    }
    for path, hint in hints.items():
        for name, command in policy_jobs(world, Path(path)).items():
            command = [str(part) if part != Path(path) else path for part in command]
            if name in ("sft", "dpo", "generate", "reference", "evaluate --ref"):
                begin = time.monotonic()
                said = refused(pyrite, tmp_path / "out", *command)
                assert hint in said, (name, path, said)
                assert time.monotonic() - begin < 2, (name, path)


def test_a_run_in_place_of_its_model(world: dict[str, Path], tmp_path: Path, pyrite: Command) -> None:
    shutil.copytree(world["policy"], tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")
    said = refused(pyrite, tmp_path / "out", "sft", "--model", tmp_path / "run", "--data", world["demos"])
    assert f"did you mean {str(tmp_path / 'run' / 'model')!r}?" in said


# Families that adapters do not fit everywhere ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_default_adapters_leave_out_what_they_cannot_reach(
    family: str, world: dict[str, Path], tmp_path: Path, pyrite: Command
) -> None:
    model = tmp_path / family
    FAMILIES[family]().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    run = ["sft", "--model", model, "--data", world["demos"], "--lora", "lora(r=2)", "--epochs", 1]
    status, said = pyrite(*run, "--out", tmp_path / "run")
    assert (status, said) == (0, said)
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert any("in_proj" in name for name in saved)
    assert not any("out_proj" in name or "dt_proj" in name for name in saved)
    assert Policy.load(tmp_path / "run" / "model")
    said = refused(pyrite, tmp_path / "out", *run, "--lora", "lora(target_modules='out_proj')")
    assert "incompatible" in said
