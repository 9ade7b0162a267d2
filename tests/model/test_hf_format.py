"""Models in Hugging Face's layout: same logits as transformers, reading rows, rejected variants."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from finetune.hardware import choose_hardware
from finetune.wrapped_model import build_model, open_base_model, shard_rows
from model.args import load_model_args, read_params
from model.errors import UserError
from model.hf_config import config_from_params, params_from_config
from model.hf_format import from_hf, hf_name, mistral_name, open_model_weights, to_hf, write_hf_weights
from model.transformer import Transformer
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.other_engines import transformers_logits

CPU = torch.device("cpu")
SHAPES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / num_attention_heads
    "initializer_range": 0.2,
}
TOKENS = torch.randint(96, (13,), generator=torch.Generator().manual_seed(0)).tolist()
KINDS = ("dense", "tied", "shards", "moe", "fused moe")


def save_with_transformers(folder: Path, kind: str) -> Path:
    """Save a random model with transformers."""
    import transformers

    torch.manual_seed(0)
    if "moe" in kind:
        config = transformers.MixtralConfig(**SHAPES, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.MistralConfig(**SHAPES, sliding_window=None, tie_word_embeddings=kind == "tied")
        model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.1)
    options = {"max_shard_size": "20KB"} if kind == "shards" else {}
    model.save_pretrained(folder, save_original_format=kind != "fused moe", **options)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def hf_model(request, tmp_path_factory) -> Path:
    return save_with_transformers(tmp_path_factory.mktemp("hf"), request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_with_transformers(tmp_path_factory.mktemp("hf"), "dense")


def built(folder: Path) -> Transformer:
    """Build the model that a run would start from."""
    args = TrainArgs(
        data=DataArgs(), model_id_or_path=str(folder), run_dir="", param_dtype="fp32", checkpoint=True, compile=False
    )
    args.lora.enable = False
    base = open_base_model(args)
    return build_model(base, args, choose_hardware(CPU, "fp32", "sdpa", base.args), World(0, 1, CPU))


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(TOKENS), [len(TOKENS)])


def test_logits_match_transformers(hf_model):
    expected = transformers_logits(hf_model, TOKENS)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(built(hf_model)), expected, rtol=0, atol=1e-4)


def test_transformers_saves_every_layout_this_file_tests(tmp_path):
    """If transformers saved differently, the tests of this file would cover less than they claim."""
    names = {kind: set() for kind in KINDS}
    for kind in KINDS:
        files = list(save_with_transformers(tmp_path / kind, kind).glob("*.safetensors"))
        assert (len(files) > 1) == (kind == "shards")
        names[kind] = {name for file in files for name in load_file(file)}
    assert "lm_head.weight" in names["dense"] and "lm_head.weight" not in names["tied"]
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names["moe"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names["fused moe"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_of_all_ranks_form_the_tensor(hf_model, ranks):
    weights = open_model_weights(hf_model)
    for name, shape in weights.shapes.items():
        whole = weights.read(name)
        assert tuple(whole.shape) == shape and whole.is_contiguous()
        rows = [weights.read(name, shard_rows(shape[0], rank, ranks)) for rank in range(ranks)]
        assert torch.cat(rows).equal(whole), name


@pytest.mark.parametrize("rows", [slice(3, 9), slice(7, 8), slice(8, 16), slice(5, 5), slice(40, None), slice(None, 2)])
def test_rows_may_cross_heads(dense, rows):
    weights = open_model_weights(dense)
    name = "layers.1.attention.wq.weight"
    assert weights.read(name, rows).equal(weights.read(name)[rows])


def test_from_hf_inverts_to_hf_and_other_tensors_are_unchanged():
    weight = torch.arange(2 * 6 * 3).view(12, 3)  # two heads of six channels
    for name in ("layers.0.attention.wq.weight", "layers.3.attention.wk.lora_B.weight"):
        reordered = to_hf(name, weight, 6)
        assert reordered[:6, 0].tolist() == [0, 6, 12, 3, 9, 15]  # channels 0, 2, 4, then 1, 3, 5
        assert from_hf(name, reordered, 6).equal(weight)
    for name in ("layers.0.attention.wv.weight", "layers.0.attention.wq.lora_A.weight", "output.weight"):
        assert to_hf(name, weight, 6) is weight and from_hf(name, weight, 6) is weight


@pytest.mark.parametrize("moe", [False, True])
def test_mistral_name_inverts_hf_name(tmp_path, moe):
    names = list(load_file(make_tiny_checkpoint(tmp_path, moe=moe) / "consolidated.safetensors"))
    assert [mistral_name(hf_name(name)) for name in names] == names
    assert len({hf_name(name) for name in names}) == len(names)
    assert all(hf_name(name) != name for name in names)


def test_conversion_to_hugging_face_and_back_is_bit_identical(tmp_path):
    base = make_tiny_checkpoint(tmp_path / "base", dim=32, hidden_dim=48, vocab_size=64)
    weights = open_model_weights(base)
    for limit, sharded in ((10**9, False), (8_000, True)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        write_hf_weights(folder, weights, load_model_args(base).head_dim, limit)
        config = config_from_params(read_params(base), "bfloat16")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert (len(list(folder.glob("model*.safetensors"))) > 1) == sharded
        assert all(file.stat().st_size < limit + 2_000 for file in folder.glob("model*.safetensors"))
        again = open_model_weights(folder)
        assert again.shapes == weights.shapes and again.dtypes == weights.dtypes
        assert all(again.read(name).equal(weights.read(name)) for name in weights.shapes)
        assert load_model_args(folder) == load_model_args(base)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)


@pytest.fixture(params=["dense", "moe", "tied"])
def both_layouts(request, tmp_path) -> Path:
    """A folder as Mistral publishes it: params.json with consolidated weights, config.json with model*.safetensors."""
    folder = save_with_transformers(tmp_path / "both", request.param)
    weights = open_model_weights(folder)
    tensors = {name: weights.read(name) for name in weights.shapes}
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(read_params(folder)), encoding="utf-8")
    return folder


def test_the_same_weights_in_both_layouts_are_read_from_mistrals(both_layouts, caplog):
    caplog.set_level("INFO", "weights")
    assert open_model_weights(both_layouts).source == both_layouts / "consolidated.safetensors"
    (said,) = caplog.messages
    assert "has the same weights in consolidated.safetensors and model" in said
    (both_layouts / "model.safetensors").unlink()
    (both_layouts / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    )
    assert open_model_weights(both_layouts).source == both_layouts / "consolidated.safetensors"


@pytest.mark.parametrize("name", ["layers.1.attention.wq.weight", "norm.weight", "output.weight"])
@pytest.mark.parametrize("row", [0, -1])
def test_different_weights_in_two_layouts_are_refused(both_layouts, name, row):
    file = both_layouts / "consolidated.safetensors"
    tensors = load_file(file)
    tensors[name][row] += 1
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=rf"two different .* {name} is not the same in consolidated.* and model.safeten"
    ):
        open_model_weights(both_layouts)
    file.unlink()
    assert open_model_weights(both_layouts).source == both_layouts


def test_other_shapes_or_tensors_in_two_layouts_are_refused(both_layouts):
    file = both_layouts / "consolidated.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"norm.weight": torch.ones(31)}, file)
    with pytest.raises(UserError, match=r"norm.weight is not the same in"):
        open_model_weights(both_layouts)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, file)
    with pytest.raises(UserError, match=r"layers.1.attention.wk.weight is not the same in"):
        open_model_weights(both_layouts)


def test_pickled_weights_next_to_safetensors_must_be_the_same(dense, tmp_path):
    folder = Path(shutil.copytree(dense, tmp_path / "dense"))
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert open_model_weights(folder).source == folder
    tensors["model.norm.weight"][3] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"norm.weight is not the same in model.safetensors and pytorch_model.bin"):
        open_model_weights(folder)


def sharded(folder: Path) -> Path:
    return save_with_transformers(folder / "shards", "shards")


def test_a_single_file_next_to_shards_is_refused(dense, tmp_path):
    folder = sharded(tmp_path)
    shutil.copyfile(dense / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors and \d+ shards model-00001-of-.*: keep only the weights"):
        open_model_weights(folder)


def test_an_index_must_name_the_files_that_are_there(dense, tmp_path):
    folder = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text(encoding="utf-8"))
    file = sorted(folder.glob("model-*.safetensors"))[0].name
    kept = {name: other for name, other in whole["weight_map"].items() if other != file}
    index.write_text(json.dumps(whole | {"weight_map": kept}), encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"{index.name} does not name {file}: the index or the weights are out of date"
    ):
        open_model_weights(folder)
    index.unlink()
    assert open_model_weights(folder).source == folder  # complete by their numbers
    single = Path(shutil.copytree(dense, tmp_path / "single"))
    (single / index.name).write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{index.name} names {file}, .*not in the folder"):
        open_model_weights(single)
    (single / index.name).write_text('{"weight_map": {"a": "model.safetensors"}}', encoding="utf-8")
    assert open_model_weights(single).source == single


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_cannot_be_read_is_refused(tmp_path, content):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"index.json cannot be read as an index"):
        open_model_weights(folder)


def test_shards_of_two_sets_are_refused(tmp_path):
    folder = sharded(tmp_path)
    extra = folder / "model-00001-of-00099.safetensors"
    shutil.copyfile(sorted(folder.glob("model-*.safetensors"))[0], extra)
    with pytest.raises(UserError, match=r"missing or unexpected"):
        open_model_weights(folder)


def test_tied_embeddings_in_mistrals_layout(tmp_path):
    base = make_tiny_checkpoint(tmp_path, dim=32, hidden_dim=48, vocab_size=64)
    tensors = load_file(base / "consolidated.safetensors")
    del tensors["output.weight"]
    save_file(tensors, base / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"output.weight is missing"):
        built(base)
    params = json.loads((base / "params.json").read_text(encoding="utf-8"))
    (base / "params.json").write_text(json.dumps(params | {"tied_embeddings": True}), encoding="utf-8")
    model = built(base)
    assert model.output.weight.equal(model.tok_embeddings.weight)
    assert model.output.weight is not model.tok_embeddings.weight


def test_rotary_tables_in_old_files_are_ignored(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    assert logits_of(built(tmp_path)).equal(logits_of(built(dense)))


def changed_config(dense: Path, folder: Path, **changes) -> Path:
    config = json.loads((dense / "config.json").read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not (folder / "model.safetensors").exists():
        os.link(dense / "model.safetensors", folder / "model.safetensors")
    return folder


def test_rope_theta_is_read_from_either_place(dense, tmp_path):
    old = changed_config(dense, tmp_path, rope_parameters="absent", rope_theta=5e5, rope_scaling=None)
    assert load_model_args(old).rope_theta == 5e5
    new = changed_config(dense, tmp_path, rope_parameters={"rope_theta": 7e5, "rope_type": "default"})
    assert load_model_args(new).rope_theta == 7e5


def test_missing_head_dim_is_derived(dense, tmp_path):
    for absent in (None, "absent"):
        folder = changed_config(dense, tmp_path, head_dim=absent, num_attention_heads=4)
        assert load_model_args(folder).head_dim == 8
    with pytest.raises(UserError, match=r"config.json: `hidden_size` 32 is not a multiple of `num_attention_heads` 6"):
        load_model_args(changed_config(dense, tmp_path, head_dim=None))


REFUSED = {
    "another architecture": ({"model_type": "llama"}, r"config.json: `model_type` is 'llama'; expected mistral or mix"),
    "sliding window": ({"sliding_window": 1024}, r"over 1024 tokens \(`sliding_window`\).* set `seq_len`"),
    "interleaved window": ({"layer_types": ["sliding_attention", "full_attention"]}, "`layer_types` is"),
    "activation": ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config` is"),
    "scaled rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "`rope_parameters` is 'yarn'"),
    "old scaled rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "`rope_parameters` is 'linear'"),
    "missing keys": ({"vocab_size": "absent", "hidden_size": None}, "lacks hidden_size, vocab_size"),
    "a string": ({"vocab_size": "many"}, r"config.json: `vocab_size` is 'many'; expected a positive number"),
    "heads": (
        {"num_key_value_heads": 4},
        r"config.json: `num_attention_heads` \(6\) is not a multiple of `num_key_value_heads` \(4\)",
    ),
    "a number of layers": (
        {"num_hidden_layers": 1.5},
        "config.json: `num_hidden_layers` is 1.5; expected a whole number",
    ),
    "shapes": (
        {"intermediate_size": 40},
        r"config.json: .*feed_forward.w1.weight is \[48, 32\], expected \[40, 32\] \(`intermediate_size`\)",
    ),
    "vocabulary": (
        {"vocab_size": 98},
        r"tok_embeddings.weight is \[96, 32\], expected \[98, 32\] \(`vocab_size`\)",
    ),
    "heads of another width": (
        {"head_dim": 16},
        r"wq.weight is \[48, 32\], expected \[96, 32\] \(`num_attention_heads`, `head_dim`\)",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_unsupported_models_are_rejected(dense, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        built(changed_config(dense, tmp_path, **changes))


def test_missing_shards_and_weights_are_reported(tmp_path):
    folder = save_with_transformers(tmp_path, "shards")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"missing or unexpected: {lost.name}"):
        built(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match=r"contains no weights in Mistral's layout.*model\*.safetensors with a config"):
        built(folder)


def test_missing_and_unknown_tensors_are_reported(dense, tmp_path):
    folder = changed_config(dense, tmp_path)
    tensors = load_file(dense / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.feed_forward.w3.weight is missing; .*bias is not part of the model"):
        built(folder)


def test_config_and_params_convert_into_each_other():
    params = {"dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2}
    params |= {"norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 1e6, "max_position_embeddings": 1024}
    for moe in ({}, {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}):
        config = config_from_params(params | moe, "bfloat16")
        assert params_from_config(Path("config.json"), config) == params | moe
