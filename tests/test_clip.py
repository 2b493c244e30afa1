"""clip_grad_norm_ and get_total_norm: torch's, nearer to the truth, and written once or not at all.

The bodies of the last part follow test_nn.py of torch, which does not ship.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.testing import assert_close

import fastopt
from cases import LAYOUTS
from helpers import assert_equal

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def parameters(layout, dtype, scale=1.0):
    torch.manual_seed(0)
    where = LAYOUTS[layout]
    params = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in where.shapes]
    for param in params:
        values = torch.randn(param.shape, dtype=torch.promote_types(dtype, torch.float32))
        param.grad = where.grad((scale * values).to(dtype))
    return params


def grads_of(params):
    return [param.grad.clone() for param in params]


def with_grads(grads):
    params = [Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params


def truth(grads):
    return math.sqrt(sum(g.to(torch.complex128).abs().square().sum().item() for g in grads))


@every_layout
@every_dtype
def test_as_torch_clips(layout, dtype):
    ours, stock = parameters(layout, dtype), parameters(layout, dtype)
    norm = fastopt.clip_grad_norm_(ours, 1.0)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(stock, 1.0))
    assert_close(grads_of(ours), grads_of(stock))
    assert norm.shape == ()


@every_layout
@every_dtype
def test_norm_is_the_truth_rounded(layout, dtype):
    params = parameters(layout, dtype)
    norm = fastopt.get_total_norm(grads_of(params))
    expected = torch.tensor(truth(grads_of(params)), dtype=torch.float64).to(norm.dtype)
    # In float64 itself the order of summation shows.
    assert_close(norm, expected, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


def test_nearer_to_the_truth_than_torch():
    torch.manual_seed(0)
    ours, stock = [], []
    for _ in range(20):
        grads = [torch.randn(100_000) for _ in range(3)]
        expected = truth(grads)
        ours.append(abs(fastopt.get_total_norm(grads).item() / expected - 1))
        stock.append(abs(torch.nn.utils.get_total_norm(grads).item() / expected - 1))
    assert max(ours) <= 2**-24
    assert sum(ours) < sum(stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(dtype, magnitude):
    params = with_grads([torch.full((100,), magnitude).to(dtype)])
    value = params[0].grad[0].item()
    norm = fastopt.clip_grad_norm_(params, 1.0)
    assert_close(norm, torch.tensor(10 * value, dtype=dtype))
    expected = value * min(1, 1 / (10 * value + 1e-6))
    assert_close(params[0].grad, torch.full((100,), expected, dtype=dtype))


@given(
    st.lists(st.lists(st.floats(width=32), max_size=70), max_size=4),
    st.floats(0, allow_infinity=False, width=32),
)
@settings(deadline=None)
def test_any_numbers_are_clipped_as_by_torch(numbers, limit):
    grads = [torch.tensor(own, dtype=torch.float32) for own in numbers]
    ours, stock = with_grads(grads), with_grads([grad.double() for grad in grads])
    norm = fastopt.clip_grad_norm_(ours, limit)
    expected = torch.nn.utils.clip_grad_norm_(stock, limit)
    assert_close(norm, expected.float() if grads else expected, equal_nan=True)
    for mine, its in zip(ours, stock, strict=True):
        assert_close(mine.grad, its.grad.float(), equal_nan=True)


def test_gradients_are_not_written_where_the_norm_is_within():
    params = parameters("sizes", torch.float32)
    versions = [param.grad._version for param in params]
    fastopt.clip_grad_norm_(params, 1e9)
    assert [param.grad._version for param in params] == versions
    fastopt.clip_grad_norm_(params, 1e-3)
    assert [param.grad._version for param in params] == [version + 1 for version in versions]


def test_an_infinite_limit_leaves_all_as_it_is_be_the_norm_infinite_too():
    params = with_grads([torch.tensor([1.0, math.inf])])
    assert fastopt.clip_grad_norm_(params, math.inf) == math.inf
    assert_equal(params[0].grad, torch.tensor([1.0, math.inf]))


def test_dtypes_and_missing_gradients_mixed():
    params = with_grads([torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(4)])
    params.append(Parameter(torch.ones(1)))
    norm = fastopt.clip_grad_norm_(iter(params), 1.5)
    assert_equal(norm, torch.tensor(3.0))
    assert params[1].grad.dtype == torch.bfloat16
    assert_close(params[0].grad, torch.full((3,), 0.5))
    assert params[3].grad is None


def test_limit_as_a_tensor():
    params = with_grads([torch.full((4,), 3.0)])
    fastopt.clip_grad_norm_(params, torch.tensor([3.0]))
    assert_close(params[0].grad, torch.full((4,), 1.5))


def test_a_gradient_given_twice_is_clipped_twice_as_by_torch():
    ours, stock = with_grads([torch.full((4,), 3.0)]), with_grads([torch.full((4,), 3.0)])
    assert_close(
        fastopt.clip_grad_norm_(ours * 2, 1.0), torch.nn.utils.clip_grad_norm_(stock * 2, 1.0)
    )
    assert_close(ours[0].grad, stock[0].grad)


@pytest.mark.parametrize("norm_type", [1.0, math.inf, 0.5])
def test_other_norms_are_torchs(norm_type):
    ours, stock = parameters("large", torch.float32), parameters("large", torch.float32)
    assert_equal(
        fastopt.clip_grad_norm_(ours, 1.0, norm_type),
        torch.nn.utils.clip_grad_norm_(stock, 1.0, norm_type),
    )
    assert_equal(grads_of(ours), grads_of(stock))


def test_sparse_gradients_are_torchs():
    def embedding():
        torch.manual_seed(0)
        module = torch.nn.Embedding(10, 3, sparse=True)
        module(torch.tensor([1, 2])).sum().backward()
        module.weight.grad = module.weight.grad.coalesce()  # of others torch takes no norm
        return module.weight

    ours, stock = embedding(), embedding()
    try:
        expected = torch.nn.utils.clip_grad_norm_([stock], 1.0, foreach=False)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            fastopt.clip_grad_norm_([ours], 1.0, foreach=False)
    else:
        assert_equal(fastopt.clip_grad_norm_([ours], 1.0, foreach=False), expected)
        assert_equal(ours.grad.to_dense(), stock.grad.to_dense())


def test_an_expanded_gradient_is_torchs_to_refuse():
    param = Parameter(torch.zeros(4))
    param.grad = torch.tensor([3.0]).expand(4)
    assert_equal(fastopt.get_total_norm([param.grad]), torch.tensor(6.0))
    with pytest.raises(RuntimeError, match="unsupported operation"):
        fastopt.clip_grad_norm_([param], 1.0)
    assert_equal(param.grad, torch.full((4,), 3.0))


def test_backend_by_name():
    params = with_grads([torch.full((4,), 3.0)])
    assert fastopt.clip_grad_norm_(params, 10.0, backend="cpu") == 6
    assert fastopt.clip_grad_norm_(params, 10.0, backend="torch") == 6
    with pytest.raises(RuntimeError, match="backend='cuda' cannot take these gradients"):
        fastopt.clip_grad_norm_(params, 10.0, backend="cuda")


def test_the_same_bits_with_any_number_of_threads():
    torch.manual_seed(0)
    grads = [torch.randn(n) for n in (100_000, 3, 70_001)]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(fastopt.get_total_norm([grad.double() for grad in grads]).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1


# torch's own tests: TestNN.test_clip_grad_norm and its kin.


def scaled(before, after):
    scales = torch.cat([(a / b).view(-1) for a, b in zip(after, before, strict=True)])
    assert scales.std() < 1e-5
    return scales[0]


@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"])
@pytest.mark.parametrize("foreach", [False, True])
def test_clip_grad_norm(norm_type, foreach):
    linear = torch.nn.Linear(10, 10)
    max_norm = 2.0

    def compute_norm(norm_type):
        norm_type = float(norm_type)
        if norm_type != math.inf:
            total = sum(p.grad.abs().pow(norm_type).sum() for p in linear.parameters())
            return pow(total, 1.0 / norm_type)
        return max(p.grad.abs().max() for p in linear.parameters())

    def compare_scaling(grads):
        found = scaled(grads, [p.grad for p in linear.parameters()])
        assert found <= 1
        return found

    grads = torch.arange(1.0, 101).view(10, 10), torch.ones(10).div(1000)
    for param, grad in zip(linear.parameters(), grads, strict=True):
        param.grad = grad.clone()
    norm_before = compute_norm(norm_type)
    norm = fastopt.clip_grad_norm_(
        linear.parameters(), max_norm, norm_type=norm_type, foreach=foreach
    )
    norm_after = compute_norm(norm_type)
    assert_close(norm, norm_before)
    assert_close(norm_after, torch.tensor(max_norm))
    assert norm_after <= norm_before
    compare_scaling(grads)
    assert_close(
        fastopt.get_total_norm([p.grad for p in linear.parameters()], norm_type, foreach=foreach),
        norm_after,
    )

    # Small gradients should be left unchanged
    grads = torch.rand(10, 10).div(10000), torch.ones(10).div(500)
    for param, grad in zip(linear.parameters(), grads, strict=True):
        param.grad = grad.clone()
    norm_before = compute_norm(norm_type)
    norm = fastopt.clip_grad_norm_(
        linear.parameters(), max_norm, norm_type=norm_type, foreach=foreach
    )
    assert_close(norm, norm_before)
    assert_close(compute_norm(norm_type), norm_before)
    assert norm_before <= max_norm
    assert compare_scaling(grads) == pytest.approx(1)


@pytest.mark.parametrize("norm_type", [0.1, 1, 2, 3.0, "inf"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_error_if_nonfinite(norm_type, bad):
    def gen_parameters(num_elements):
        param = Parameter(torch.ones(10))
        param.grad = torch.ones(10)
        param.grad[:num_elements] = bad
        return param

    message = "is non-finite, so it cannot be clipped"
    params = [gen_parameters(0), gen_parameters(3)]
    before = grads_of(params)
    with pytest.raises(RuntimeError, match=message):
        fastopt.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=message):
        fastopt.get_total_norm(before, norm_type, error_if_nonfinite=True)
    assert_equal(grads_of(params), before)
    norm = fastopt.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=False)
    assert not norm.isfinite()
    fine = [gen_parameters(0), gen_parameters(0)]
    fastopt.clip_grad_norm_(fine, 1.0, norm_type, error_if_nonfinite=True)


def test_clip_grad_norm_error_texts_are_torchs():
    params = with_grads([torch.tensor([math.nan])])
    texts = []
    for clip in (fastopt.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        with pytest.raises(RuntimeError) as error:
            clip(params, 1.0, error_if_nonfinite=True)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_single_tensor_and_nothing_at_all():
    param = Parameter(torch.zeros(2, 5))
    param.grad = torch.arange(1.0, 11).view(2, 5)
    expected = param.grad.norm()
    assert_close(fastopt.clip_grad_norm_(param, 3.0), expected)
    assert_close(param.grad.norm(), torch.tensor(3.0))
    assert_equal(fastopt.clip_grad_norm_([], 3.0), torch.tensor(0.0))
    assert_equal(fastopt.clip_grad_norm_([Parameter(torch.ones(1))], 3.0), torch.tensor(0.0))
    assert_equal(fastopt.get_total_norm([]), torch.tensor(0.0))
