"""Runs that start from causal models and from upstream's files: the same numbers come out, no pickle is run."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import bd3_ds
from bd3_ds.checkpoint.export import fit_weights
from bd3_ds.commands import convert as convert_command
from bd3_ds.config.load import override
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.interop.init_from import find_start, starting_weights
from bd3_ds.model.build import dit_config, initialise
from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.runtime.errors import UserError
from bd3_ds.train.preflight import preflight
from tests.helpers.tiny import tiny_export, tiny_run
from tests.unit.interop.test_convert import config_of, their_name, upstream_folder

GPT2 = (
    "model.biases=[norm,qkv,out,mlp] model.positions=learned model.max_positions=20 model.tie_embeddings=true "
    "model.vocab_multiple=8"
)
LLAMA = "model.norm=rmsnorm model.norm_eps=1e-6 model.biases=[] model.mlp=swiglu model.mlp_size=48 model.kv_heads=2"


def causal_model(kind, **changes):
    import_streaming()  # which mends torchvision, that transformers imports too
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20, "vocab_size": 80}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, **changes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 48, "vocab_size": 80, "bos_token_id": 0, "eos_token_id": 1}
        names = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}
        config = getattr(transformers, f"{names[kind]}Config")(**sizes | changes)
        model = getattr(transformers, f"{names[kind]}ForCausalLM")(config)
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, 0.2, 0.3)
    return model.eval()


def started(run):
    """The run's network with the weights that it starts from."""
    assert find_start(run).problems(run) == []
    model = DiT(dit_config(run.model, run.objective.name))
    initialise(model, 1)
    weights, said = starting_weights(find_start(run), model)
    fit_weights(model, weights, "test")
    return model.eval(), said


CASES = [
    ("gpt2", GPT2, {}),
    pytest.param(
        "gpt2",
        GPT2 + " model.mlp=gelu_erf model.mlp_size=40",
        {"activation_function": "gelu", "n_inner": 40},
        marks=pytest.mark.slow,
    ),
    ("llama", LLAMA, {}),
    ("llama", LLAMA + " model.tie_embeddings=true", {"tie_word_embeddings": True}),
    (
        "llama",
        LLAMA + " model.biases=[qkv,out,mlp] model.rope_base=500",
        {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0},
    ),
    pytest.param("qwen2", LLAMA + " model.biases=[qkv]", {}, marks=pytest.mark.slow),
    pytest.param("mistral", LLAMA, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, words, changes", CASES)
def test_causal_models_compute_the_same(tmp_path, kind, words, changes):
    """As AR run, in every backend and with a cache; as BD3 run of block size 1, whose mask is then causal."""
    theirs = causal_model(kind, **changes)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="12KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    words = [f"train.init_from={tmp_path / 'hf'}", "model.heads=4", *words.split()]
    words = list({word.partition("=")[0]: word for word in words}.values())
    text = torch.randint(0, 80, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(text).logits
        for backend in ("dense", "sdpa", "stripes"):
            run = tiny_run(tmp_path, *words, "objective.name=ar", "objective.block_size=null", model__attention=backend)
            model, said = started(run)
            torch.testing.assert_close(model(text, block_size=1)[..., :80], expected, atol=1e-4, rtol=1e-5)
        cache = KVCache(2)
        parts = [model.decode(text[:, i : i + 8], cache, start=i, block_size=1) for i in (0, 8)]
        torch.testing.assert_close(torch.cat(parts, 1)[..., :80], expected, atol=1e-4, rtol=1e-5)
        run = tiny_run(tmp_path, *words, objective__block_size=1)
        assert preflight(run, 1)[0] == run
        model, said = started(run)
        adapted = model(text, text, block_size=1)
        torch.testing.assert_close(adapted[..., :80], expected, atol=1e-4, rtol=1e-5)
        mean = model.embed.weight[:80].mean(0)
        torch.testing.assert_close(model.embed.weight[80], mean)
        assert run.model.mask_id == 80 and "[MASK] (id 80) is the mean" in said
        cache = model.encode(text[:, :8], KVCache(2), block_size=1)
        one = model.decode(text[:, 8:9], cache, start=8, block_size=1)
        torch.testing.assert_close(one[..., :80], expected[:, 8:9], atol=1e-4, rtol=1e-5)


def test_converted_causal_models(tmp_path):
    theirs = causal_model("gpt2")
    theirs.save_pretrained(tmp_path / "hf")
    assert convert_command.main(["--from", "hf", str(tmp_path / "hf"), str(tmp_path / "dst")]) == 0
    model = bd3_ds.load(str(tmp_path / "dst"))
    assert (model.run.objective.name, model.mask_id, model.run.data.length) == ("ar", 80, 20)
    text = torch.randint(0, 80, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(text)[..., :80], theirs(text).logits, atol=1e-4, rtol=1e-5)
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt3"}')
    with pytest.raises(UserError, match="model_type=gpt3"):
        convert_command.main(["--from", "hf", str(tmp_path / "hf"), str(tmp_path / "other")])


def test_what_does_not_fit_is_named(tmp_path):
    causal_model("llama").save_pretrained(tmp_path / "hf")
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'hf'}")
    with pytest.raises(UserError) as refused:
        preflight(run, 1)
    (sentence,) = refused.value.messages
    for word in ("model.heads=4", "model.norm=rmsnorm", "model.mlp=swiglu", "model.mlp_size=48", "model.biases=[]"):
        assert word in sentence
    assert "model.layers" not in sentence and "heads=2" in sentence.partition("this run has")[2]


@pytest.mark.parametrize(
    "kind, changes, sentence",
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"head_dim": 16}, "head_dim"),
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"vocab_size": 79}, "has 79 tokens"),
        ("llama", {"vocab_size": 5000}, "has 5000 tokens"),
        ("llama", {"vocab_size": 96, "pad_token_id": 80}, "id 80 as its pad_token_id"),
    ],
)
def test_other_models_are_refused(tmp_path, kind, changes, sentence):
    causal_model(kind, **changes).save_pretrained(tmp_path / "hf")
    words = LLAMA if kind != "gpt2" else GPT2
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'hf'}", "model.heads=4", *words.split())
    with pytest.raises(UserError, match=sentence):
        preflight(run, 1)


