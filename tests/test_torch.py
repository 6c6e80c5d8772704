# SPDX-License-Identifier: Apache-2.0
"""Our exports in torch, transformers and peft; their adapters' arithmetic against ours.

`make test-torch` sets up an environment for this (.venv-torch). The names that peft meets there
are those of transformers 5, so adapters are written with that layout.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_batches import golden_batch, load_npz
from safetensors.numpy import load_file

from vlm2vec_jax.models.loading import add_adapter, flatten, load_model, replace_saved
from vlm2vec_jax.models.phi3v import config as phi3v_config
from vlm2vec_jax.models.phi3v.weights import table as phi3v_table
from vlm2vec_jax.nn.compute import Compute
from vlm2vec_jax.nn.dropout import keep_mask
from vlm2vec_jax.nn.linear import Linear, refresh_dora_norms
from vlm2vec_jax.weights.adapters import load_adapter, merge
from vlm2vec_jax.weights.export import export_hf, export_peft
from vlm2vec_jax.weights.load import load_host
from vlm2vec_jax.weights.safetensors import Checkpoint, write
from vlm2vec_jax.weights.sentence_transformers import chat_template

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
EXACT = Compute("float32")
MODEL = "tiny_mha"
VISION = "model.vision_embed_tokens.img_processor."
NAMES = ["tiny_mha_lora_r8", "tiny_mha_dora_r8", "tiny_mha_lora_r16", "tiny_mha_dora_r16"]


def said(what: str, value: float) -> None:
    """The figures of docs/weights.md: `pytest -m torch -s` prints them."""
    print(f"MEASURED {what}: {value:.1e}")


@pytest.fixture(scope="module")
def base(goldens):
    """(folder, table, leaves)"""
    folder = goldens / MODEL
    table = phi3v_table(phi3v_config.from_hf(folder))
    with Checkpoint(folder) as checkpoint:
        return folder, table, load_host(checkpoint, table)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """Tensors of our full export."""
    folder, table, leaves = base
    out = export_hf(leaves, table, folder, tmp_path_factory.mktemp("full") / "out", record={})
    return load_file(out / "model.safetensors")


def torch_model(folder, tensors):
    """transformers' own decoder and tower in the published model's tree, loaded strictly."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3Model

    raw = json.loads((folder / "config.json").read_text())
    fields = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size rms_norm_eps max_position_embeddings original_max_position_embeddings"
    ).split()
    rope = {
        "rope_type": "longrope",
        "rope_theta": raw["rope_theta"],
        "short_factor": raw["rope_scaling"]["short_factor"],
        "long_factor": raw["rope_scaling"]["long_factor"],
        "original_max_position_embeddings": raw["original_max_position_embeddings"],
        "factor": raw["max_position_embeddings"] / raw["original_max_position_embeddings"],
    }
    decoder = Phi3Model(
        Phi3Config(
            **{name: raw[name] for name in fields},
            rope_parameters=rope,
            pad_token_id=raw["pad_token_id"],
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
    )
    vision = json.loads((folder / "clip_config.json").read_text())
    tower = CLIPVisionModel(CLIPVisionConfig(**vision, attn_implementation="eager"))
    parts = {"model.": (decoder, "vision_embed"), f"{VISION}vision_model.": (tower, "nothing")}
    for prefix, (module, other) in parts.items():
        own = {
            name.removeprefix(prefix): torch.from_numpy(array.copy())
            for name, array in tensors.items()
            if name.startswith(prefix) and not name.removeprefix(prefix).startswith(other)
        }
        module.load_state_dict(own, strict=True)

    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = decoder
            self.model.vision_embed_tokens = torch.nn.Module()
            self.model.vision_embed_tokens.img_processor = tower

    return Reference().eval()


def torch_states(reference, ids, pixels):
    """(after every decoder layer, final norm last; tower's hidden states), numpy."""
    import torch

    inner = getattr(reference, "base_model", reference)
    inner = getattr(inner, "model", inner) if hasattr(inner, "peft_config") else inner
    with torch.no_grad():
        text = inner.model(torch.from_numpy(ids), output_hidden_states=True)
        seen = inner.model.vision_embed_tokens.img_processor(
            torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True
        )
    return [s.numpy() for s in text.hidden_states], [s.numpy() for s in seen.hidden_states]


def our_states(model, goldens, ids, pixels):
    golden = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch = golden_batch(model.config, golden)
    module = model.module
    refresh_dora_norms(module)
    x = module.input_embeddings(batch, EXACT)
    states = module.decoder.hidden_states(x, module.decoder.places(batch, "short"), EXACT)
    text = [x, *states[:-1], module.decoder.norm(states[-1])]
    return list(map(np.asarray, text)), list(
        map(np.asarray, module.vision.clip.hidden_states(jnp.asarray(pixels), EXACT))
    )


@pytest.fixture(scope="module")
def inputs(goldens):
    """Token ids [1, T] and pixels [1, 336, 336, 3]."""
    golden = load_npz(goldens / "forward" / MODEL / "text_single.npz")
    rng = np.random.default_rng(0)
    return golden["input_ids"], rng.normal(size=(1, 336, 336, 3)).astype(np.float32)


def largest(found, wanted) -> float:
    assert len(found) <= len(wanted)  # ours leaves out the tower's last layer, which nobody uses
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted))


