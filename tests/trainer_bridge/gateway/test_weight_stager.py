"""A weight version comes out whole and checked, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from bridge_parts import EXPECTED, make_manifest, weights

from blockroll.errors import InvalidInput, TransportError
from blockroll.trainer_bridge.client.host_weights import HostWeights, host_array
from blockroll.trainer_bridge.gateway.weight_stager import WeightStager
from blockroll.trainer_bridge.wire.manifest import Manifest


def chunks(tensors: Mapping[str, Any], size: int) -> Iterator[tuple[int, int, memoryview]]:
    return HostWeights.copy_of(tensors).chunks(size)


def stage(tensors: dict[str, np.ndarray], size: int = 100, manifest: Manifest | None = None) -> WeightStager:
    stager = WeightStager(manifest or make_manifest(1, 0, tensors), EXPECTED)
    for index, offset, data in chunks(tensors, size):
        stager.add(index, offset, data)
    return stager


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_version_arrives_bit_for_bit(size: int) -> None:
    tensors = weights(1)
    tensors["embed.weight"] = np.asfortranarray(tensors["embed.weight"])
    tensors["scale"] = tensors["scale"].astype(">f4")
    arrived = stage(tensors, size).finish()
    assert list(arrived) == list(tensors)
    for name, array in tensors.items():
        assert arrived[name].dtype == array.dtype.newbyteorder("=")
        assert arrived[name].shape == array.shape
        assert np.array_equal(arrived[name], array)


def test_manifest_travels_and_its_digest_names_the_content() -> None:
    manifest = make_manifest(3, 2, weights(1))
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.digest == make_manifest(3, -1, weights(1)).digest
    assert manifest.digest != make_manifest(3, 2, weights(2)).digest
    assert manifest.digest != make_manifest(4, 2, weights(1)).digest


def test_torch_tensors_bfloat16_parameters_and_views() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    dtype, array = host_array("w", torch.nn.Parameter(base).bfloat16())
    assert (dtype, array.dtype, array.shape) == ("bfloat16", np.dtype("uint16"), (3, 4))
    assert torch.equal(torch.from_numpy(array).view(torch.bfloat16).float(), base)
    dtype, array = host_array("w", base.t())
    assert (dtype, array.flags.c_contiguous) == ("float32", True)
    assert np.array_equal(array, base.t().numpy())
    stager = WeightStager(make_manifest(1, 0, {"w": base.bfloat16()}), {"w": ("bfloat16", (3, 4))})
    for chunk in chunks({"w": base.bfloat16()}, 5):
        stager.add(*chunk)
    assert torch.equal(torch.from_numpy(stager.finish()["w"]).view(torch.bfloat16), base.bfloat16())
    with pytest.raises(InvalidInput, match="complex64"):
        host_array("w", base.to(torch.complex64))


@pytest.mark.parametrize("value", [[1.0], 3.0, np.array([object()]), np.array(["a"]), np.zeros((1,) * 9)])
def test_what_is_no_tensor_is_named(value: Any) -> None:
    with pytest.raises(InvalidInput, match="'w'"):
        make_manifest(1, 0, {"w": value})


def test_manifest_that_does_not_fit_the_policy_is_refused_before_a_byte() -> None:
    good = weights()
    for change, what in (
            ({"extra": np.zeros(1)}, "'extra'"), ({"embed.weight": good["embed.weight"].T}, r"\[8, 32\]"),
            ({"scale": np.float64(1)}, "float64"), ({"half": None}, "lacks 1 tensors, 'half'")):
        tensors = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(TransportError, match=what):
            WeightStager(make_manifest(1, 0, tensors), EXPECTED)
    twice = make_manifest(1, 0, good)
    with pytest.raises(TransportError, match="twice"):
        WeightStager(dataclasses.replace(twice, tensors=(*twice.tensors, twice.tensors[0])), EXPECTED)


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize(("name", "place", "value"), [
    ("embed.weight", (0, 0), np.nan), ("embed.weight", (31, 7), -np.inf), ("scale", (), np.inf), ("half", (2, 4), np.nan)])
def test_a_number_that_is_not_finite_kills_the_stage_by_name(size: int, name: str, place: Any, value: float) -> None:
    tensors = weights(1)
    tensors[name] = np.array(tensors[name])
    tensors[name][place] = value
    where = rf"{name!r} is not finite at \[{', '.join(map(str, place))}\]"
    with pytest.raises(TransportError, match=where):
        stage(tensors, size)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
def test_bfloat16_is_looked_at_by_its_bits(value: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.randn(5, 9).bfloat16()
    largest = torch.finfo(torch.bfloat16).max
    tensor[0, 0], tensor[4, 8] = largest, -largest
    expected = {"w": ("bfloat16", (5, 9))}
    for bad in (False, True):
        tensor[3, 1] = float(value) if bad else 0.0
        stager = WeightStager(make_manifest(1, 0, {"w": tensor}), expected)
        sent = list(chunks({"w": tensor}, 7))
        if bad:
            with pytest.raises(TransportError, match=r"'w' is not finite at \[3, 1\]"):
                for chunk in sent:
                    stager.add(*chunk)
        else:
            for chunk in sent:
                stager.add(*chunk)
            assert stager.finish()["w"].dtype == np.uint16


def test_wrong_bytes_gaps_and_repeats_kill_the_stage() -> None:
    tensors = weights()
    sent = list(chunks(tensors, 100))
    flipped = bytearray(sent[3][2])
    flipped[0] ^= 1
    for bad in ([*sent[:3], (sent[3][0], sent[3][1], flipped), *sent[4:]], [sent[0], *sent[2:]], [sent[0], *sent],
                [(0, 0, b"x" * 2000)], [(9, 0, b"x")], [(0, 0, b"")], [*sent, sent[-1]]):
        stager = WeightStager(make_manifest(1, 0, tensors), EXPECTED)
        with pytest.raises(TransportError):
            for chunk in bad:
                stager.add(*chunk)
        with pytest.raises(TransportError):
            stager.add(*sent[0])
        with pytest.raises(TransportError):
            stager.finish()


def test_digest_of_the_manifest_is_what_counts() -> None:
    with pytest.raises(TransportError, match="'embed.weight' do not have the digest"):
        stage(weights(1), manifest=make_manifest(1, 0, weights(2)))


def test_incomplete_stage_gives_nothing_and_a_complete_one_gives_once() -> None:
    tensors = weights()
    stager = WeightStager(make_manifest(1, 0, tensors), EXPECTED)
    for chunk in list(chunks(tensors, 100))[:-1]:
        stager.add(*chunk)
    with pytest.raises(TransportError, match="missing or incomplete"):
        stager.finish()
    whole = stage(tensors)
    whole.finish()
    with pytest.raises(TransportError):
        whole.finish()
