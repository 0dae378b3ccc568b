import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myelin import nn
from myelin.cpu import Cpu
from myelin.errors import ModelRefused, UnsupportedLayer
from myelin.importers import load
from myelin.model import Model
from myelin.optimizer import SGD
from myelin.plan import Outside, compile_training

torch = pytest.importorskip("torch")


class Everything(torch.nn.Module):
    """One of each operator."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=(1, 2), padding=(1, 0))
        self.norm = torch.nn.GroupNorm(2, 8)
        self.largest = torch.nn.MaxPool2d(2, 1, padding=1)
        self.average = torch.nn.AvgPool2d(2, padding=1, count_include_pad=False)
        self.overall = torch.nn.AdaptiveAvgPool2d(1)
        self.linear = torch.nn.Linear(16, 5)
        self.layer_norm = torch.nn.LayerNorm(5)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = torch.nn.functional.silu(x + torch.relu(x))
        x = self.average(torch.nn.functional.gelu(self.largest(x)))
        x = torch.flatten(self.overall(x), 1)
        x = self.layer_norm(self.linear(torch.cat([x, torch.tanh(x)], 1)))
        x = torch.nn.functional.gelu(torch.sigmoid(x), approximate="tanh")
        return torch.softmax(x, -1).view(-1, 5)


def everything():
    torch.manual_seed(0)
    return Everything()


def images(batch=3):
    return np.random.default_rng(0).standard_normal((batch, 3, 8, 9)).astype(np.float32)


def predictions(model, x):
    cpu = Cpu.native()
    program = compile_training(
        model, loss="cross-entropy", optimizer=SGD(lr=1.0), batch=len(x), cpu=cpu
    )
    return Outside(program, cpu).predict(x, model.parameters)


def test_a_torch_module_predicts_what_pytorch_does():
    net, x = everything(), images()
    model = load(net, x)
    assert {n: tuple(p.shape) for n, p in net.named_parameters()} == dict(model.shapes)
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(predictions(model, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [12, 20])
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter without onnxscript is the old one
def test_an_onnx_file_predicts_what_onnx_runtime_does(tmp_path, opset):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    net = everything()
    if opset == 12:  # norms and GELU as patterns of primitive operators
        net = torch.nn.Sequential(
            net.conv, net.norm, torch.nn.SiLU(), net.largest, torch.nn.GELU(), net.average,
            net.overall, torch.nn.Flatten(), torch.nn.Linear(8, 4),
        )  # fmt: skip
    path, x = tmp_path / "net.onnx", images()
    torch.onnx.export(
        net.eval(),
        (torch.from_numpy(x[:2]),),
        str(path),
        opset_version=opset,
        dynamo=False,
        input_names=["image"],
        dynamic_axes={"image": {0: "n"}},
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"image": x})[0]
    np.testing.assert_allclose(predictions(load(path), x), expected, rtol=1e-5, atol=1e-6)


def test_a_relax_module_is_read_back_as_it_was_emitted():
    from tvm.runtime import tensor

    model = load(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)), (6,))
    module = model.relax(2)
    stored = [
        tensor(np.ascontiguousarray(v.transpose(model.layout(n))))
        for n, v in model.parameters.items()
    ]
    function = module["main"].with_attr("params", stored).with_attr("num_input", 1)
    module.update_func(module.get_global_var("main"), function)
    read = load(module)
    assert read.nodes[0].op == "linear"
    x = np.ones((2, 6), np.float32)
    np.testing.assert_array_equal(predictions(read, x), predictions(model, x))


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.b = torch.nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.a(x), x], 0)


def frozen():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    return net


T = torch.nn


@pytest.mark.parametrize(
    ("net", "shape", "layer", "why"),
    [
        (
            T.Sequential(T.Conv2d(3, 4, 3), T.BatchNorm2d(4), T.Flatten()),
            (3, 5, 5),
            "1 (BatchNorm2d)",
            "mixes the examples",
        ),
        (T.Sequential(T.Linear(4, 4), T.Dropout()), (4,), "1 (Dropout)", "random numbers"),
        (T.Sequential(T.Linear(4, 4), T.ELU()), (4,), "1 (ELU)", "operator elu is not"),
        (
            T.Sequential(T.Conv2d(4, 4, 3, groups=2), T.Flatten()),
            (4, 5, 5),
            "0",
            "groups 2",
        ),
        (Shared(), (4,), "b", "shared with a.weight"),
        (Twice(), (4,), "a", "used more than once"),
        (Mixing(), (4,), "concat", "mixes examples"),
        (frozen(), (4,), "0", "is frozen"),
        (T.Sequential(T.Linear(4, 4)).double(), (4,), "0", "torch.float64"),
        (
            T.Sequential(T.MaxPool2d(2, ceil_mode=True), T.Flatten()),
            (3, 5, 5),
            "max_pool2d",
            "ceil",
        ),
    ],
)
def test_layers_without_private_gradients_are_refused_by_name(net, shape, layer, why):
    with pytest.raises(UnsupportedLayer) as refused:
        load(net, np.zeros((2, *shape), np.float32))
    assert refused.value.layer == layer
    assert why in refused.value.why
    assert refused.value.advice
    assert layer in str(refused.value)


def test_the_advice_for_batch_norm_is_group_norm():
    net = T.Sequential(T.Conv2d(3, 4, 3), T.BatchNorm2d(4), T.Flatten())
    with pytest.raises(UnsupportedLayer, match="use GroupNorm or LayerNorm instead"):
        load(net, np.zeros((2, 3, 5, 5), np.float32))


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelRefused, match="dict is no model"):
        load({})


def small():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.GroupNorm(1, 2), nn.Flatten())
    return load(net, (1, 4, 4))


def test_a_document_says_the_same_graph_without_weights():
    model = small()
    document = model.document()
    read = Model.from_document(document)
    assert read.document() == document
    assert read.nodes == model.nodes
    assert dict(read.shapes) == dict(model.shapes)
    assert not read.parameters
    import tvm

    tvm.ir.assert_structural_equal(read.relax(3), model.relax(3), map_free_vars=True)


def edited(change):
    top = json.loads(small().document())
    change(top)
    return json.dumps(top, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(type="myelin/model/2"), "of type 'myelin/model/2'"),
        (lambda d: d.update(extra=1), "must be an object with the keys"),
        (lambda d: d.pop("input"), "must be an object with the keys"),
        (lambda d: d.update(input=[1, 4, -4]), "positive numbers"),
        (lambda d: d.update(input=[1, 4, 4.0]), "positive numbers"),
        (lambda d: d.update(input=[1, True, 4]), "positive numbers"),
        (lambda d: d.update(input=[1, 4, 1 << 40]), "more than"),
        (lambda d: d.update(nodes=[]), "1 to 4096 operators"),
        (lambda d: d["nodes"][0].update(op="eval"), "not an operator of Myelin"),
        (lambda d: d["nodes"][0].update(inputs=["%in", "%9"]), "which nothing before it makes"),
        (lambda d: d["nodes"][0].update(inputs=["%in", ["x"]]), "are names"),
        (lambda d: d["nodes"][0]["attributes"].update(stride=[0, 1]), r"stride is \(0, 1\)"),
        (lambda d: d["nodes"][0]["attributes"].update(stride=[1, 1, 1]), "stride is"),
        (lambda d: d["nodes"][0]["attributes"].pop("stride"), "has the attributes"),
        (lambda d: d["nodes"][1]["attributes"].update(approximate="yes"), "approximate is 'yes'"),
        (lambda d: d["nodes"][2]["attributes"].update(epsilon=1), "epsilon is 1"),
        (lambda d: d["parameters"].append({"name": "z", "shape": [1]}), "z is used by no operator"),
        (lambda d: d["parameters"][0].update(name="../x"), "is no parameter name"),
        (lambda d: d["parameters"].append(d["parameters"][0]), "canonical form"),
    ],
)
def test_documents_are_read_strictly(change, reason):
    with pytest.raises((ModelRefused, UnsupportedLayer), match=reason):
        Model.from_document(edited(change))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_mutation_of_a_document_is_accepted_as_another_spelling(data):
    document = bytearray(small().document())
    at = data.draw(st.integers(0, len(document) - 1))
    document[at] = data.draw(st.integers(0, 255).filter(lambda b: b != document[at]))
    try:
        read = Model.from_document(bytes(document))
    except (ModelRefused, UnsupportedLayer):
        return
    assert read.document() == bytes(document)


def test_a_truncated_or_spaced_document_is_refused():
    document = small().document()
    with pytest.raises(ModelRefused, match="no JSON"):
        Model.from_document(document[:-1])
    with pytest.raises(ModelRefused, match="canonical form"):
        Model.from_document(document + b"\n")
    with pytest.raises(ModelRefused, match="at most"):
        Model.from_document(b" " * (1 << 21))


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter without onnxscript is the old one
def test_norms_of_equal_size_that_an_exporter_merged_are_parted(tmp_path, opset):
    runtime = pytest.importorskip("onnxruntime")
    t = torch.nn
    net = t.Sequential(
        *(t.Conv2d(1, 8, 3), t.GroupNorm(2, 8), t.ReLU(), t.Conv2d(8, 8, 3), t.GroupNorm(2, 8)),
        *(t.Flatten(), t.Linear(128, 8), t.LayerNorm(8), t.Linear(8, 8), t.LayerNorm(8)),
    ).eval()
    path, x = tmp_path / "net.onnx", torch.randn(4, 1, 8, 8)
    torch.onnx.export(net, x, path, opset_version=opset, dynamo=False)
    model = load(path, x.numpy())
    assert sum(value.size for value in model.parameters.values()) == sum(
        value.numel() for value in net.parameters()
    )
    program = compile_training(
        model, loss="cross-entropy", optimizer=SGD(lr=0.1), batch=4, cpu=Cpu.native()
    )
    found = Outside(program, Cpu.native()).predict(x.numpy(), model.parameters)
    session = runtime.InferenceSession(path)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("opset", [12, 17, 20])
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter without onnxscript is the old one
def test_the_tanh_form_of_gelu_is_recognised_in_onnx(tmp_path, opset):
    runtime = pytest.importorskip("onnxruntime")
    t = torch.nn
    net = t.Sequential(t.Linear(6, 8), t.GELU(approximate="tanh"), t.Linear(8, 3)).eval()
    path, x = tmp_path / "net.onnx", torch.randn(4, 6)
    torch.onnx.export(net, x, path, opset_version=opset, dynamo=False)
    model = load(path, x.numpy())
    assert [node.op for node in model.nodes] == ["linear", "gelu", "linear"]
    session = runtime.InferenceSession(path)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(predictions(model, x.numpy()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter without onnxscript is the old one
def test_an_unknown_onnx_operator_is_refused_by_its_node(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LeakyReLU(), torch.nn.Linear(8, 3))
    path = tmp_path / "net.onnx"
    torch.onnx.export(net.eval(), torch.randn(4, 6), path, opset_version=17, dynamo=False)
    with pytest.raises(UnsupportedLayer, match=r"layer /1/LeakyRelu is refused: the ONNX operator"):
        load(path, np.zeros((4, 6), np.float32))


def test_what_is_no_onnx_file_is_refused(tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "net.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(ModelRefused, match=r"net.onnx is no ONNX file"):
        load(path, np.zeros((4, 6), np.float32))


@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter without onnxscript is the old one
def test_an_example_of_another_shape_than_the_graph_s_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    torch.onnx.export(torch.nn.Linear(6, 3).eval(), torch.randn(4, 6), path, dynamo=False)
    with pytest.raises(ModelRefused, match=r"takes inputs of shape \[6\] .* the example has \[7\]"):
        load(path, np.zeros((4, 7), np.float32))


class Block(torch.nn.Module):
    """Two group norms of equal size, a residual and a mean over the picture."""

    def __init__(self):
        super().__init__()
        t = torch.nn
        self.first, self.second = t.Conv2d(3, 8, 3, padding=1), t.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other, self.last = t.GroupNorm(2, 8), t.GroupNorm(2, 8), t.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.nn.functional.silu(self.other(self.second(x)))
        return self.last(torch.nn.functional.gelu(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")  # onnxscript's own
@pytest.mark.parametrize("batch", ["free", 1, 4])
def test_files_of_pytorch_s_default_exporter_predict_what_onnx_runtime_does(tmp_path, batch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = Block().eval()
    with torch.no_grad():
        net.other.weight.uniform_(0.5, 2)
    path, x = tmp_path / "net.onnx", torch.randn(4 if batch == "free" else batch, 3, 6, 6)
    shapes = ({0: "batch"},) if batch == "free" else None
    torch.onnx.export(net, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    model = load(path, x.numpy())
    assert sum(value.size for value in model.parameters.values()) == sum(
        value.numel() for value in net.parameters()
    )
    session = runtime.InferenceSession(path)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(predictions(model, x.numpy()), expected, rtol=1e-5, atol=1e-6)


def small_onnx(path, nodes, initializers, size=4):
    """Writes a file that maps x to y, both of `size` numbers."""
    onnx = pytest.importorskip("onnx")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ins, outs, **given) for op, ins, outs, given in nodes],
        "graph",
        [info("x", onnx.TensorProto.FLOAT, [None, size])],
        [info("y", onnx.TensorProto.FLOAT, [None, size])],
        [onnx.numpy_helper.from_array(v, name) for name, v in initializers.items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def test_a_bias_parted_from_another_takes_a_name_that_is_free(tmp_path):
    weights = {name: np.eye(4, dtype=np.float32) * k for k, name in enumerate("uvw", 1)}
    bias = np.zeros(4, np.float32)
    nodes = [
        ("Gemm", ["x", "u", "b"], ["p"], {}),
        ("Gemm", ["p", "v", "b"], ["q"], {}),
        ("Gemm", ["q", "w", "b.2"], ["y"], {}),
    ]
    path = tmp_path / "net.onnx"
    small_onnx(path, nodes, {**weights, "b": bias, "b.2": bias + 1})
    x = np.ones((2, 4), np.float32)
    model = load(path, x)
    assert sorted(model.parameters) == ["b", "b.2", "b.2_", "u", "v", "w"]
    np.testing.assert_allclose(predictions(model, x), np.full((2, 4), 7.0), rtol=1e-6)


class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


@pytest.mark.parametrize("net", [Branching(), torch.nn.Linear(7, 3)], ids=["branch", "shape"])
def test_what_torch_cannot_trace_is_refused(net):
    with pytest.raises(ModelRefused, match=r"torch.export cannot trace the module"):
        load(net, np.ones((4, 6), np.float32))


@pytest.mark.parametrize("value", [0.5, None], ids=["constant", "varied"])
def test_a_linear_weight_that_an_onnx_file_shares_is_refused(tmp_path, value):
    onnx = pytest.importorskip("onnx")
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    if value is not None:
        weight[:] = value
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w"], ["y"]),
        ],
        "shared",
        [info("x", onnx.TensorProto.FLOAT, [None, 4])],
        [info("y", onnx.TensorProto.FLOAT, [None, 4])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "net.onnx"
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    with pytest.raises(UnsupportedLayer, match="its parameter w is used more than once"):
        load(path, np.ones((2, 4), np.float32))
