"""Adapter folders: read, refused, merged; peft itself as the independent reference; one base at many weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ingredients
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pyrite.data import text
from pyrite.jobs import soup as adapters
from pyrite.jobs.soup import Blend
from pyrite.models.generation import sample
from pyrite.models.policy import Lora, Policy, RewardModel, backbone

WEIGHTS = (0.5, 0.3, 0.2)
IDS = torch.arange(6, 30).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingredients.base(tmp_path_factory.mktemp("soup") / "base")


@pytest.fixture(scope="module")
def three(base: Path) -> list[Path]:
    """Adapters of one rank and scale."""
    return [ingredients.trained(base, base.parent / f"alike_{i}", i) for i in range(3)]


@pytest.fixture(scope="module")
def uneven(base: Path) -> list[Path]:
    """Adapters of several ranks and scales."""
    sizes = [(4, 8.0), (2, 3.0), (6, 6.0)]
    return [
        ingredients.trained(base, base.parent / f"uneven_{i}", i, rank=rank, alpha=alpha)
        for i, (rank, alpha) in enumerate(sizes)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """peft asks transformers by names that it has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def peft_of(paths: list[Path], base: Path) -> Any:
    """All adapters on one base, by peft."""
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), paths[0], adapter_name="0")
        for index, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(index))
    return model


def layers(model: Any) -> dict[str, Any]:
    """Adapted layers by the names that the base gives them."""
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def matrices(soup: adapters.Adapter) -> dict[str, Tensor]:
    return {adapters._module(name): part.matrix().float() for name, part in soup.low.items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def plain(path: Path) -> Tensor:
    """Logits by the ordinary loaders alone."""
    base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    with quiet():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path))


def soup_of(paths: list[Path], weights, folder: Path, *, mode: adapters.Mode = "delta", rank=None) -> adapters.Adapter:
    read = [adapters.read(path) for path in paths]
    adapters.check_alike(read, mode=mode)
    made = adapters.merged(read, weights, mode=mode, rank=rank)
    adapters.write(made, folder)
    return made


def close(a: Tensor, b: Tensor, *, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=within * max(1.0, b.abs().max().item()), rtol=0)


# Against peft ------------------------------------------------------------------------------------------------


def peft_soup(three: list[Path], base: Path, kind: str, weights: list[float]) -> dict[str, Tensor]:
    model = peft_of(three, base)
    model.add_weighted_adapter(["0", "1", "2"], weights, "soup", combination_type=kind)
    return {name: layer.get_delta_weight("soup").detach() for name, layer in layers(model).items()}


def test_what_is_read_is_what_peft_adds(uneven: list[Path], base: Path) -> None:
    model = peft_of(uneven, base)
    for index, path in enumerate(uneven):
        for name, matrix in matrices(adapters.read(path)).items():
            close(matrix, layers(model)[name].get_delta_weight(str(index)))


def test_delta_is_peft_cat(uneven: list[Path], base: Path, tmp_path: Path) -> None:
    wanted = peft_soup(uneven, base, "cat", [*WEIGHTS])
    found = matrices(soup_of(uneven, WEIGHTS, tmp_path / "soup"))
    assert found.keys() == wanted.keys()
    assert len(found) == 14
    for name, matrix in found.items():
        close(matrix, wanted[name])


def test_factor_is_peft_linear_of_squared_weights(three: list[Path], base: Path, tmp_path: Path) -> None:
    wanted = peft_soup(three, base, "linear", [weight**2 for weight in WEIGHTS])
    for name, matrix in matrices(soup_of(three, WEIGHTS, tmp_path / "soup", mode="factor")).items():
        close(matrix, wanted[name])


def test_peft_linear_of_equal_weights_is_k_times_factor(three: list[Path], base: Path, tmp_path: Path) -> None:
    wanted = peft_soup(three, base, "linear", [1 / 3] * 3)
    for name, matrix in matrices(soup_of(three, [1 / 3] * 3, tmp_path / "soup", mode="factor")).items():
        close(3 * matrix, wanted[name])


def test_svd_is_peft_svd(uneven: list[Path], base: Path, tmp_path: Path) -> None:
    wanted = peft_soup(uneven, base, "svd", [*WEIGHTS])  # to the largest rank, 6
    soup = soup_of(uneven, WEIGHTS, tmp_path / "soup", mode="svd")
    assert soup.config["r"] == 6
    for name, matrix in matrices(soup).items():
        close(matrix, wanted[name], within=1e-5)


