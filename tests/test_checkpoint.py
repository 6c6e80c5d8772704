# SPDX-License-Identifier: Apache-2.0
"""checkpoint.py: round trips over meshes, damage of every kind, saves that fail."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.training.checkpoint import Checkpoints

P = PartitionSpec
BY_INPUT = P(None, "fsdp")

# Tensorstore calls back into orbax's closed event loop after a read that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _numbers(seed):
    rng = np.random.default_rng(seed)
    return {
        "decoder/layers/attn/qkv/kernel": rng.normal(size=(2, 8, 24)).astype(np.float32),
        "decoder/norm/scale": rng.normal(size=8).astype(np.float32),
    }


def _state(seed, mesh=None, spec=BY_INPUT):
    """Parameters, optimizer, a bf16 leaf, a typed key: what a run keeps."""
    mesh = mesh or make_mesh(fsdp=8)

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 3 else P()))

    params = {path: put(x) for path, x in _numbers(seed).items()}
    moments = {path: put(2 * x) for path, x in _numbers(seed).items()}
    adam = optax.ScaleByAdamState(put(np.int32(seed)), moments, jax.tree.map(jnp.square, moments))
    return {
        "params": params,
        "opt_state": adam,
        "low": put(np.arange(4).astype(jnp.bfloat16)),
        "key": jax.device_put(jax.random.key(seed), NamedSharding(mesh, P())),
    }


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _plain(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x)


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(_plain(x), _plain(y))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def _fill(folder, *steps, **options):
    with Checkpoints(folder, **{"keep": 3, "every": 1} | options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, _state(step), {"lr": step / 10})


def test_saved_on_eight_devices_restored_on_four(folder):
    with Checkpoints(folder, keep=2, every=2) as checkpoints:
        assert checkpoints.restore_latest(_state(0)) is None
        assert [checkpoints.save(step, _state(step), {"n": [step]}) for step in range(1, 7)] == [
            False,
            True,
        ] * 3
        assert checkpoints.save(7, _state(7, spec=P(None, None, "fsdp")), {"n": [7]}, force=True)
        assert not checkpoints.save(7, _state(7), {}, force=True)
    four = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    abstract = _abstract(_state(0, four, P(None, "fsdp", "tensor")))
    with Checkpoints(folder, keep=2, every=2) as checkpoints:
        assert checkpoints.steps() == [6, 7]
        step, state, meta = checkpoints.restore_latest(abstract)
        assert checkpoints.read_meta() == meta == {"n": [7]}
        assert checkpoints.read_meta(6) == {"n": [6]}
        assert checkpoints.read_meta(5) is None
        older, _ = checkpoints.restore(6, abstract)
    assert step == 7
    _assert_equal(state, _state(7))
    _assert_equal(older, _state(6))
    kernel = state["params"]["decoder/layers/attn/qkv/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 12)


def test_arrays_may_be_donated_while_they_are_written(folder):
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    with Checkpoints(folder, every=1) as checkpoints:
        for step in (1, 2):
            state = {"w": jnp.full((256, 256), float(step))}
            checkpoints.save(step, state, {})
            jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        _, state, _ = checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((256, 256), "float32")})
    np.testing.assert_array_equal(state["w"], np.full((256, 256), 2.0))


def test_a_part_can_be_read_without_the_rest(folder):
    _fill(folder, 1)
    shutil.rmtree(folder / "1" / "opt_state")  # not touched, so not missed
    with Checkpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore_latest({"params": _state(0)["params"]}, partial=True)
        assert found is not None
        _assert_equal(found[1], {"params": _state(1)["params"]})
        with pytest.raises(UserError, match="extra is not in the checkpoint"):
            checkpoints.restore_latest({"extra": jnp.zeros(1)}, partial=True)


def _largest(step_folder):
    """The file with most of the arrays' bytes."""
    files = [p for p in (step_folder / "params").rglob("d/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": lambda d: _flip(_largest(d)),
    "a cut file": lambda d: _largest(d).write_bytes(_largest(d).read_bytes()[:100]),
    "no arrays": lambda d: shutil.rmtree(d / "params"),
    "no meta": lambda d: shutil.rmtree(d / "meta"),
    "half a meta": lambda d: (d / "meta" / "metadata").write_text('{"format": "vlm2'),
    "no tree": lambda d: (d / "opt_state" / "_METADATA").unlink(),
    "empty": lambda d: (shutil.rmtree(d), d.mkdir()),
    "other arrays under its name": lambda d: (
        shutil.rmtree(d / "params"),
        shutil.copytree(d.parent / "1" / "params", d / "params"),
    ),
    "a copy": lambda d: (shutil.rmtree(d), shutil.copytree(d.parent / "1", d)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_used(folder, damage):
    _fill(folder, 1, 2)
    DAMAGES[damage](folder / "2")
    told = []
    with Checkpoints(folder, read_only=True, report=told.append) as checkpoints:
        assert checkpoints.restore_latest(_state(0))[0] == 1
        assert checkpoints.steps() == [1, 2]
    with Checkpoints(folder, every=1, report=told.append) as checkpoints:
        step, state, meta = checkpoints.restore_latest(_state(0))
        assert (step, meta) == (1, {"lr": 0.1})
        _assert_equal(state, _state(1))
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, _state(2), {})
        checkpoints.wait()
        assert checkpoints.restore_latest(_state(0))[0] == 2
    assert f"checkpoint {folder / '2'} is damaged" in told[0]
    assert "step 1 is whole and is used instead" in told[1]
    assert (folder / "damaged-2").is_dir()


def test_all_damaged_is_an_error_that_names_them(folder):
    _fill(folder, 1, 2)
    for step in "12":
        _flip(_largest(folder / step))
    with Checkpoints(folder, report=lambda _: None) as checkpoints:
        with pytest.raises(UserError, match="(?s)2 problems.*step 2.*step 1"):
            checkpoints.restore_latest(_state(0))
        with pytest.raises(UserError, match="damaged"):
            checkpoints.restore(2, _state(0))
        with pytest.raises(UserError, match="no checkpoint of step 9"):
            checkpoints.restore(9, _state(0))
        assert checkpoints.steps() == [1, 2]


def test_a_half_written_checkpoint_is_not_one(folder):
    _fill(folder, 1)
    unfinished = folder / "2.orbax-checkpoint-tmp"
    shutil.copytree(folder / "1", unfinished)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert unfinished.is_dir()  # a reader must not tidy up behind a run that is still saving
    with Checkpoints(folder, every=1) as checkpoints:
        assert checkpoints.restore_latest(_state(0))[0] == 1
        assert checkpoints.save(2, _state(2), {})
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.fixture
def full_disk():
    """Make every write beyond 20 kB of a file fail, really: root is bound by it, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_full(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else soft, hard))

    yield set_full
    set_full(False)


def _big(step):
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=(100, 200)), jnp.float32)}


def test_a_failing_save_is_told_and_leaves_the_good_one(folder, full_disk):
    told = []
    checkpoints = Checkpoints(folder, keep=1, every=1, report=told.append)
    checkpoints.save(1, _big(1), {})
    checkpoints.wait()
    full_disk(True)
    checkpoints.save(2, _big(2), {})
    with pytest.raises(UserError, match="(?s)step 2: File too large.*step 1 .*untouched"):
        checkpoints.wait()
    assert len(told) == 1 and "saving a checkpoint failed, step 2: File too large" in told[0]
    assert checkpoints.steps() == [1]
    _assert_equal(checkpoints.restore_latest(_big(0))[1], _big(1))

    full_disk(False)  # the next one succeeds, and the run ends well
    assert checkpoints.save(3, _big(3), {})
    checkpoints.wait()
    assert [p.name for p in folder.iterdir()] == ["3"]
    _assert_equal(checkpoints.restore_latest(_big(0))[1], _big(3))
    checkpoints.close()


def test_saves_that_keep_failing_stop_the_run(folder, full_disk):
    told = []
    _fill(folder, 1)
    checkpoints = Checkpoints(folder, keep=1, every=1, report=told.append)
    full_disk(True)
    with pytest.raises(UserError, match="5 saves in a row failed"):
        for step in range(2, 9):
            checkpoints.save(step, _big(step), {})
    assert len(told) == 5
    assert checkpoints.steps() == [1]
    with pytest.raises(UserError, match="could not be written"):
        checkpoints.close()


def test_a_save_that_fails_at_once(folder, monkeypatch):
    told = []
    with Checkpoints(folder, every=1, report=told.append) as checkpoints:
        checkpoints.save(1, _big(1), {})
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        assert not checkpoints.save(2, _big(2), {})
        assert "step 2: No space left on device" in told[0]
        assert checkpoints.save(3, _big(3), {})
    assert Checkpoints(folder, read_only=True).steps() == [1, 3]


def test_the_error_of_the_body_is_not_hidden_by_the_save(folder, full_disk):
    with pytest.raises(KeyError, match="body"):
        with Checkpoints(folder, every=1, report=lambda _: None) as checkpoints:
            full_disk(True)
            checkpoints.save(1, _big(1), {})
            raise KeyError("body")


def test_another_models_checkpoint_is_told_field_by_field(folder):
    _fill(folder, 1)
    other = _state(0)
    kernel = "decoder/layers/attn/qkv/kernel"
    other["params"][kernel] = jnp.zeros((2, 8, 12))
    other["params"]["decoder/norm/lora_a"] = other["params"].pop("decoder/norm/scale")
    told = []
    with Checkpoints(folder, report=told.append) as checkpoints:
        with pytest.raises(UserError) as caught:
            checkpoints.restore_latest(other)
    message = str(caught.value)
    assert "belongs to another model, adapter or optimizer (3 problems)" in message
    assert f"params/{kernel} is float32 [2, 8, 24] there, float32 [2, 8, 12] here" in message
    assert "params/decoder/norm/lora_a is not in the checkpoint" in message
    assert "params/decoder/norm/scale is only in the checkpoint" in message
    assert not told and (folder / "1").is_dir()  # not damage: nothing is moved


def test_nnx_states_are_kept(folder):
    class Layer(nnx.Module):
        def __init__(self, seed):
            self.kernel = nnx.Param(jnp.full((2, 3), float(seed)))

    state = nnx.split(Layer(3))[1]
    with Checkpoints(folder, every=1) as checkpoints:
        checkpoints.save(1, {"params": state}, {})
        checkpoints.wait()
        found = checkpoints.restore_latest({"params": nnx.split(Layer(0))[1]})
    assert found is not None
    _assert_equal(found[1]["params"], state)


def test_wrong_folders_are_told_in_words(folder, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        Checkpoints(folder, read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpoints(tmp_path / "file")
    (tmp_path / "hf" / "checkpoint-100").mkdir(parents=True)
    with pytest.raises(UserError, match="(?s)other things.*checkpoint-100"):
        Checkpoints(tmp_path / "hf")
    with pytest.raises(UserError, match="checkpoint.keep"):
        Checkpoints(folder, keep=0)
    _fill(folder, 1)
    document = folder / "1" / "meta" / "metadata"
    document.write_text(json.dumps(json.loads(document.read_text()) | {"format": "later 2"}))
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="format 'later 2'"):
        checkpoints.restore_latest(_state(0))
