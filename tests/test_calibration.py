"""calibrate.py, threads.py: batches run in parallel and are added up in order."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from modelutils import find_layers
from obc.solver.threads import Stopped, Turns, one_at_a_thread
from obc.toolkit import calibrate as calibration
from obc.toolkit.calibrate import calibrate, probe, show, twin
from trueobs import TrueOBS

CPU = torch.device("cpu")


class Odd(nn.Module):
    """A layer called twice, one never, one for certain images only, and a state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Linear(8, 2)
        self.sometimes = nn.Linear(8, 4)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.kept, positive = self.first(x), float(x[0, 0, 0, 0]) > 0
        time.sleep(float(x[0, 0, 0, 0].abs()) / 100)  # batches overtake each other
        x = self.twice(self.twice(self.kept).relu()) + self.kept
        x = x.mean((2, 3))
        if positive:
            self.sometimes(x)
        return self.last(x)


def batches(sign: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Seven batches; `sign` decides whether the first is one that calls `Odd.sometimes`."""
    generator = torch.Generator().manual_seed(0)
    sizes = [5] * 6 + [2]
    return [(sign * torch.randn(n, 3, 6, 6, generator=generator), torch.zeros(n)) for n in sizes]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model() -> Odd:
    torch.manual_seed(0)
    return Odd().eval()


def calibrated(dense: nn.Module, number: int, sign: int = 1) -> dict[str, TrueOBS]:
    torch.set_num_threads(number)
    solvers = {name: TrueOBS(layer) for name, layer in find_layers(dense).items()}
    calibrate(dense, solvers, batches(sign), CPU)
    assert torch.get_num_threads() == number
    return solvers


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_are_bit_identical_and_over_all_images(sign, threads):
    dense, found = model(), []
    for number in (1, 2, 3, 7):
        solvers = calibrated(dense, number, sign)
        found.append([(s.nsamples, s.gram.matrix()) for s in solvers.values()])
        assert not any(layer._forward_hooks for layer in dense.modules())
    for other in found[1:]:
        assert all(
            a == b and torch.equal(x, y) for (a, x), (b, y) in zip(found[0], other, strict=True)
        )
    counts = dict(zip(find_layers(dense), [n for n, _ in found[0]], strict=True))
    assert counts.pop("never") == 0 and set(counts.values()) == {32}  # images, not calls
    seen = torch.cat([images for images, _ in batches(sign)])
    x = nn.functional.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    torch.testing.assert_close(found[0][0][1][0], x.T @ x, rtol=1e-5, atol=1e-4)


def test_large_products_take_turns(threads, monkeypatch):
    monkeypatch.setattr("obc.solver.hessian.WAITING_BYTES", 0)
    dense = model()
    one, three = calibrated(dense, 1), calibrated(dense, 3)
    assert all(torch.equal(one[name].gram.matrix(), three[name].gram.matrix()) for name in one)


def test_memory_of_images_limits_the_batches_in_parallel(threads, monkeypatch):
    running, most = [], []
    dense = model()

    class Watched(Odd):
        def forward(self, x: Tensor) -> Tensor:
            running.append(1)
            most.append(len(running))
            x = super().forward(x)
            running.pop()
            return x

    dense.__class__ = Watched
    calls, image_bytes = probe(dense, batches()[0][0][:1])
    assert calls == {"first": 1, "twice": 2, "last": 1} and image_bytes == 6 * 8 * 36 * 4
    monkeypatch.setattr(calibration, "CHUNK_BYTES", 1000)
    for room, wanted in ((0, 1), (1, 1), (2, 2)):
        most.clear()
        monkeypatch.setattr(
            calibration,
            "default_memory",
            lambda device, room=room: 2 * (5 * image_bytes + 3000) * room,
        )
        calibrated(dense, 4)
        assert max(most) == wanted


def test_layers_that_no_image_reaches(threads):
    torch.set_num_threads(2)
    dense = model()
    solver = TrueOBS(dense.never)
    calibrate(dense, {"never": solver}, batches(), CPU)
    assert solver.nsamples == 0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_layer_that_is_called_more_often_later(number, threads):
    """The order is lost on several threads: one starts again, and all calls count once."""
    dense = model()

    class More(Odd):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.first(y[:, :3]) if len(x) == 2 else y

    dense.__class__ = More
    solver = calibrated(dense, number)["first"]
    assert solver.nsamples == 32
    last = batches()[-1][0]
    inputs = [images for images, _ in batches()] + [dense.first(last)[:, :3].detach()]
    x = nn.functional.unfold(torch.cat(inputs), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    torch.testing.assert_close(solver.H, 2 / 32 * x.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_all_threads(number, error, threads):
    dense = model()
    torch.set_num_threads(number)
    solvers = {name: TrueOBS(layer) for name, layer in find_layers(dense).items()}

    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches()[:4]
        raise error("images")

    with pytest.raises(error, match="images"):
        show(dense, solvers, interrupted(), CPU)
    bad = [*batches()[:3], (torch.zeros(5, 4, 6, 6), torch.zeros(5)), *batches()]
    with pytest.raises(RuntimeError, match="channels"):
        show(dense, solvers, bad, CPU)
    assert torch.get_num_threads() == number


def test_a_failed_piece_is_not_waited_for():
    turns, done = Turns(), []

    def work(number: int, item: str) -> None:
        if item == "bad":
            raise ValueError("first")
        turns.wait("x", number)
        done.append(number)
        turns.leave("x", number)

    with pytest.raises(ValueError, match="first"):
        one_at_a_thread(work, ["good", "bad", "good", "good"], 3, turns)
    assert done == [0]
    with pytest.raises(Stopped):
        turns.wait("x", 3)


def test_a_twin_shares_tensors_only():
    dense = model()
    other = twin(dense)
    assert all(a is b for a, b in zip(dense.parameters(), other.parameters(), strict=True))
    assert other.first is not dense.first