# As a model --------------------------------------------------------------------------------------------------


def test_a_soup_of_three_is_the_mean_of_the_deltas(three: list[Path], tmp_path: Path) -> None:
    parts = [matrices(adapters.read(path)) for path in three]
    found = matrices(soup_of(three, [1 / 3] * 3, tmp_path / "soup"))
    for name, matrix in matrices(adapters.read(tmp_path / "soup")).items():
        assert matrix.abs().max() > 0.01
        assert torch.equal(matrix, found[name])  # on disk as in memory
        torch.testing.assert_close(matrix, sum(part[name] for part in parts) / 3, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [WEIGHTS, (0.9, -0.4, 0.2)])
def test_logits_are_those_of_the_base_plus_the_deltas(uneven: list[Path], base: Path, tmp_path: Path, weights) -> None:
    soup_of(uneven, weights, tmp_path / "soup")
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    for path, weight in zip(uneven, weights, strict=True):
        for name, matrix in matrices(adapters.read(path)).items():
            model.get_submodule(name).weight.data += weight * matrix
    wanted = logits(model)
    assert (wanted - before).abs().max() > 0.5
    close(plain(tmp_path / "soup"), wanted, within=1e-5)
    close(logits(Policy.load(tmp_path / "soup").model), wanted, within=1e-5)


@pytest.mark.parametrize("mode", ["delta", "factor"])
def test_all_weight_on_one_is_that_one(three: list[Path], tmp_path: Path, mode: adapters.Mode) -> None:
    soup_of(three, (0.0, 1.0, 0.0), tmp_path / "soup", mode=mode)
    assert torch.equal(plain(tmp_path / "soup"), plain(three[1]))


