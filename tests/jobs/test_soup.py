"""Soups of policies, of reward models, of whole models; peft as the independent reference; what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ingredients
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reading import asked, each
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from pyrite import cli
from pyrite.core.runs import Run, RunError, read_json
from pyrite.jobs import soup
from pyrite.models.policy import Lora, Policy, RewardModel
from pyrite.recipes import toy

IDS = torch.arange(6, 30).view(2, 12)
ASKED = (["tell me", "please"], ["hello my friend !", "a fox , forest ."])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingredients.base(tmp_path_factory.mktemp("soup") / "base")


@pytest.fixture(scope="module")
def three(base: Path) -> list[str]:
    """Adapters of policies."""
    return [str(ingredients.trained(base, base.parent / f"policy_{i}", i)) for i in range(3)]


@pytest.fixture(scope="module")
def wholes(three: list[str], base: Path) -> list[str]:
    """Whole models, one of them in several files."""
    for index, path in enumerate(three):
        model: Any = Policy.load(path).model
        folder = base.parent / f"whole_{index}"
        model.merge_and_unload().save_pretrained(folder, max_shard_size="1MB" if index == 1 else "5GB")
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return [str(base.parent / f"whole_{index}") for index in range(3)]


@pytest.fixture(scope="module")
def rewards(base: Path) -> list[str]:
    """Adapters of reward models, heads drawn apart."""
    paths = [str(base.parent / f"reward_{seed}") for seed in range(2)]
    for seed, path in enumerate(paths):
        model = RewardModel.load(base, lora=Lora(r=2), head_seed=seed, head_std=1.0)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(100 * seed + index))
        model.mean, model.std = 0.5 + seed, 2.0 - seed
        model.save(path)
    return paths


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def matrices(path: Path | str) -> dict[str, Tensor]:
    """s B A of every module of an adapter folder, by the names of the base; read without Pyrite."""
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    found = load_file(Path(path) / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    names = [name for name in found if ".lora_A" in name]
    return {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]: scale
        * found[name.replace("lora_A", "lora_B")]
        @ found[name]
        for name in names
    }


def ordinary(path: Path, base: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """By transformers and peft alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(kind.from_pretrained(base, **options), path)


def merged(out: Path, paths: list[str], *weights: float, **options: Any) -> Run:
    return soup.run(soup.Config(tuple(paths), out, weights, **options))


