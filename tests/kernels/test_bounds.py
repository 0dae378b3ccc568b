import pytest
from templates import every_template
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from myelin.cpu import LEVELS
from myelin.kernels import bf16, stream
from myelin.kernels.bounds import BoundsError, prove
from myelin.kernels.tir import Kernel, load, local, prefetch, serial, splat, store


@pytest.mark.parametrize("level", LEVELS, ids=lambda cpu: cpu.level)
def test_every_template_is_in_bounds(level):
    for name, kernel in every_template(level).items():
        prove(kernel, name)


def kernel(body, rows=10):
    with Kernel(x=(rows,), y=(rows,)) as built:
        x, y = built.buffers
        with serial(rows) as i:
            body(x, y, i)
    return built.function


def branch_on_data(x, y, i):
    with T.If(load(x, i) > T.float32(0)), T.Then():
        store(y, load(x, i), i)


def foreign_words(x, y, i):
    with T.attr(T.int32(0), "pragma_import_llvm", bf16.WORDS + " "):
        store(y, load(x, i), i)


def foreign_tile_words(x, y, i):
    with T.attr(T.int32(0), "pragma_import_llvm", bf16.TILE_WORDS.replace("%a", "%b", 1)):
        store(y, load(x, i), i)


def foreign_function(x, y, i):
    store(y, T.call_pure_extern("float32", "getpid", load(x, i)), i)


def prefetch_of_a_number(x, y, i):
    del x, y
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", i, 0, 2, 1))


def prefetch_with_data(x, y, i):
    hint = T.Cast("int32", load(y, i))
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", T.address_of(x[i]), 0, hint, 1))


def prefetch_of_two(x, y, i):
    address = tirx.call_intrin("handle", "tirx.address_of", x[i], y[i + 1])
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))


def address_taken(x, y, i):
    store(y, tirx.call_intrin("float32", "tirx.reinterpret", T.address_of(x[i])), i)


def loop_on_data(x, y, i):
    with T.serial(T.Cast("int32", load(x, i))) as j:
        store(y, splat(0.0, 1), j)


def bound_data(x, y, i):
    place = T.bind(T.Cast("int32", load(x, i)))
    store(y, splat(0.0, 1), place % 10)


@pytest.mark.parametrize(
    ("body", "buffer", "found"),
    [
        (lambda x, y, i: store(y, load(x, i + 1), i), "x", "reaches 1 … 10"),
        (lambda x, y, i: store(y, load(x, i), i - 1), "y", "reaches -1 … 8"),
        (lambda x, y, i: store(y, load(x, i), 2 * i), "y", "reaches 0 … 18"),
        (lambda x, y, i: store(y, load(x, i, lanes=2), 0), "x", "reaches 1 … 10"),
        (lambda x, y, i: store(y, splat(0.0, 4), i), "y", "reaches 3 … 12"),
        (lambda x, y, i: store(y, load(x, 10), i), "x", "reaches 10, outside of 0 … 9"),
        (lambda x, y, i: store(local(4), load(x, i), i), "(local)", "reaches 0 … 9"),
        (
            lambda x, y, i: store(y, load(x, T.Cast("int32", load(x, i))), i),
            "x",
            "index depends on data",
        ),
        (bound_data, "y", "index depends on data"),
        (lambda x, y, i: prefetch(x, i + 1), "x", "reaches 1 … 10"),
        (lambda x, y, i: prefetch(x, T.Cast("int32", load(x, i))), "x", "index depends on data"),
        (prefetch_of_a_number, "tirx.prefetch", "is not of an element"),
        (prefetch_with_data, "tirx.prefetch", "is not of an element"),
        (prefetch_of_two, "tirx.prefetch", "is not of an element"),
        (address_taken, "tirx.address_of", "call is not one that computes a value"),
        (branch_on_data, "condition", "control flow depends on data"),
        (loop_on_data, "loop", "control flow depends on data"),
        (
            lambda x, y, i: store(y, T.exp(load(x, i)), i),
            "tirx.exp",
            "call is not one that computes a value",
        ),
        (foreign_words, "AttrStmt", "not one that this proof understands"),
        (foreign_tile_words, "AttrStmt", "not one that this proof understands"),
        (foreign_function, "getpid", "function is not one of ours"),
        (
            lambda x, y, i: T.evaluate(T.call_extern("int32", "puts", x.data)),
            "puts",
            "function is not one of ours",
        ),
        (
            lambda x, y, i: T.evaluate(T.address_of(x[20])),
            "tirx.address_of",
            "call is not one that computes a value",
        ),
    ],
)
def test_access_that_is_not_shown_inside_is_refused_by_name(body, buffer, found):
    with pytest.raises(BoundsError, match=r"kernel wild") as refused:
        prove(kernel(body), "wild")
    assert refused.value.kernel == "wild"
    assert refused.value.buffer == buffer
    assert found in refused.value.range