def test_full_exports_load_strictly_and_compute_the_same(base, exported, goldens, inputs):
    folder, _, _ = base
    theirs = torch_states(torch_model(folder, exported), *inputs)
    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    ours = our_states(model, goldens, *inputs)
    for what, a, b in zip(("Phi3Model", "CLIPVisionModel"), ours, theirs):
        said(f"{what}, hidden states, full export", largest(a, b))
        assert len(a) >= 3 and largest(a, b) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_our_adapters(base, exported, goldens, inputs, tmp_path, name):
    import peft

    folder, table, leaves = base
    adapter = load_adapter(goldens / "adapters" / name, table, leaves)
    out = export_peft(
        adapter.tensors, table, adapter.config, tmp_path / "out", record={}, base="b", layout="5"
    )
    reference = torch_model(folder, exported)
    before = torch_states(reference, *inputs)
    theirs_model = peft.PeftModel.from_pretrained(reference, str(out))
    stored = peft.utils.save_and_load.get_peft_model_state_dict(theirs_model)
    written = load_file(out / "adapter_model.safetensors")
    assert set(stored) == set(written)
    assert all(np.array_equal(stored[n].numpy(), a) for n, a in written.items())
    theirs = torch_states(theirs_model, *inputs)
    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    add_adapter(
        model.module, adapter.linears, dora=adapter.config.dora, dropout=0.0,
        tensors=adapter.tensors,
    )  # fmt: skip
    ours = our_states(model, goldens, *inputs)
    for what, a, b, plain in zip(("decoder", "tower"), ours, theirs, before):
        said(f"{what}, hidden states, {name} in peft", largest(a, b))
        assert largest(a, b) < 5e-5
        assert largest(plain[: len(a)], b) > 1e-2  # the adapter does something there
    merged = theirs_model.merge_and_unload()
    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    check_merged(merged, merge(leaves, adapter.tensors, scaling), table, name)


def check_merged(reference, merged, table, name):
    gaps = []
    for key, value in reference.state_dict().items():
        slot = table.slots[table.canonical(key)]
        leaf = merged[slot.rule.ours]
        ours = slot.rule.to_hf(leaf if slot.layer is None else leaf[slot.layer])
        gaps.append(float(np.abs(ours - value.numpy()).max()))
    said(f"merged weights, {name}", max(gaps))
    assert max(gaps) < 2e-6


@pytest.mark.parametrize("dora", [False, True])
def test_ranks_of_single_modules_and_saved_modules_in_peft(base, exported, tmp_path, dora):
    import peft
    from test_weights_forms import uneven, write_adapter

    folder, table, leaves = base
    settings, adapted, _ = uneven(table, exported, dora=dora)
    rng = np.random.default_rng(3)
    saved = {f"model.layers.{i}.input_layernorm.weight": None for i in range(3)}
    saved = {n: rng.normal(size=exported[n].shape).astype(np.float32) for n in saved}
    settings["modules_to_save"] = ["input_layernorm"]
    made = write_adapter(tmp_path / "made", adapted | saved, **settings)
    adapter = load_adapter(made, table, leaves)
    out = export_peft(
        adapter.tensors, table, adapter.config, tmp_path / "out", record={}, base="b",
        saved=adapter.saved, layout="5",
    )  # fmt: skip
    reference = peft.PeftModel.from_pretrained(torch_model(folder, exported), str(out))
    stored = peft.utils.save_and_load.get_peft_model_state_dict(reference)
    assert set(stored) == set(load_file(out / "adapter_model.safetensors"))
    model = load_model(folder, dtype_of=lambda path: jnp.float32)
    replace_saved(model, adapter.saved)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(model.module).items()}
    scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
    kind = "DoRA" if dora else "rsLoRA"
    merged = merge(flat, adapter.tensors, scaling)
    check_merged(reference.merge_and_unload(), merged, table, f"{kind} of several ranks")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True])
