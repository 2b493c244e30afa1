"""Tensors anywhere in memory, with any strides, and any number of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

import fastopt
from cases import (
    BFLOAT16,
    CHUNK,
    COMPLEX64,
    FLOAT32,
    FLOAT64,
    MIXED,
    PARALLEL,
    channels_last,
    contiguous,
    every_second,
    state_names,
    transposed,
    unaligned,
)
from helpers import (
    assert_refused,
    assert_same_bits,
    assert_same_tensors,
    every_optimizer,
    forloop,
    make,
    step_alike,
    tensors_of,
)

PLACES = [contiguous, unaligned, every_second, transposed, channels_last]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["float32", "complex64"])
def test_parameter_gradient_and_state_each_have_their_own_strides(name, dtype):
    combinations = list(itertools.product(PLACES, repeat=3))
    values = [torch.randn(2, 3, 4, 5, dtype=dtype) for _ in combinations]
    params = [
        place(value).requires_grad_()
        for value, (place, _, _) in zip(values, combinations, strict=True)
    ]
    twins = [Parameter(value.clone()) for value in values]
    optimizer, reference = make(fastopt, name, params), forloop(name, twins)
    for _ in range(3):
        for param, twin, (_, place, _) in zip(params, twins, combinations, strict=True):
            twin.grad = torch.randn_like(twin)
            param.grad = place(twin.grad)
        optimizer.step()
        reference.step()
        for param, (_, _, place) in zip(params, combinations, strict=True):
            for key, state in optimizer.state[param].items():
                if state.dim() > 0:
                    optimizer.state[param][key] = place(state)
    assert_same_tensors(optimizer, reference)


@st.composite
def strided(draw, shape):
    """A place of that shape: dimensions in any order in memory, with gaps between them or none."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([(0, 1), (0, 1), (1, 2), (3, 1)])) for _ in shape]

    def place(values):
        wider = [(size + more) * step for size, (more, step) in zip(shape, gaps, strict=True)]
        base = values.new_full([wider[d] for d in order], torch.nan)
        view = base.permute([order.index(d) for d in range(len(shape))])
        for d, (size, (_, step)) in enumerate(zip(shape, gaps, strict=True)):
            view = view.narrow(d, 0, size * step)[(slice(None),) * d + (slice(None, None, step),)]
        return view.copy_(values)

    return place


# Around the edge of a tile, its elements and those of a chunk, see csrc/cpu/tile.h.
LENGTHS = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 64, 65, 100, 1023, 1025, CHUNK + 1])
SHAPES = st.lists(LENGTHS, max_size=5).filter(
    lambda shape: math.prod(max(size, 1) for size in shape) <= 3 * PARALLEL
)
DTYPES = [FLOAT32, FLOAT64, BFLOAT16, COMPLEX64, MIXED[0]]


@every_optimizer
@given(data=st.data(), shape=SHAPES, dtypes=st.sampled_from(DTYPES))
def test_strides_change_no_bit(name, data, shape, dtypes):
    def draw():
        return data.draw(strided(shape))

    values = torch.randn(shape, dtype=dtypes.param)
    params = [draw()(values).requires_grad_(), Parameter(values.clone())]
    optimizers = [make(fastopt, name, [param]) for param in params]
    for param in params:
        param.grad_dtype = dtypes.grad
    for _ in range(2):
        grad = torch.randn(shape, dtype=dtypes.grad)
        for param, place in zip(params, [draw(), contiguous], strict=True):
            param.grad = place(grad)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer, param in zip(optimizers, params, strict=True):
            state = optimizer.state[param]
            for key in state_names(optimizer):
                place = draw() if param is params[0] else contiguous
                state[key] = place(state[key].to(dtypes.state))
    assert_same_bits(*optimizers)


