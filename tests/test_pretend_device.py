"""The pretended device keeps the rules of a real one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pretend_device import PretendDevice


def test_tensors_of_two_devices_do_not_meet():
    with PretendDevice():
        away, here = torch.ones(3, 4, device="cuda:0"), torch.ones(3, 4)
        assert (away.device.type, here.device.type) == ("cuda", "cpu")
        for mix in (lambda: away + here, lambda: here * away, lambda: torch.cat([away, here]), lambda: away @ here.T,
                    lambda: away[torch.tensor([0])], lambda: away[[0]], lambda: here[away.long()],
                    lambda: torch.where(away > 0, away, here)):  # fmt: skip
            with pytest.raises(RuntimeError):
                mix()
        with pytest.raises(TypeError):
            away.numpy()
        assert (away + torch.tensor(2.0)).sum().cpu() == 36  # a number of the host may take part


def test_what_waits_is_counted():
    with PretendDevice() as device:
        away = torch.arange(6, device="cuda:0")
        assert device.waits == []
        for wait in (lambda: away.tolist(), lambda: away[0].item(), lambda: bool((away > 0).any()), lambda: away.cpu(),
                     lambda: away.nonzero(), lambda: away[away > 2], lambda: int(away.max()), lambda: away.bincount(),
                     lambda: torch.tensor([1], device="cuda:0"), lambda: torch.ones(2).to("cuda:0"),
                     lambda: torch.ones(2).to("cuda:0", non_blocking=True), lambda: away.copy_(torch.arange(6))):  # fmt: skip
            before = len(device.waits)
            wait()
            assert len(device.waits) == before + 1
        before = len(device.waits)
        pinned = torch.ones(2, pin_memory=True)
        assert (pinned.to("cuda:0", non_blocking=True) * 2 + away[:2]).add_(1).shape == (2,)
        assert away[torch.ones(1, dtype=torch.int64, device="cuda:0")].shape == (1,)
        assert len(device.waits) == before
