"""What a rule keeps beside per-element states: counts of its own, and states that begin elsewhere
than at zero."""

import pytest
import torch
from torch.nn import Parameter

import fastopt
from cases import BFLOAT16, FLOAT32, FLOAT64, Case, count_names
from helpers import assert_agrees_with_torch, assert_equal, pair, snapshot, train

COUNTING = pytest.mark.parametrize("name", ["NAdam", "ASGD"])


@COUNTING
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
def test_counts_keep_their_dtype_through_a_checkpoint(name, dtypes):
    """torch casts all but the step's to the parameter's dtype: bfloat16, say."""
    case = Case(name, "everything", dtypes, "sizes")
    saved = case.make_optimizer(case.parameters(), fastopt)
    train(case, saved, range(3))
    loaded = case.make_optimizer(saved.param_groups[0]["params"], fastopt)
    loaded.load_state_dict(saved.state_dict())
    for state in loaded.state.values():
        assert {state[key].dtype for key in count_names(loaded)} == {torch.float32}
    assert_equal(snapshot(loaded), snapshot(saved))


@COUNTING
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_counts_of_other_dtypes_are_counted_on(name, dtype):
    """As torch's load_state_dict leaves them."""
    case = Case(name, "everything", FLOAT64, "sizes")
    ours, exact = (case.make_optimizer(case.parameters(), fastopt) for _ in range(2))
    for optimizer in (ours, exact):
        train(case, optimizer, range(3))
    for mine, its in zip(ours.state.values(), exact.state.values(), strict=True):
        for key in count_names(ours)[1:]:
            mine[key] = its[key].to(dtype)
            its[key].copy_(mine[key])
    for optimizer in (ours, exact):
        train(case, optimizer, range(3, 4))
    for mine, its in zip(ours.state.values(), exact.state.values(), strict=True):
        for key in count_names(ours):
            torch.testing.assert_close(mine[key].float(), its[key], rtol=1e-6, atol=0)


@COUNTING
def test_slots_of_one_group_may_count_apart(name):
    """A parameter that has missed steps, beside others: no scalars of its neighbour's."""
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        params = optimizer.param_groups[0]["params"]
        for step in range(5):
            case.set_gradients(params, step)
            for late in params[step % 3 :: 3]:
                late.grad = None
            optimizer.step()
    assert_agrees_with_torch(*pairs)


@COUNTING
def test_equal_steps_with_unequal_counts_are_told_apart(name):
    case = Case(name, "default", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        train(case, optimizer, range(2))
        for i, state in enumerate(optimizer.state.values()):
            state[count_names(optimizer)[1]].mul_(1 - 0.1 * i)
        train(case, optimizer, range(2, 4))
    assert_agrees_with_torch(*pairs)


@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [None, (), (1,)], ids=str)
def test_states_that_begin_at_the_rate_do_so_in_each_group(name, dtype, shape):
    lr = 0.125 if shape is None else torch.full(shape, 0.125, dtype=torch.float64)

    def trained(module, **options):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(3, dtype=dtype)) for _ in range(2)]
        groups = [{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": 0.5}]
        optimizer = getattr(module, name)(groups, **options)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        return optimizer

    assert_agrees_with_torch(trained(fastopt), trained(torch.optim, foreach=False))


def test_adagrad_of_a_group_added_later_begins_at_the_initial_value():
    def trained(module, **options):
        optimizer = module.Adagrad(
            [Parameter(torch.ones(3, dtype=torch.float64))],
            initial_accumulator_value=0.25,
            **options,
        )
        later = Parameter(torch.ones(2, dtype=torch.complex128))
        optimizer.add_param_group({"params": [later]})
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        optimizer.step()
        return optimizer

    assert_agrees_with_torch(trained(fastopt), trained(torch.optim, foreach=False))


@pytest.mark.filterwarnings("ignore:.* steps through torch.optim:UserWarning")
def test_adagrads_sparse_gradients_are_torchs():
    def trained(module):
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 3, sparse=True)
        optimizer = module.Adagrad(table.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.randint(6, (4,))).square().sum().backward()
            optimizer.step()
        return optimizer

    assert_equal(snapshot(trained(fastopt)), snapshot(trained(torch.optim)))


@pytest.mark.parametrize(
    ("option", "key"), [("momentum", "momentum_buffer"), ("centered", "grad_avg")]
)
def test_rmsprop_asked_for_a_state_in_mid_run_names_it(option, key):
    param = Parameter(torch.ones(3))
    optimizer = fastopt.RMSprop([param])
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0][option] = 0.9
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"parameter 0 of group 0: state '{key}' is missing"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


def test_rmsprops_of_either_two_states_share_a_step():
    def trained(module, **options):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(4)]
        kinds = [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}]
        groups = [{"params": [param], **kind} for param, kind in zip(params, kinds, strict=True)]
        optimizer = module.RMSprop(groups, **options)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        return optimizer

    assert_agrees_with_torch(trained(fastopt), trained(torch.optim, foreach=False))
