import numpy as np
import pytest

from myelin import nn
from myelin.errors import ModelRefused
from myelin.importers import load

torch = pytest.importorskip("torch")


def test_parameters_are_named_and_shaped_as_in_pytorch():
    net = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), bias=False),
        nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()),
        nn.Flatten(),
        nn.Linear(4 * 6 * 4, 7),
        nn.LayerNorm(7),
    )
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, (3, 5), bias=False),
        torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU()),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 6 * 4, 7),
        torch.nn.LayerNorm(7),
    )
    model = load(net, (3, 8, 8))
    assert dict(model.shapes) == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    assert model.outputs == 7


def test_weights_are_drawn_as_pytorch_draws_them_and_from_the_seed_alone():
    net = nn.Sequential(
        nn.Conv2d(16, 32, 5), nn.Flatten(), nn.Linear(32 * 16, 64), nn.LayerNorm(64)
    )
    model = load(net, (16, 8, 8), seed=3)
    for name, fan_in in (("0", 16 * 25), ("2", 32 * 16)):
        bound = 1 / np.sqrt(fan_in)  # kaiming_uniform_(a=√5), and PyTorch's bias
        weight = model.parameters[f"{name}.weight"]
        assert np.abs(weight).max() <= bound
        assert np.isclose(weight.std(), bound / np.sqrt(3), rtol=0.03)
        assert np.abs(model.parameters[f"{name}.bias"]).max() <= bound
    assert (model.parameters["3.weight"] == 1).all()
    assert (model.parameters["3.bias"] == 0).all()
    again, other = load(net, (16, 8, 8), seed=3), load(net, (16, 8, 8), seed=4)
    assert np.array_equal(again.parameters["0.weight"], model.parameters["0.weight"])
    assert not np.array_equal(other.parameters["0.weight"], model.parameters["0.weight"])


@pytest.mark.parametrize(
    ("net", "shape", "reason"),
    [
        (nn.Linear(3, 2), (4,), r"weight \(2, 3\) does not fit x \(4,\)"),
        (nn.Sequential(nn.Conv2d(1, 2, 9)), (1, 8, 8), "larger than the padded image"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 8, 8), "must be a row of numbers"),
        (nn.Sequential(nn.GroupNorm(3, 4)), (4, 8, 8), "do not divide into the groups"),
        (nn.Residual(nn.Linear(3, 2)), (3,), "it takes two of one shape"),
        (nn.Sequential(nn.MaxPool2d(3, padding=2)), (1, 8, 8), "more than half the kernel"),
        (nn.Sequential(nn.Reshape((5,))), (4,), r"cannot be seen as \(5,\)"),
        (nn.Linear(3, 2), None, "need an example"),
    ],
)
def test_layers_that_do_not_fit_say_what_does_not(net, shape, reason):
    with pytest.raises(ModelRefused, match=reason):
        load(net, shape)
