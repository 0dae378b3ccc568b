import numpy as np

from myelin.kernels import clipping, elementwise, layout, linear, loss, mixed, reduce, update


def every_template(cpu):
    """One kernel of each template, with sizes large enough to run in parallel."""
    m, k, n = 256, 200, 50
    found = {
        "matmul": linear.matmul(cpu, m, k, n, bias=True),
        "backward_data": linear.backward_data(cpu, m, k, n),
        "weighted_gradient": linear.weighted_gradient(cpu, m, k, n),
        "weighted_bias": linear.weighted_bias(cpu, m, n),
        "squared_norm": linear.squared_norm(cpu, m, 4000, n, bias=True),
        "cross_entropy": loss.cross_entropy_adjoint(cpu, m, 100),
        "binary": loss.binary_cross_entropy_adjoint(cpu, m, 1),
        "squared": loss.mean_squared_error_adjoint(cpu, m, 3),
        "sgd": update.sgd(cpu, 100_001, lr=0.1, momentum=0.9),
        "adam": update.adam(cpu, 100_001, lr=0.1),
        "weighted_sum": clipping.weighted_sum(cpu, m, 1001),
        "clip_factors": clipping.clip_factors(cpu, m, 1, 1, inflation=[0.0], kappa=[0.0]),
        "map": elementwise.map(cpu, [(m, k), (k,)], (m, k), lambda a, b: a + b),
        "sum_rows": reduce.sum_rows(cpu, m, 2000),
        "softmax": reduce.softmax(cpu, m, 100),
        "permute": layout.permute(cpu, (m, 3, 99), (0, 2, 1)),
    }
    if "bf16" in cpu.precisions:
        found |= {
            "matmul_bf16": mixed.matmul(cpu, m, k, n, bias=True),
            "backward_data_bf16": mixed.backward_data(cpu, m, k, n),
            "weighted_gradient_bf16": mixed.weighted_gradient(cpu, m, k, n),
            "squared_norm_bf16": mixed.squared_norm(cpu, m, 4000, n, bias=True),
        }
    return found


def data(*shape, seed=0):
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(value, true, scale):
    """`scale` is Σ |terms| for each element: what rounding errors of float32 are relative to."""
    assert value.shape == true.shape
    assert np.all(np.abs(value - true) <= 1e-6 * scale + 1e-30)
