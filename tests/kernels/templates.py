import numpy as np
import tvm
from hypothesis import HealthCheck, settings

from myelin.kernels import clipping, elementwise, layout, linear, loss, mixed, reduce, update
from myelin.kernels.conv import stored_norm_inflation
from myelin.kernels.object import ALLOWED, build, undefined


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


def few(examples):
    """So many examples, each of which compiles kernels; the same in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def data(*shape, seed=0):
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(value, true, scale):
    """`scale` is Σ |terms| for each element: what rounding errors of float32 are relative to."""
    assert value.shape == true.shape
    assert np.all(np.abs(value - true) <= 1e-6 * scale + 1e-30)


def counted(m, k, n):
    """x[m, k], d[m, n], c[m], and x and d with what is not finite where c is 0: in every third."""
    x, d, c = data(m, k), data(m, n, seed=1), np.abs(data(m, seed=2))
    c[::3] = 0
    poisoned_x, poisoned_d = x.copy(), d.copy()
    poisoned_x[::3] = np.nan
    poisoned_d[::6] = np.inf
    return x, d, c, poisoned_x, poisoned_d


def assert_stored_norms(conv, g, s):
    """Norms are of the numbers that are stored, which are those that are summed."""
    exact = (g.astype("d") ** 2).sum(1)
    assert np.all(exact <= s * (1 + stored_norm_inflation(conv)))
    flushed = conv.weights * 2.0**-125
    assert np.all(s <= exact * (1 + stored_norm_inflation(conv)) + flushed)


def assert_summed_norms(templates, cpu, call, x, d, bias):
    """No example adds more than linear layers' `squared_norm` allows; gives these norms."""
    (m, k), n = x.shape, d.shape[1]
    value = call(templates.squared_norm(cpu, m, k, n, bias=bias), x, d).astype("d")
    for i in range(m):
        c = np.zeros(m, np.float32)
        c[i] = np.float32(0.37)
        summed = call(templates.weighted_gradient(cpu, m, k, n), x, d, c).astype("d")
        true = (summed**2).sum() + (((c[i] * d[i].astype("d")) ** 2).sum() if bias else 0)
        bound = value[i] * (1 + templates.squared_norm_inflation(k, n))
        assert true <= float(c[i]) ** 2 * bound + 2.0**-125
    return value


def assert_same_bits_on_one_thread(compute):
    """compute() → arrays, the same on two threads and on one."""
    configure = tvm.get_global_func("runtime.config_threadpool")
    two = compute()
    configure(1, 1)
    try:
        one = compute()
    finally:
        configure(1, 2)
    assert [a.tobytes() for a in one] == [a.tobytes() for a in two]


def assert_runtime_suffices(kernels, cpu):
    """Their object needs nothing that the runtime lacks."""
    assert undefined(build(kernels, cpu)) <= ALLOWED
