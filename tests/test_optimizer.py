import numpy as np
import pytest

from myelin import nn
from myelin.cpu import Cpu
from myelin.errors import ModelRefused
from myelin.importers import load
from myelin.optimizer import SGD, Adam, optimizer_from_dict, optimizer_to_dict
from myelin.plan import Outside, compile_training
from myelin.weights import pack, unpack

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
        (
            SGD(lr=0.3, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.01),
        ),
        (
            SGD(lr=0.3, momentum=0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
        ),
        (
            Adam(lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "adam"],
)
def test_updates_are_those_of_pytorch(ours, theirs):
    model = load(nn.Sequential(nn.Linear(5, 3)), (5,), seed=0)
    cpu = Cpu.native()
    program = compile_training(model, loss="mean-squared-error", optimizer=ours, batch=1, cpu=cpu)
    outside = Outside(program, cpu)
    outside.buffer("weights")[:] = pack(program, model.parameters)
    reference = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in model.parameters.items()}
    optimizer = theirs(list(reference.values()))
    generator = np.random.default_rng(1)
    for step in range(1, 6):
        gradient = {
            n: generator.standard_normal(v.shape).astype(np.float32)
            for n, v in model.parameters.items()
        }
        weights = unpack(program, outside.update(pack(program, gradient), step))
        for name, parameter in reference.items():
            parameter.grad = torch.tensor(gradient[name])
        optimizer.step()
        for name, parameter in reference.items():
            np.testing.assert_allclose(
                weights[name], parameter.detach().numpy(), rtol=2e-5, atol=1e-6
            )


@pytest.mark.parametrize("optimizer", [SGD(lr=0.5, momentum=0.9), Adam(betas=(0.8, 0.95))])
def test_settings_survive_a_document(optimizer):
    assert optimizer_from_dict(optimizer_to_dict(optimizer)) == optimizer
    assert all(isinstance(v, str) for v in optimizer_to_dict(optimizer, text=True).values())


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ({"name": "lion"}, "name is one of sgd, adam"),
        ({"name": "sgd", "lr": 1.0}, "exactly the keys"),
        ({**optimizer_to_dict(SGD(lr=1.0)), "lr": "1"}, "lr is '1'"),
        ({**optimizer_to_dict(SGD(lr=1.0)), "lr": True}, "lr is True"),
        ({**optimizer_to_dict(SGD(lr=1.0)), "nesterov": 1}, "nesterov is 1"),
        ({**optimizer_to_dict(SGD(lr=1.0)), "lr": -1.0}, "lr is -1.0; it must be positive"),
        ({**optimizer_to_dict(Adam()), "betas": [0.9]}, r"betas is \[0.9\]"),
        ({**optimizer_to_dict(Adam()), "betas": [0.9, 1.0]}, "betas is 1.0"),
    ],
)
def test_malformed_settings_are_refused(read, reason):
    with pytest.raises(ModelRefused, match=reason):
        optimizer_from_dict(read)


def test_nesterov_needs_momentum():
    with pytest.raises(ModelRefused, match="nesterov needs a momentum"):
        SGD(lr=1.0, nesterov=True)