def test_padding_rows_are_no_mask(tmp_path):
    """A source with rows beyond its tokens: that of [MASK] is made anew, the rest is left out."""
    theirs = causal_model("llama", vocab_size=96)
    theirs.save_pretrained(tmp_path / "hf")
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'hf'}", "model.heads=4", *LLAMA.split())
    model, _ = started(run)
    source = theirs.model.embed_tokens.weight
    torch.testing.assert_close(model.embed.weight[80], source[:80].mean(0))
    assert torch.equal(model.embed.weight[:80], source[:80]) and len(model.embed.weight) == 81
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state["model.embed_tokens.weight"][:] = 1.0
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="degenerate"):
        started(run)


def test_pickles_of_models_are_refused(tmp_path):
    causal_model("llama").save_pretrained(tmp_path / "hf", safe_serialization=False)
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'hf'}", "model.heads=4", *LLAMA.split())
    with pytest.raises(UserError, match=r"pickles .* are not read"):
        preflight(run, 1)


class Foreign:
    """Stands for OmegaConf's objects in upstream's hyper-parameters."""

    def __init__(self):
        self.content = {"model": {"length": 16}}


def lightning_file(path, network, average):
    names = [name for name, _ in network.named_parameters()]
    state = {f"backbone.{their_name(name)}": torch.zeros_like(network.get_parameter(name)) for name in names}
    state["backbone.rotary_emb.inv_freq"] = torch.ones(4)
    if not average:
        state |= {f"backbone.{their_name(name)}": p.detach().clone() for name, p in network.named_parameters()}
    content = {"state_dict": state, "hyper_parameters": {"config": Foreign()}, "epoch": 1, "loops": [Foreign()]}
    if average:
        content["ema"] = {"decay": 0.999, "shadow_params": [p.detach().clone() for p in network.parameters()]}
    torch.save(content, path)


@pytest.mark.parametrize("average", [True, False])
def test_lightning_files(tmp_path, average):
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'last.ckpt'}")
    source = DiT(dit_config(run.model, "bd3"))
    torch.manual_seed(0)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    lightning_file(tmp_path / "last.ckpt", source, average)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    model, said = started(run)
    assert ("averaged weights (EMA)" in said, "no EMA stored" in said) == (average, not average)
    for name, parameter in source.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    for words, sentence in (
        ("model.layers=3", "model.layers=2, this run has 3"),
        ("model.cond_size=8", "cond_size=16"),
    ):
        with pytest.raises(UserError, match=sentence):
            preflight(override(run, [words], ("model.",)), 1)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_hostile_pickle_does_nothing(tmp_path):
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'evil.ckpt'}")
    touched = tmp_path / "touched"
    torch.save(
        {"state_dict": {"backbone.a": Hostile(str(touched))}, "x": Hostile(str(touched))}, tmp_path / "evil.ckpt"
    )
    with pytest.raises(UserError, match="not a weight that upstream's models have"):
        preflight(run, 1)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Hostile(str(touched)))).close()
    assert touched.exists()  # it would have, had it been run


def test_files_that_are_no_checkpoints(tmp_path):
    run = tiny_run(tmp_path, f"train.init_from={tmp_path / 'x.ckpt'}")
    (tmp_path / "x.ckpt").write_bytes(b"no zip")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        preflight(run, 1)
    for content in (b"garbage", b"\x80\x02]q\x00(K\x01", pickle.dumps({"state_dict": {}})):
        with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
            archive.writestr("archive/data.pkl", content)
        with pytest.raises(UserError, match=r"pickle that cannot be read|damaged|no weights"):
            preflight(run, 1)


def test_upstream_folders_and_exports(tmp_path):
    run = tiny_run(tmp_path)
    source = DiT(dit_config(run.model, "bd3"))
    torch.manual_seed(0)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    sizes = {"model_length": 16, "vocab_size": 81, "hidden_dim": 32, "cond_dim": 16}
    weights = {f"backbone.{their_name(name)}": p.detach() for name, p in source.named_parameters()}
    upstream_folder(tmp_path / "up", config_of("bd3", **sizes), weights)
    model, said = started(override(run, [f"train.init_from={tmp_path / 'up'}"], ("train.",)))
    assert "upstream's weights" in said
    assert all(torch.equal(model.get_parameter(name), p) for name, p in source.named_parameters())

    tied = override(run, ["model.tie_embeddings=true"], ("model.",))
    export = tiny_export(tied)
    assert "head.linear.weight" not in load_file(export / "model.safetensors")
    model, _ = started(override(tied, [f"train.init_from={export}"], ("train.",)))
    assert model.head.linear.weight is model.embed.weight
    with pytest.raises(UserError, match=r"model.tie_embeddings=true, this run has false"):
        preflight(override(run, [f"train.init_from={export}"], ("train.",)), 1)