def test_one_layer_forward_gradients_and_merge(dora, dropout, bias):
    import peft
    import torch
    from flax import nnx

    rng = np.random.default_rng(7)
    fan_in, fan_out, rank, alpha = 24, 40, 4, 10
    w, a, b = (
        rng.normal(size=shape).astype(np.float32) / 4
        for shape in ((fan_out, fan_in), (rank, fan_in), (fan_out, rank))
    )
    m = rng.uniform(0.5, 2, fan_out).astype(np.float32)
    x, g = (rng.normal(size=(3, 5, n)).astype(np.float32) for n in (fan_in, fan_out))

    torch_root = torch.nn.Sequential()
    torch_root.proj = torch.nn.Linear(fan_in, fan_out, bias=bias)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["proj"], use_dora=dora
    )
    theirs = peft.get_peft_model(torch_root, config)
    layer = theirs.base_model.model.proj
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.from_numpy(w))
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(b))
        if dora:
            layer.lora_magnitude_vector["default"].weight.copy_(torch.from_numpy(m))

    linear = Linear(fan_in, fan_out, bias=bias, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.asarray(w.T)
    if bias:
        linear.bias[...] = jnp.asarray(layer.base_layer.bias.detach().numpy())
    leaves = {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T)}
    leaves |= {"magnitude": jnp.asarray(m)} if dora else {}
    linear.set_adapter(leaves, scale=alpha / rank, dropout=dropout)
    key = jax.random.key(5) if dropout else None
    if dropout:
        keep = np.asarray(keep_mask(key, dropout, x.shape))

        class SameMask(torch.nn.Module):
            def forward(self, value):
                return value * torch.from_numpy(keep) / (1 - dropout)

        layer.lora_dropout["default"] = SameMask()
    theirs.train()
    given = torch.from_numpy(x).requires_grad_()
    out = layer(given)
    (out * torch.from_numpy(g)).sum().backward()

    graphdef, params, rest = nnx.split(linear, nnx.LoRAParam, ...)

    def objective(params, value):
        y = nnx.merge(graphdef, params, rest)(value, key)
        return jnp.sum(y * g), y

    grads, ours = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, jnp.asarray(x))
    kind = f"{'DoRA' if dora else 'LoRA'}{', dropout' if dropout else ''}"
    gap = float(np.abs(np.asarray(ours) - out.detach().numpy()).max())
    said(f"{kind}, forward", gap)
    assert gap < 2e-5
    found = {path[-1]: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads[0])}
    wanted = {
        "lora_a": layer.lora_A["default"].weight.grad.numpy().T,
        "lora_b": layer.lora_B["default"].weight.grad.numpy().T,
    }
    if dora:
        wanted["magnitude"] = layer.lora_magnitude_vector["default"].weight.grad.numpy()
    assert set(found) == set(wanted)
    found["x"], wanted["x"] = np.asarray(grads[1]), given.grad.numpy()
    share = max(float(np.abs(found[n] - wanted[n]).max() / np.abs(wanted[n]).max()) for n in wanted)
    said(f"{kind}, gradients, relative", share)
    assert share < 1e-5
    merged = theirs.merge_and_unload().proj.weight.detach().numpy()
    tensors = {f"x/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
    mine = merge({"x/kernel": w.T}, tensors, {"x": alpha / rank})["x/kernel"]
    said(f"{kind}, merged weight", float(np.abs(mine - merged.T).max()))
    np.testing.assert_allclose(mine, merged.T, rtol=0, atol=2e-6)


def test_safetensors_of_torch_and_ours_are_one_format(tmp_path):
    import torch
    from safetensors.torch import load_file as torch_load

    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(tmp_path, [("x", array), ("y", array.astype(ml_dtypes.bfloat16))])
    found = torch_load(tmp_path / "model.safetensors")
    assert torch.equal(found["x"], torch.from_numpy(array))
    assert found["y"].dtype == torch.bfloat16 and torch.equal(found["y"].float(), found["x"])


def test_the_raw_chat_template():
    import jinja2

    render = jinja2.Environment().from_string(chat_template("<|image_pad|>")).render

    def user(*parts):
        return {"role": "user", "content": list(parts)}

    def text(words):
        return {"type": "text", "text": words}

    image = {"type": "image", "image": object()}
    system = {"role": "system", "content": [text("Represent the image: ")]}
    assert render(messages=[user(text("A cat"))]) == "A cat"
    assert render(messages=[{"role": "user", "content": "A cat"}]) == "A cat"
    assert render(messages=[user(image)]) == "<|image_pad|>"
    assert render(messages=[user(image, text("\nWhat?"))]) == "<|image_pad|>\nWhat?"
    both = [system, user(text("What?"), image, image)]
    assert render(messages=both) == "<|image_pad|><|image_pad|> Represent the image: What?"
    assert render(messages=[system, user(text("x"))]) == "Represent the image: x"
