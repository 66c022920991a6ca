"""Adam moves tensors as torch's does, each at its own rate."""

import torch

from pvrt_tune.pv.adam import Adam

SHAPES = [(3, 5), (7,), ()]


def test_it_takes_torchs_steps_also_where_gradients_are_missing() -> None:
    random = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=random) for shape in SHAPES]
    theirs = [tensor.clone() for tensor in ours]
    rates = [0.1, 0.02, 0.5]
    groups = [{"params": [t], "lr": rate} for t, rate in zip(theirs, rates, strict=True)]
    reference = torch.optim.Adam(groups, betas=(0.8, 0.9))
    adam = Adam(ours, rates, (0.8, 0.9))
    for step, factor in enumerate((0.5, 1.0, 0.25)):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(mine.shape, generator=random)
            missing = number == 1 and step == 1
            mine.grad, other.grad = (None, None) if missing else (grad, grad.clone())
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        adam.step(factor)
        reference.step()
    assert adam.counts == [3, 2, 3] and all(tensor.grad is None for tensor in ours)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


def test_without_any_gradient_nothing_moves() -> None:
    tensor = torch.ones(2)
    Adam([tensor], [1.0], (0.9, 0.95)).step(1.0)
    assert tensor.tolist() == [1, 1]