@every_optimizer
def test_gap_elements_of_a_strided_parameter_are_left_alone(name):
    base = torch.ones(6, 8)
    param = base[1:5, 1::3].detach().requires_grad_()
    optimizer = make(fastopt, name, [param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    stepped = torch.zeros_like(base, dtype=torch.bool)
    stepped[1:5, 1::3] = True
    assert (base[stepped] != 1).all()
    assert (base[~stepped] == 1).all()


def lazily_conjugated(grad):
    return grad.conj_physical().conj()


def lazily_negated(grad):
    """The imaginary part of a conjugate is a view that negates when read."""
    return torch.complex(torch.zeros_like(grad), -grad).conj().imag


@pytest.mark.filterwarnings("ignore:fastopt.* steps through torch.optim")
@every_optimizer
@pytest.mark.parametrize(
    ("dtype", "view"), [(torch.complex64, lazily_conjugated), (torch.float32, lazily_negated)]
)
def test_lazy_conjugate_and_negative_gradients(name, dtype, view):
    param, twin = (Parameter(torch.ones(3, 5, dtype=dtype)) for _ in range(2))
    assert view(param.detach()).is_conj() or view(param.detach()).is_neg()
    optimizer, reference = make(fastopt, name, [param]), forloop(name, [twin])
    for _ in range(3):
        step_alike(optimizer, reference, view)
    assert_same_tensors(optimizer, reference)


@every_optimizer
@pytest.mark.parametrize(
    "overlapping",
    [
        lambda: torch.ones(1, 3).expand(4, 3),
        lambda: torch.ones(8).as_strided((3, 4), (2, 1)),
        lambda: torch.ones(7).unfold(0, 3, 1),
    ],
    ids=["expanded", "as_strided", "unfolded"],
)
def test_parameter_overlapping_itself_is_refused(name, overlapping):
    params = [Parameter(torch.ones(3)), overlapping().requires_grad_()]
    optimizer = make(fastopt, name, params)
    for param in params:
        param.grad = torch.ones_like(param)
    assert_refused(optimizer, "parameter 1 of group 0")


@every_optimizer
def test_state_overlapping_itself_is_refused(name):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(4, 3))]
    optimizer = make(fastopt, name, params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[params[1]][state_names(optimizer)[0]] = torch.ones(3).expand(4, 3)
    assert_refused(optimizer, "parameter 1 of group 0")


@every_optimizer
def test_expanded_gradient_is_read_like_any_other(name):
    """Backward of a sum hands one out: a single number with strides of 0."""
    param, twin = Parameter(torch.ones(3, 4)), Parameter(torch.ones(3, 4))
    optimizer, reference = make(fastopt, name, [param]), forloop(name, [twin])
    param.grad = torch.tensor(0.5).expand(3, 4)
    twin.grad = torch.full((3, 4), 0.5)
    optimizer.step()
    reference.step()
    assert_same_tensors(optimizer, reference)


@every_optimizer
def test_overlapping_dimension_of_size_one_is_no_overlap(name):
    param, twin = (
        torch.ones(4).as_strided((1, 4), (0, 1)).requires_grad_(),
        Parameter(torch.ones(1, 4)),
    )
    optimizer, reference = make(fastopt, name, [param]), forloop(name, [twin])
    param.grad, twin.grad = torch.ones(1, 4), torch.ones(1, 4)
    optimizer.step()
    reference.step()
    assert_same_tensors(optimizer, reference)


def assert_many_step_like_forloop(name, shapes, groups=1):
    def grouped(params):
        return [{"params": params[i::groups], "lr": 0.1 / (1 + i)} for i in range(groups)]

    values = [torch.randn(shape) for shape in shapes]
    params, twins = ([Parameter(value.clone()) for value in values] for _ in range(2))
    optimizer, reference = make(fastopt, name, grouped(params)), forloop(name, grouped(twins))
    for _ in range(2):
        step_alike(optimizer, reference)
    for ours, torchs in zip(flat(optimizer), flat(reference), strict=True):
        torch.testing.assert_close(ours, torchs)


def flat(optimizer):
    """The parameters as one tensor, and so each kind of state: thousands are slow to compare."""
    by_name = {}
    for tensors in tensors_of(optimizer):
        for name, tensor in tensors.items():
            by_name.setdefault(name, []).append(tensor.detach().flatten())
    return [torch.cat(by_name[name]) for name in sorted(by_name)]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])  # 10 s each
def test_21001_tensors(name):
    assert_many_step_like_forloop(name, [(2,)] * 21_001)


@every_optimizer
def test_465_groups_of_odd_sizes(name):
    assert_many_step_like_forloop(name, [(n % 7, 3) for n in range(930)], groups=465)


@every_optimizer
@pytest.mark.parametrize("last", [(0,), (3, 0)], ids=str)
def test_zero_size_last_tensor_drops_nothing(name, last):
    assert_many_step_like_forloop(name, [(5,), (CHUNK + 1,), last])


@every_optimizer
def test_parameters_may_share_one_storage(name):
    """As slices of a flat buffer do, with offsets of every alignment."""
    flat_values = torch.randn(1 + 3 + 7 + CHUNK)
    buffer = flat_values.clone()
    sizes = [1, 3, 7, CHUNK]
    params = [view.requires_grad_() for view in buffer.split(sizes)]
    twins = [Parameter(value.clone()) for value in flat_values.split(sizes)]
    optimizer, reference = make(fastopt, name, params), forloop(name, twins)
    step_alike(optimizer, reference)
    assert_same_tensors(optimizer, reference)
    torch.testing.assert_close(buffer, torch.cat([twin.detach() for twin in twins]))