def test_rank_stabilized_adapters_are_merged_by_their_own_scale(base: Path, three: list[Path], tmp_path: Path) -> None:
    stable = tmp_path / "stable"
    Policy.load(three[1]).save(stable)
    config = json.loads((stable / "adapter_config.json").read_text())
    (stable / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert (plain(stable) - plain(three[1])).abs().max() > 0.1  # scale 4 in place of 2
    soup_of([three[0], stable], (0.0, 1.0), tmp_path / "one")
    close(plain(tmp_path / "one"), plain(stable))
    soup_of([three[0], stable], (0.5, 0.5), tmp_path / "soup")
    wanted = peft_of([three[0], stable], base)
    for name, matrix in matrices(adapters.read(tmp_path / "soup")).items():
        layer = layers(wanted)[name]
        close(matrix, 0.5 * layer.get_delta_weight("0") + 0.5 * layer.get_delta_weight("1"))


def test_embeddings_and_transposed_layers_are_merged_too(tmp_path: Path) -> None:
    shape = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "base")
    for seed in range(2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = LoraConfig(r=2 + seed, target_modules=["c_attn", "wpe"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        with quiet():
            adapted: Any = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        adapted.save_pretrained(str(tmp_path / str(seed)))
    paths = [tmp_path / "0", tmp_path / "1"]
    soup_of(paths, (0.5, 0.5), tmp_path / "soup")
    both, one = peft_of(paths, tmp_path / "base"), peft_of([tmp_path / "soup"], tmp_path / "base")
    assert len(layers(one)) == 2
    for name, layer in layers(one).items():
        parts = [layers(both)[name].get_delta_weight(str(index)) for index in range(2)]
        close(layer.get_delta_weight("0"), (parts[0] + parts[1]) / 2)


def test_ingredients_stay_as_they_were(three: list[Path], tmp_path: Path) -> None:
    def digest() -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for path in three for file in sorted(path.iterdir())]

    before, read = digest(), [adapters.read(path) for path in three]
    held = [tensor.clone() for adapter in read for tensor in adapters.tensors(adapter).values()]
    for mode in ("delta", "factor", "svd"):
        adapters.write(adapters.merged(read, WEIGHTS, mode=mode), tmp_path / mode)
    now = [tensor for adapter in read for tensor in adapters.tensors(adapter).values()]
    assert all(map(torch.equal, held, now))
    assert digest() == before


def test_modules_are_compared(three: list[Path], uneven: list[Path]) -> None:
    read = [adapters.read(path) for path in three]
    for row in adapters.compared(read, WEIGHTS, adapters.merged(read, WEIGHTS, mode="delta")).values():
        assert row["error"] < 1e-6
        assert 0.3 < row["cosine"] < 1
    both = (
        matrices(adapters.merged(read, WEIGHTS, mode="factor")),
        matrices(adapters.merged(read, WEIGHTS, mode="delta")),
    )
    found = adapters.compared(read, WEIGHTS, adapters.merged(read, WEIGHTS, mode="factor"))
    for name, row in found.items():
        factor, delta = both[0][name], both[1][name]
        assert row["error"] == pytest.approx(((factor - delta).norm() / delta.norm()).item(), rel=1e-4)
        assert row["cosine"] == pytest.approx(
            torch.cosine_similarity(factor.flatten(), delta.flatten(), 0).item(), abs=1e-5
        )
        assert row["norm_ratio"] == pytest.approx((factor.norm() / delta.norm()).item(), rel=1e-5)
    others = [adapters.read(path) for path in uneven]
    row = next(iter(adapters.compared(others, WEIGHTS, adapters.merged(others, WEIGHTS, mode="svd", rank=1)).values()))
    assert row["cosine"] is None  # several ranks have no factor-wise average
    assert row["error"] > 0.05


# Refusals ----------------------------------------------------------------------------------------------------


def edited(path: Path, folder: Path, change: Callable[[dict], None] | None = None, **config: Any) -> Path:
    """A copy of an adapter folder with other tensors or another config."""
    folder.mkdir()
    tensors = load_file(path / "adapter_model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    before = json.loads((path / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**before, **config}))
    return folder


A_0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


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
    ],
)
def test_adapters_that_are_refused(three: list[Path], tmp_path: Path, change, config, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adapters.read(edited(three[0], tmp_path / "odd", change, **config))
    assert str(tmp_path / "odd") in str(error.value)


def test_a_folder_without_adapters_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole model already"):
        adapters.read(base)
    (edited(three[0], tmp_path / "none") / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="as safetensors"):
        adapters.read(tmp_path / "none")


def drop_layer(tensors: dict) -> None:
    for name in [name for name in tensors if "q_proj" in name]:
        del tensors[name]


def widen(tensors: dict) -> None:
    tensors[A_0] = torch.nn.functional.pad(tensors[A_0], (0, 1))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, {"base_model_name_or_path": "another"}, "different bases, .*base and another"),
        (None, {"revision": "v2"}, "different bases, .* at v2"),
        (None, {"task_type": "SEQ_CLS"}, "differ in task_type: CAUSAL_LM and SEQ_CLS"),
        (None, {"fan_in_fan_out": True}, "differ in fan_in_fan_out"),
        (drop_layer, {}, "different modules: only one has model.layers.0.self_attn.q_proj"),
        (lambda t: t.update({"base_model.model.head.weight": torch.ones(1)}), {}, "only one has head.weight"),
        (widen, {}, r"differ in shapes, model.layers.0.self_attn.q_proj: \(128, 128\) and \(128, 129\)"),
    ],
)
def test_adapters_that_do_not_go_together(three: list[Path], tmp_path: Path, change, config, message: str) -> None:
    odd = edited(three[1], tmp_path / "odd", change, **config)
    with pytest.raises(ValueError, match=message) as error:
        adapters.check_alike([adapters.read(three[0]), adapters.read(odd)])
    assert str(three[0]) in str(error.value)
    assert str(odd) in str(error.value)


def test_factors_want_equal_ranks_and_scales(three: list[Path], uneven: list[Path], tmp_path: Path) -> None:
    read = [adapters.read(path) for path in (three[0], uneven[1])]
    adapters.check_alike(read, mode="delta")
    with pytest.raises(ValueError, match="differ in rank: 4 and 2; mode factor"):
        adapters.check_alike(read, mode="factor")
    other = adapters.read(edited(three[1], tmp_path / "odd", lora_alpha=9))
    with pytest.raises(ValueError, match=r"differ in scale: 2.0 and 2.25"):
        adapters.check_alike([read[0], other], mode="factor")