def test_a_soup_of_adapters(three: list[str], base: Path, tmp_path: Path) -> None:
    done = merged(tmp_path / "run", three, 0.5, 0.25, 0.25)
    folder = tmp_path / "run" / "model"
    parts = [matrices(path) for path in three]
    for name, matrix in matrices(folder).items():
        assert matrix.abs().max() > 0.01
        mean = sum(w * part[name] for w, part in zip((0.5, 0.25, 0.25), parts, strict=True))
        torch.testing.assert_close(matrix, mean, atol=1e-6, rtol=0)
    assert read_json(folder / "adapter_config.json")["r"] == 12
    model = ordinary(folder, base)
    torch.testing.assert_close(logits(model), logits(Policy.load(folder).model))
    with torch.no_grad():
        said = model.generate(input_ids=IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert said.shape[1] > 4
    assert AutoTokenizer.from_pretrained(folder).decode(said[0, 4:])
    assert done.results is not None
    assert done.results["weights"] == [0.5, 0.25, 0.25]
    assert done.results["ingredients"] == three
    assert done.results["mode"] == "delta"
    assert done.results["largest_error"] < 1e-6
    assert 0.3 < done.results["lowest_cosine"] < 1
    assert len(done.results["modules"]) == 14
    told = read_json(folder / "soup.json")
    assert told.items() <= done.results.items()
    assert told["inputs"] == read_json(tmp_path / "run" / "manifest.json")["inputs"]
    assert merged(tmp_path / "run", three, 0.5, 0.25, 0.25).results == done.results
    with pytest.raises(RunError, match="weights"):
        merged(tmp_path / "run", three, 0.25, 0.5, 0.25)


@pytest.mark.parametrize(("mode", "rank"), [("factor", 4), ("svd", 4), ("delta", 12)])
def test_equal_weights_are_the_default(three: list[str], tmp_path: Path, mode, rank: int) -> None:
    done = merged(tmp_path / "run", three, mode=mode)
    assert done.results is not None
    assert done.results["weights"] == [1 / 3] * 3
    assert done.results["rank"] == rank


def test_what_a_smaller_rank_costs_is_told(three: list[str], tmp_path: Path) -> None:
    errors = []
    for rank in (1, 4, 12):
        done = merged(tmp_path / str(rank), three, mode="svd", rank=rank)
        assert done.results is not None
        errors.append(done.results["largest_error"])
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-6


def test_averaged_factors_are_remarked_upon(three: list[str], tmp_path: Path, capsys) -> None:
    done = merged(tmp_path / "far", three, mode="factor")
    assert done.results is not None
    assert f"cosine {done.results['lowest_cosine']:.2f}" in capsys.readouterr().err
    merged(tmp_path / "near", [three[0]] * 2, mode="factor")
    assert "note" not in capsys.readouterr().err


def test_weights_as_they_stand(three: list[str], base: Path, tmp_path: Path) -> None:
    merged(tmp_path / "run", three[:2], 0.5, 0.0, normalize=False)
    half, whole = (matrices(path) for path in (tmp_path / "run" / "model", three[0]))
    for name, matrix in half.items():
        torch.testing.assert_close(matrix, whole[name] / 2)


# Against peft ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(base: Path) -> list[str]:
    """Adapters of several ranks and scales."""
    sizes = [(4, 8.0), (2, 3.0), (6, 6.0)]
    return [
        str(ingredients.trained(base, base.parent / f"uneven_{i}", i, rank=rank, alpha=alpha))
        for i, (rank, alpha) in enumerate(sizes)
    ]


WEIGHTS = (0.5, 0.3, 0.2)


def peft_of(paths: list[str], base: Path) -> Any:
    """All adapters on one base, by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), paths[0], adapter_name="0")
        for index, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(index))
    return model


def layers(model: Any) -> dict[str, Any]:
    """Adapted layers by the names that the base gives them."""
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def close(a: Tensor, b: Tensor, *, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=within * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize(
    ("mode", "kind", "weights", "times"),
    [
        ("delta", "cat", WEIGHTS, 1),
        ("svd", "svd", WEIGHTS, 1),
        ("factor", "linear", [weight**2 for weight in WEIGHTS], 1),
        ("factor", "linear", [1 / 3] * 3, 3),  # peft weighs A and B by the root of a weight
    ],
)
def test_modes_are_those_of_peft(
    mode, kind: str, weights, times: int, three: list[str], uneven: list[str], base: Path, tmp_path: Path
) -> None:
    paths = three if mode == "factor" else uneven
    model = peft_of(paths, base)
    model.add_weighted_adapter(["0", "1", "2"], [*weights], "soup", combination_type=kind)
    done = merged(tmp_path / "run", paths, *([1 / 3] * 3 if times == 3 else WEIGHTS), mode=mode)
    found = matrices(tmp_path / "run" / "model")
    assert found.keys() == layers(model).keys()
    assert len(found) == 14
    for name, matrix in found.items():
        close(times * matrix, layers(model)[name].get_delta_weight("soup").detach(), within=1e-5)
    assert done.results is not None
    assert done.results["rank"] == {"delta": 12, "svd": 6, "factor": 4}[mode]


@pytest.mark.parametrize("weights", [WEIGHTS, (0.9, -0.4, 0.2)])
def test_logits_are_those_of_the_base_plus_the_deltas(uneven: list[str], base: Path, tmp_path: Path, weights) -> None:
    merged(tmp_path / "run", uneven, *weights, normalize=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    for path, weight in zip(uneven, weights, strict=True):
        for name, matrix in matrices(path).items():
            model.get_submodule(name).weight.data += weight * matrix
    wanted = logits(model)
    assert (wanted - before).abs().max() > 0.5
    close(logits(ordinary(tmp_path / "run" / "model", base)), wanted, within=1e-5)
    close(logits(Policy.load(tmp_path / "run" / "model").model), wanted, within=1e-5)


@pytest.mark.parametrize("mode", ["delta", "factor"])
def test_all_weight_on_one_is_that_one(three: list[str], base: Path, tmp_path: Path, mode) -> None:
    merged(tmp_path / "run", three, 0.0, 1.0, 0.0, mode=mode)
    one, wanted = (logits(ordinary(Path(path), base)) for path in (tmp_path / "run" / "model", three[1]))
    assert torch.equal(one, wanted)


def test_rank_stabilized_adapters_are_merged_by_their_own_scale(three: list[str], base: Path, tmp_path: Path) -> None:
    stable = edited(three[1], tmp_path / "stable", use_rslora=True)
    assert (logits(ordinary(Path(stable), base)) - logits(ordinary(Path(three[1]), base))).abs().max() > 0.1
    merged(tmp_path / "run", [three[0], stable], 0.5, 0.5)
    wanted = layers(peft_of([three[0], stable], base))
    for name, matrix in matrices(tmp_path / "run" / "model").items():
        close(matrix, 0.5 * wanted[name].get_delta_weight("0") + 0.5 * wanted[name].get_delta_weight("1"))


def test_embeddings_and_transposed_layers_are_merged_too(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    shape = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=16)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "base")
    for seed in range(2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = LoraConfig(r=2 + seed, target_modules=["c_attn", "wpe"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        adapted.save_pretrained(str(tmp_path / str(seed)))
        tokenizer.save_pretrained(tmp_path / str(seed))
    paths = [str(tmp_path / "0"), str(tmp_path / "1")]
    merged(tmp_path / "run", paths)
    both = layers(peft_of(paths, tmp_path / "base"))
    one = layers(peft_of([str(tmp_path / "run" / "model")], tmp_path / "base"))
    assert len(one) == 2
    for name, layer in one.items():
        parts = [both[name].get_delta_weight(str(index)) for index in range(2)]
        close(layer.get_delta_weight("0"), (parts[0] + parts[1]) / 2)


def test_ingredients_stay_as_they_were(three: list[str], tmp_path: Path) -> None:
    def digest() -> list[str]:
        return [
            hashlib.sha256(file.read_bytes()).hexdigest() for path in three for file in sorted(Path(path).iterdir())
        ]

    before = digest()
    merged(tmp_path / "run", three, mode="svd")
    assert digest() == before


def test_modules_are_compared(three: list[str], uneven: list[str], tmp_path: Path) -> None:
    runs = {mode: merged(tmp_path / mode, three, *WEIGHTS, mode=mode).results for mode in ("factor", "delta")}
    assert runs["factor"] is not None
    factors, deltas = (matrices(tmp_path / mode / "model") for mode in runs)
    for name, row in runs["factor"]["modules"].items():
        factor, delta = factors[name], deltas[name]
        assert row["error"] == pytest.approx(((factor - delta).norm() / delta.norm()).item(), rel=1e-4)
        assert row["cosine"] == pytest.approx(
            torch.cosine_similarity(factor.flatten(), delta.flatten(), 0).item(), abs=1e-5
        )
        assert row["norm_ratio"] == pytest.approx((factor.norm() / delta.norm()).item(), rel=1e-5)
    told = merged(tmp_path / "svd", uneven, *WEIGHTS, mode="svd", rank=1).results
    assert told is not None
    assert told["lowest_cosine"] is None  # several ranks have no factor-wise average
    assert told["largest_error"] > 0.05


# Adapters that are refused -----------------------------------------------------------------------------------


def edited(path: str, folder: Path, change: Callable[[dict], None] | None = None, **config: Any) -> str:
    """A copy of an adapter folder with other tensors or another config."""
    shutil.copytree(path, folder)
    if change:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    before = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**before, **config}))
    (folder / "base.json").unlink()
    return str(folder)


A_0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def drop_layer(tensors: dict) -> None:
    for name in [name for name in tensors if "q_proj" in name]:
        del tensors[name]


def widen(tensors: dict) -> None:
    tensors[A_0] = torch.nn.functional.pad(tensors[A_0], (0, 1))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, {"use_dora": True}, "use_dora=True"),
        (None, {"bias": "lora_only"}, "bias='lora_only'"),
        (None, {"lora_bias": True}, "lora_bias=True"),
        (None, {"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        (None, {"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        (None, {"trainable_token_indices": [3]}, "trainable_token_indices"),
        (None, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        (None, {"an_option_of_next_year": 1}, "an_option_of_next_year"),
        (None, {"init_lora_weights": "pissa"}, "changes the base"),
        (None, {"peft_type": "IA3"}, "holds IA3 adapters"),
        (None, {"r": 8}, "config says rank 8"),
        (lambda t: t.clear(), {}, "would be the base"),
        (lambda t: t[A_0].fill_(torch.nan), {}, "q_proj.lora_A.weight holds values that are not finite"),
        (lambda t: t.pop(A_0), {}, "layers.0.self_attn.q_proj is no pair"),
        (None, {"base_model_name_or_path": "another"}, "different bases, .*base and another"),
        (None, {"revision": "v2"}, "different bases, .* at v2"),
        (None, {"task_type": "SEQ_CLS"}, "differ in task_type: CAUSAL_LM and SEQ_CLS"),
        (None, {"fan_in_fan_out": True}, "differ in fan_in_fan_out"),
        (drop_layer, {}, "different modules: only one has model.layers.0.self_attn.q_proj"),
        (lambda t: t.update({"base_model.model.head.weight": torch.ones(1)}), {}, "only one has head.weight"),
        (widen, {}, r"differ in shapes, model.layers.0.self_attn.q_proj: \(128, 128\) and \(128, 129\)"),
    ],
)
def test_adapters_that_are_refused(three: list[str], tmp_path: Path, change, config, message: str) -> None:
    odd = edited(three[1], tmp_path / "odd", change, **config)
    with pytest.raises(ValueError, match=message) as error:
        merged(tmp_path / "run", [three[0], odd])
    assert odd in str(error.value)
    assert not (tmp_path / "run").exists()


def test_factors_want_equal_ranks_and_scales(three: list[str], uneven: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in rank: 4 and 2; mode factor"):
        merged(tmp_path / "run", [three[0], uneven[1]], mode="factor")
    with pytest.raises(ValueError, match=r"differ in scale: 2.0 and 2.25"):
        merged(tmp_path / "run", [three[0], edited(three[1], tmp_path / "odd", lora_alpha=9)], mode="factor")


def test_a_copy_of_the_base_is_the_same_base(three: list[str], base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    moved = edited(three[1], tmp_path / "moved", base_model_name_or_path=str(tmp_path / "copy"))
    merged(tmp_path / "run", [three[0], moved])
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="different bases"):
        merged(tmp_path / "again", [three[0], moved])


# Reward models -----------------------------------------------------------------------------------------------


def test_a_soup_of_reward_models(rewards: list[str], base: Path, tmp_path: Path) -> None:
    merged(tmp_path / "run", rewards, 0.75, 0.25)
    folder = tmp_path / "run" / "model"
    model, parts = RewardModel.load(folder), [RewardModel.load(path) for path in rewards]
    heads = [part.model.base_model.model.score.modules_to_save["default"].weight for part in parts]
    found = model.model.base_model.model.score.modules_to_save["default"].weight
    torch.testing.assert_close(found, 0.75 * heads[0] + 0.25 * heads[1])
    assert (model.mean, model.std) == (0.75, 1.75)
    assert model.max_length == parts[0].max_length
    raw = model.raw_scores(model.encode(asked(*ASKED)))
    assert (raw - parts[0].raw_scores(parts[0].encode(asked(*ASKED)))).abs().min() > 0.01
    plain = ordinary(folder, base, AutoModelForSequenceClassification, num_labels=1).eval()
    plain.config.pad_token_id = model.model.config.pad_token_id
    with torch.no_grad():
        scores = [
            plain(torch.tensor([one.prompt + one.response])).logits[0, 0] for one in each(model.encode(asked(*ASKED)))
        ]
    torch.testing.assert_close(raw, torch.stack(scores), atol=1e-5, rtol=1e-5)


def test_all_weight_on_one_reward_model_is_that_one(rewards: list[str], tmp_path: Path) -> None:
    merged(tmp_path / "run", rewards, 0.0, 1.0)
    wanted = RewardModel.load(rewards[1]).scores(*ASKED)
    assert torch.equal(RewardModel.load(tmp_path / "run" / "model").scores(*ASKED), wanted)


def test_reward_models_that_read_differently_are_refused(rewards: list[str], tmp_path: Path) -> None:
    shutil.copytree(rewards[1], tmp_path / "odd")
    config = read_json(tmp_path / "odd" / "config.json")
    config["pyrite"]["pooling"] = "mean"
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="differ in pooling: last and mean"):
        merged(tmp_path / "run", [rewards[0], str(tmp_path / "odd")])
    with pytest.raises(ValueError, match="a reward head, is averaged whole"):
        merged(tmp_path / "run", rewards, 0.5, 0.4, normalize=False)
    with pytest.raises(ValueError, match="standard deviation -3"):
        merged(tmp_path / "run", rewards, -4.0, 5.0, normalize=False)
    assert not (tmp_path / "run").exists()


# Whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_a_soup_of_whole_models(wholes: list[str], tmp_path: Path, order) -> None:
    paths = [wholes[i] for i in order]
    done = merged(tmp_path / "run", paths, 0.5, 0.25, 0.25, mode="full")
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    parts = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, 0.5 * parts[0][name] + 0.25 * parts[1][name] + 0.25 * parts[2][name])
    files = len(list(folder.glob("*.safetensors")))
    assert files == len(list(Path(paths[0]).glob("*.safetensors")))
    assert (files > 1) == (order[0] == 1)
    torch.testing.assert_close(logits(Policy.load(folder).model), logits(model))
    assert done.results is not None
    assert done.results["mode"] == "full"


def test_whole_models_and_their_adapters_make_the_same_soup(
    three: list[str], wholes: list[str], base: Path, tmp_path: Path
) -> None:
    weights = (0.5, 0.3, 0.2)
    merged(tmp_path / "low", three, *weights)
    merged(tmp_path / "full", wholes, *weights, mode="full")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model")
    torch.testing.assert_close(logits(whole), logits(ordinary(tmp_path / "low" / "model", base)), atol=1e-4, rtol=1e-4)


def test_one_whole_model_is_itself(wholes: list[str], tmp_path: Path) -> None:
    merged(tmp_path / "run", wholes, 0.0, 1.0, 0.0, mode="full")
    found, wanted = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tmp_path / "run/model", wholes[1]))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_whole_reward_models_keep_their_constants(base: Path, tmp_path: Path) -> None:
    for seed in range(2):
        model = RewardModel.load(base, head_seed=seed)
        model.mean, model.std = float(seed), 1.0
        model.save(tmp_path / str(seed))
    merged(tmp_path / "run", [str(tmp_path / "0"), str(tmp_path / "1")], mode="full")
    found = RewardModel.load(tmp_path / "run" / "model")
    assert (found.mean, found.std) == (0.5, 1.0)
    heads = [RewardModel.load(tmp_path / str(seed)).model.score.weight for seed in range(2)]
    torch.testing.assert_close(found.model.score.weight, (heads[0] + heads[1]) / 2)


def test_whole_models_that_differ_are_refused(wholes: list[str], base: Path, tmp_path: Path) -> None:
    def altered(name: str, **changes: Any) -> str:
        shutil.copytree(wholes[1], tmp_path / name)
        config = read_json(tmp_path / name / "config.json")
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
        return str(tmp_path / name)

    with pytest.raises(ValueError, match=r"differ in rms_norm_eps: 1e-05 and 0\.1"):
        merged(tmp_path / "run", [wholes[0], altered("eps", rms_norm_eps=0.1)], mode="full")
    toy.model(0, size="base").save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"only one has model\.layers\.2"):
        merged(tmp_path / "run", [wholes[0], str(tmp_path / "larger")], mode="full")
    with pytest.raises(ValueError, match="whole model is averaged whole, so the weights must sum to 1"):
        merged(tmp_path / "run", wholes[:2], 0.5, 0.4, mode="full", normalize=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folder of a whole model"):
        merged(tmp_path / "run", [wholes[0], str(tmp_path / "empty")], mode="full")
    assert not (tmp_path / "run").exists()


# Options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "names 1; a soup takes at least 2"),
        (3, {"weights": (0.5, 0.5)}, "2 weights for 3 ingredients"),
        (3, {"weights": (0.5, 0.5, 0.5)}, "sum to 1.5"),
        (3, {"rank": 4}, "--rank 4: .* --mode svd alone"),
        (3, {"rank": 0, "mode": "svd"}, "--rank 0"),
        (3, {"mode": "full"}, "modes other than full merge adapters"),
    ],
)
def test_options_that_are_refused(three: list[str], tmp_path: Path, count: int, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soup.run(soup.Config(tuple(three[:count]), tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_ingredients_that_are_refused(three: list[str], wholes: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole_1: no folder with adapters; --mode full"):
        merged(tmp_path / "run", [three[0], wholes[1]])
    with pytest.raises(ValueError, match="nowhere: no folder with adapters"):
        merged(tmp_path / "run", [three[0], "nowhere"])
    for name, edit in (("tokenizer.json", '"fox": 9999'), ("chat_template.jinja", "{# another #}")):
        shutil.copytree(three[1], tmp_path / name)
        before = (tmp_path / name / name).read_text()
        fox = next((line.strip().rstrip(",") for line in before.splitlines() if '"fox"' in line), None)
        (tmp_path / name / name).write_text(before.replace(fox, edit) if fox else before + edit)
        with pytest.raises(ValueError, match=f"texts differently: their {name} differ"):
            merged(tmp_path / "run", [three[0], str(tmp_path / name)])
    assert not (tmp_path / "run").exists()


def test_padding_and_truncation_of_a_tokenizer_do_not_count(three: list[str], tmp_path: Path) -> None:
    shutil.copytree(three[1], tmp_path / "other")
    saved = read_json(tmp_path / "other" / "tokenizer.json")
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps({**saved, "truncation": cut}))
    merged(tmp_path / "run", [three[0], str(tmp_path / "other")])


def test_the_command_line(three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*three, "--weights", "1.5", "-0.25", "-0.25", "--no-normalize", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["pyrite", "soup", "--ingredients", *options])
    cli.main()
    assert read_json(tmp_path / "run" / "done.json")["weights"] == [1.5, -0.25, -0.25]
