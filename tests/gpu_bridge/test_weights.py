"""Weights on their way: what is in the file, who can read it, and that nothing of it remains."""

import socket
import stat
import urllib.error
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gpu_bridge import weights
from gpu_bridge.weights import Route
from sea_jax.models import decoder
from sea_jax.models.checkpoints import hf
from tests.models.test_decoder import NEOX
from tests.support import tiny
from tests.support.fake import fetched

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, ml_dtypes.bfloat16)}


def test_a_pushed_policy_is_what_a_saved_one_is(tmp_path: Path) -> None:
    params = jax.tree.map(np.asarray, tiny.params(cuts=(1,)))
    hf.save(tmp_path / "saved", tiny.CONFIG, params)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    with weights.write(hf.to_tensors(tiny.CONFIG, params), tmp_path) as path:
        pushed = load_file(path)
    with weights.write(hf.to_tensors(tiny.CONFIG, params, "bfloat16"), tmp_path) as path:
        narrow = load_file(path)
    assert pushed.keys() == narrow.keys() == saved.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(pushed[name], tensor, strict=True)
        np.testing.assert_array_equal(narrow[name], tensor.astype(ml_dtypes.bfloat16), strict=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_of_the_last_layers_alone_go_their_tensors_and_the_last_norm(family: str) -> None:
    config = {"llama": tiny.CONFIG, "gpt_neox": NEOX}[family]
    params = decoder.recut(tiny.draw(decoder.abstract(config), 0), (config.num_layers - 1,))
    _, trained = decoder.divide(params, 1)
    changed, everything = hf.to_tensors(config, trained, last_part=True), hf.to_tensors(config, params)
    last = f".{config.num_layers - 1}."
    norm = {"llama": "model.norm.", "gpt_neox": "gpt_neox.final_layer_norm."}[family]
    assert changed.keys() == {name for name in everything if last in name or name.startswith(norm)}
    for name, tensor in changed.items():
        np.testing.assert_array_equal(tensor, everything[name])
    with pytest.raises(ValueError, match=r"parameter 'embed' of layer None: it is not given"):
        hf.to_tensors(config, {**trained, "stacks": params["stacks"]})


def test_the_file_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with weights.offer(TENSORS, Route(directory=tmp_path)) as offer:
        assert offer.path is not None
        assert offer.url is offer.bearer is None
        path = Path(offer.path)
        assert path.is_relative_to(tmp_path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with weights.offer(TENSORS, Route(directory=tmp_path)) as other:
            assert other.path != offer.path
        assert path.exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), weights.offer(TENSORS, Route(directory=tmp_path)):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_learner_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{weights.PREFIX}left"
    left.mkdir()
    (left / "lock").touch()
    (left / "model.safetensors").touch()
    (tmp_path / "somebody-elses").mkdir()
    with weights.write(TENSORS, tmp_path):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]


def test_a_directory_that_cannot_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(OSError, match=rf"^config\.actor\.weights_directory={tmp_path}/none: No such file"),
        weights.write(TENSORS, tmp_path / "none"),
    ):
        pass
    free = weights.shutil.disk_usage(tmp_path)._replace(free=20)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="has 0 MiB free and the weights take 0 MiB"), weights.write(TENSORS, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_over_http_only_for_who_bears_the_token(tmp_path: Path) -> None:
    with weights.offer(TENSORS, Route(weights.HTTP, tmp_path)) as offer:
        assert offer.path is None
        url, bearer = str(offer.url), str(offer.bearer)
        (tmp_path / "got.safetensors").write_bytes(fetched(url, bearer))
        got = load_file(tmp_path / "got.safetensors")
        assert got.keys() == TENSORS.keys()
        np.testing.assert_array_equal(got["a"], TENSORS["a"])
        for wrong_url, wrong_bearer, status in ((url, "guessed", 401), (url, "", 401), (f"{url}/../lock", bearer, 404)):
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                fetched(wrong_url, wrong_bearer)
    with pytest.raises(urllib.error.URLError):
        fetched(url, bearer)
    with weights.offer(TENSORS, Route(weights.HTTP, tmp_path)) as offer:
        assert offer.bearer != bearer


def test_an_address_that_is_taken_or_not_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        route = Route(weights.HTTP, tmp_path, port=port)
        with (
            pytest.raises(OSError, match=rf"weights_port={port}: cannot listen there \(Address already in use\)"),
            weights.offer(TENSORS, route),
        ):
            pass
    with (
        pytest.raises(OSError, match=r"^config\.actor\.weights_host=192\.0\.2\.1"),
        weights.offer(TENSORS, Route(weights.HTTP, tmp_path, host="192.0.2.1")),
    ):
        pass