def test_a_copy_of_the_base_is_the_same_base(three: list[Path], base: Path, tmp_path: Path) -> None:
    adapters.copy_beside(base, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    moved = edited(three[1], tmp_path / "moved", base_model_name_or_path=str(tmp_path / "copy"))
    pair = [adapters.read(three[0]), adapters.read(moved)]
    adapters.check_alike(pair)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(ValueError, match="different bases"):
        adapters.check_alike(pair)


def test_whole_modules_take_weights_of_sum_1(three: list[Path], tmp_path: Path) -> None:
    def head(value: int) -> Callable[[dict], None]:
        return lambda tensors: tensors.update({"base_model.model.head.weight": torch.full((2,), float(value))})

    read = [adapters.read(edited(path, tmp_path / path.name, head(i))) for i, path in enumerate(three, 1)]
    soup = adapters.merged(read, WEIGHTS, mode="delta")
    assert soup.whole["base_model.model.head.weight"].tolist() == pytest.approx([1.7, 1.7])
    with pytest.raises(ValueError, match=r"head.weight is averaged whole, so the weights must sum to 1; .* to 0.5"):
        adapters.merged(read, (0.2, 0.2, 0.1), mode="delta")


# One base, many soups ----------------------------------------------------------------------------------------


def test_a_blend_is_every_soup_that_could_be_saved(uneven: list[Path], tmp_path: Path) -> None:
    blend = Blend.load(uneven)
    memory = {name: parameter.data_ptr() for name, parameter in blend.policy.named_parameters()}
    first = logits(blend.set(WEIGHTS).model)
    for number, weights in enumerate([(0.2, 0.2, 0.6), (0.0, 1.0, 0.0), (0.5, 0.0, 0.5)]):
        found = logits(blend.set(weights).model)
        assert (found - first).abs().max() > 0.1
        soup_of(uneven, weights, tmp_path / str(number))
        close(found, plain(tmp_path / str(number)), within=1e-5)
    assert torch.equal(logits(blend.set(WEIGHTS).model), first)  # the first bits again
    assert {name: parameter.data_ptr() for name, parameter in blend.policy.named_parameters()} == memory


def test_a_blend_at_inner_weights_has_the_bits_of_the_saved_soup(three: list[Path], tmp_path: Path) -> None:
    soup_of(three, WEIGHTS, tmp_path / "soup")
    blend = Blend.load(three)
    blend.set((0.1, 0.1, 0.8))
    assert torch.equal(logits(blend.set(WEIGHTS).model), plain(tmp_path / "soup"))


def test_a_blend_generates_and_is_saved_at_its_weights(uneven: list[Path], tmp_path: Path) -> None:
    blend = Blend.load(uneven)

    def say(policy: Policy) -> Tensor:
        eos = text.end_id(policy.tokenizer)
        return sample(backbone(policy.model), [[6, 7, 8], [9]], eos=eos, k=4, max_new_tokens=8, seed=3).tokens

    for weights in [(0.0, 1.0, 0.0), WEIGHTS]:
        blend.set(weights).save(tmp_path / "saved")
        saved = Policy.load(tmp_path / "saved")
        torch.testing.assert_close(logits(blend.policy.model), logits(saved.model), atol=1e-6, rtol=0)
        assert torch.equal(say(blend.policy), say(saved))
        soup_of(uneven, weights, tmp_path / "soup")
        assert torch.equal(say(blend.policy), say(Policy.load(tmp_path / "soup")))


def test_a_blend_below_its_adapters_is_the_base(three: list[Path], base: Path) -> None:
    policy = Blend.load(three).set((0.3, 0.3, 0.1), normalize=False)
    with policy.without_adapters():
        assert torch.equal(logits(policy.model), logits(AutoModelForCausalLM.from_pretrained(base)))


def test_what_a_blend_refuses(three: list[Path], base: Path, tmp_path: Path) -> None:
    blend = Blend.load(three)
    with pytest.raises(ValueError, match=r"sum to 1\.2"):
        blend.set((0.4, 0.4, 0.4))
    with pytest.raises(ValueError, match="2 weights for 3"):
        blend.set((0.5, 0.5))
    RewardModel.load(base, lora=Lora(lora_rank=2), head_seed=0).save(tmp_path / "reward")
    with pytest.raises(ValueError, match="adapters for SEQ_CLS"):
        Blend.load([tmp_path / "reward", tmp_path / "reward"])
    bare = [edited(path, tmp_path / path.name) for path in three]
    with pytest.raises(ValueError, match="holds no tokenizer") as error:
        Blend.load(bare)
    assert str(bare[0]) in str(error.value)