def line(buffer, at, lanes=16, value=0.0, result="int32"):
    value = T.Broadcast(T.float32(value) if isinstance(value, float) else T.int32(value), lanes)
    T.evaluate(T.call_extern(result, stream.LINE, T.address_of(buffer[at]), value))


def end():
    T.evaluate(T.call_extern("int32", stream.END))


@pytest.mark.parametrize(
    ("body", "buffer", "found"),
    [
        (lambda x, y, i: line(y, i * 16), "y", "reaches 0 … 1008"),
        (lambda x, y, i: line(y, i % 4 * 8), "y", "not shown to begin a line"),
        (lambda x, y, i: line(y, 3), "y", "not shown to begin a line"),
        (lambda x, y, i: line(y, 0, 8), stream.LINE, "is not of a line's numbers"),
        (lambda x, y, i: line(y, T.Cast("int32", load(x, i))), "y", "depends on data"),
        (lambda x, y, i: line(local(64), 0), "(local)", "is no argument"),
        (lambda x, y, i: line(y, T.Ramp(0, 1, 4)), stream.LINE, "is not of an element"),
        (lambda x, y, i: line(y, 0, value=0), stream.LINE, "is not of a line's numbers"),
        (lambda x, y, i: line(y, 0, result="int64"), stream.LINE, "function is not one of ours"),
        (lambda x, y, i: line(y, 0), "kernel", "stream_end is missing"),
        (
            lambda x, y, i: T.evaluate(T.call_extern("int32", stream.LINE, i, splat(0.0, 16))),
            stream.LINE,
            "function is not one of ours",
        ),
        (
            lambda x, y, i: T.evaluate(T.call_extern("int32", stream.END, i)),
            stream.END,
            "function is not one of ours",
        ),
    ],
)
def test_lines_past_the_caches_begin_where_lines_do(body, buffer, found):
    def good(x, y, i):
        line(y, i % 4 * 16)
        end()

    prove(kernel(good, rows=64))
    with pytest.raises(BoundsError, match=r"kernel wild") as refused:
        prove(kernel(body, rows=64), "wild")
    assert refused.value.buffer == buffer
    assert found in refused.value.range


def test_a_line_is_of_float32():
    with Kernel(y=((64,), "int8")) as built:
        line(built.buffers[0], 48)
    with pytest.raises(BoundsError, match="is not of a line's numbers"):
        prove(built.function, "wild")


def test_every_thread_ends_what_it_stores():
    def stored(inside, after):
        with Kernel(y=(64,)) as built:
            with T.parallel(4) as i:
                with serial(2):
                    line(built.buffers[0], i * 16)
                inside(i)
            after(0)
        return built.function

    def sometimes(i):
        with T.If(i < 2), T.Then():
            end()

    prove(stored(lambda _: end(), lambda _: None))
    for inside in (lambda _: None, sometimes):
        with pytest.raises(BoundsError, match="stream_end is missing"):
            prove(stored(inside, lambda _: end()), "wild")


def test_rows_that_are_no_lines_begin_none():
    def body(x, y, i):
        line(y, 0)

    with pytest.raises(BoundsError, match="begin a line"):
        prove(kernel(body, rows=40), "wild")


def foreign_stream(x, y, i):
    with T.attr(T.int32(0), "pragma_import_llvm", stream.WORDS.replace("64", "4")):
        store(y, load(x, i), i)


def test_other_words_of_streams_are_refused():
    with pytest.raises(BoundsError, match="not one that this proof understands"):
        prove(kernel(foreign_stream), "wild")


def test_both_values_of_a_select_are_checked():
    def body(x, y, i):
        store(y, T.Select(i < 9, load(x, i + 1), load(x, i)), i)

    with pytest.raises(BoundsError, match=r"x.*reaches 1 … 10"):
        prove(kernel(body), "wild")


def test_loop_condition_is_used():
    def body(x, y, i):
        with T.If(i < 9), T.Then():
            store(y, load(x, i + 1), i)

    prove(kernel(body))


def test_parameter_with_strides_is_refused():
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, T.prim_func():
        T.func_name("wild")
        x = T.arg("x", T.Buffer((3, 4), "float32", strides=(8, 1)))
        T.buffer_store(x, T.float32(0), [0, 0])
    with pytest.raises(BoundsError, match="strides"):
        prove(builder.get(), "wild")
