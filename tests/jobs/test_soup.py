"""The job: soups of policies, of reward models, of whole models; grids; what is recorded; what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import ingredients
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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
        model = RewardModel.load(base, lora=Lora(lora_rank=2), head_seed=seed, head_std=1.0)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(100 * seed + index))
        model.mean, model.std = 0.5 + seed, 2.0 - seed
        model.save(path)
    return paths


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


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
    parts = [soup.read(path) for path in three]
    for name, part in soup.read(folder).low.items():
        mean = sum(w * p.low[name].matrix() for w, p in zip((0.5, 0.25, 0.25), parts, strict=True))
        torch.testing.assert_close(part.matrix(), mean, atol=1e-6, rtol=0)
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
    read = [soup.read(path) for path in three]
    wanted = soup.tensors(soup.merged(read, [1 / 3] * 3, mode=mode))
    found = soup.tensors(soup.read(tmp_path / "run" / "model"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


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
    half, whole = (soup.read(path) for path in (tmp_path / "run" / "model", three[0]))
    for name, part in half.low.items():
        torch.testing.assert_close(part.matrix(), whole.low[name].matrix() / 2)


def test_a_grid_of_soups(three: list[str], base: Path, tmp_path: Path) -> None:
    done = merged(tmp_path / "run", three, steps=2)
    assert done.results is not None
    names = ["1,0,0", "0.5,0.5,0", "0.5,0,0.5", "0,1,0", "0,0.5,0.5", "0,0,1"]
    assert list(done.results["soups"]) == [f"models/{name}" for name in names]
    for name, told in done.results["soups"].items():
        assert name == "models/" + ",".join(f"{weight:g}" for weight in told["weights"])
        assert read_json(tmp_path / "run" / name / "soup.json").items() >= told.items()
    corner = ordinary(tmp_path / "run" / "models" / "0,1,0", base)
    assert torch.equal(logits(corner), logits(ordinary(Path(three[1]), base)))
    merged(tmp_path / "one", three, 0.5, 0.0, 0.5)
    edge = ordinary(tmp_path / "run" / "models" / "0.5,0,0.5", base)
    assert torch.equal(logits(edge), logits(ordinary(tmp_path / "one" / "model", base)))


def test_a_cut_off_grid_goes_on(three: list[str], tmp_path: Path) -> None:
    before = merged(tmp_path / "run", three, steps=2).results
    assert before is not None
    (tmp_path / "run" / "done.json").unlink()
    kept, lost = (tmp_path / "run" / "models" / name for name in ("1,0,0", "0,0,1"))
    stamp = (kept / "soup.json").stat().st_mtime_ns
    lost.rename(lost.with_name(".0,0,1"))  # as a kill while writing leaves it
    (lost.with_name(".0,0,1") / "soup.json").unlink()
    after = merged(tmp_path / "run", three, steps=2).results
    assert after is not None
    assert after["soups"] == before["soups"]
    assert (kept / "soup.json").stat().st_mtime_ns == stamp
    assert (lost / "soup.json").exists()
    assert not lost.with_name(".0,0,1").exists()


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
    raw = model.raw_scores(model.encode(*ASKED))
    assert (raw - parts[0].raw_scores(parts[0].encode(*ASKED))).abs().min() > 0.01
    plain = ordinary(folder, base, AutoModelForSequenceClassification, num_labels=1).eval()
    plain.config.pad_token_id = model.model.config.pad_token_id
    with torch.no_grad():
        scores = [plain(torch.tensor([one.prompt + one.response])).logits[0, 0] for one in model.encode(*ASKED)]
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
        (3, {"steps": 2, "weights": (0.2, 0.3, 0.5)}, "leave out --weights"),
        (3, {"steps": 2, "normalize": False}, "leave out --weights and --no-normalize"),
        (3, {"steps": 0}, "--steps 0"),
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
