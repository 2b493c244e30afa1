"""GradScaler on the CPU: gradients are unscaled once, before our step or, if fused=True, by it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import fastopt
from cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, MIXED, UNIFORM, Case, construct
from helpers import (
    ASKED_FOR_TORCH,
    FALLBACK,
    assert_agrees_with_torch,
    assert_equal,
    every_hint,
    every_optimizer,
    fused_in_torch,
    native_only,
    pair,
    parameters,
    reading_lr,
    snapshot,
    train,
)

pytestmark = native_only

SCALE = 2.0**10

# As in torch, the scaler leaves unscaling and skipping to a step that was asked to be fused.
by_scaler_and_by_step = pytest.mark.parametrize(
    "asked", [{}, {"fused": True}], ids=["by the scaler", "by the step"]
)

# A differentiable step cannot update leaves, which AMP trains.
STOCK = {way: engine for way, engine in ASKED_FOR_TORCH.items() if way != "differentiable=True"}


def make_scaler() -> torch.amp.GradScaler:
    # Growing would change the scale in the middle of a test.
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)


def prepared(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    """GradScaler makes its tensors when it first scales a loss."""
    scaler.scale(torch.zeros(()))
    return scaler


def set_scaled_gradients(
    case: Case, optimizer: Optimizer, step: int, overflow: bool = False, scale: float = SCALE
) -> None:
    params = parameters(optimizer)
    case.set_gradients(params, step)
    for param in params:
        param.grad.mul_(scale)
    if overflow:
        params[-1].grad.view(-1)[-1] = float("inf")


def train_scaled(
    case: Case,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    steps: range,
    overflows: tuple[int, ...] = (),
) -> None:
    for step in steps:
        scale = scaler.get_scale()
        set_scaled_gradients(case, optimizer, step, overflow=step in overflows, scale=scale)
        scaler.step(optimizer)
        scaler.update()


def train_by_hand(case: Case, optimizer: Optimizer, steps: range, scale: float = SCALE) -> None:
    """On scaled gradients without a scaler: the optimizer has been told what it must know."""
    for step in steps:
        set_scaled_gradients(case, optimizer, step, scale=scale)
        optimizer.step()


def assert_as_if_never_scaled(case: Case, scaled: Optimizer, steps: range, **engine: Any) -> None:
    """Bit for bit: a power of two scales without rounding."""
    plain = case.make_optimizer(case.parameters(), fastopt, **engine)
    train(case, plain, steps)
    assert_equal(snapshot(scaled), snapshot(plain))


# Through GradScaler.


@fused_in_torch
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT16, BFLOAT16, *MIXED], ids=str)
def test_scaled_training_is_plain_training_bit_for_bit(name, dtypes):
    case = Case(name, "everything", dtypes, "sizes")
    scaled = case.make_optimizer(case.parameters(), fastopt, fused=True)
    # float16 gradients have no room for more.
    scaler = prepared(make_scaler())
    scaler.update(8.0)
    train_scaled(case, scaled, scaler, range(3))
    assert_as_if_never_scaled(case, scaled, range(3))


@every_optimizer
@by_scaler_and_by_step
@pytest.mark.parametrize("overflows", [(), (0,), (2,), (0, 1, 3)], ids=str)
def test_scaled_training_with_overflows_agrees_with_torch(name, overflows, asked):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case, asked)
    for optimizer in pairs:
        scaler = prepared(make_scaler())
        train_scaled(case, optimizer, scaler, range(5), overflows)
        assert scaler.get_scale() == SCALE / 2 ** len(overflows)
    assert_agrees_with_torch(*pairs)


@fused_in_torch
@pytest.mark.parametrize("before", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
def test_overflow_changes_nothing_at_all(name, before, poison):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt, fused=True)
    scaler = prepared(make_scaler())
    train_scaled(case, optimizer, scaler, range(before))
    set_scaled_gradients(case, optimizer, before)
    params = parameters(optimizer)
    params[0].grad.fill_(poison)
    gradients = [param.grad.clone() for param in params]
    untouched = snapshot(optimizer)
    scaler.step(optimizer)
    assert_equal(snapshot(optimizer), untouched)
    assert_equal([param.grad for param in params], gradients)
    made = before > 0 or name == "Adagrad"  # whose constructor makes them
    assert len(optimizer.state) == made * len(params)


@every_optimizer
@by_scaler_and_by_step
def test_unscaled_gradients_are_written_back(name, asked):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt, **asked)
    set_scaled_gradients(case, optimizer, 0)
    scaler = prepared(make_scaler())
    scaler.step(optimizer)
    written = [param.grad for param in parameters(optimizer)]
    case.set_gradients(parameters(optimizer), 0)
    assert_equal(written, [param.grad for param in parameters(optimizer)])


@every_optimizer
@by_scaler_and_by_step
def test_unscale_and_clip_before_the_step_agrees_with_torch(name, asked):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case, asked)
    for optimizer in pairs:
        scaler = prepared(make_scaler())
        for step in range(3):
            set_scaled_gradients(case, optimizer, step, overflow=step == 1)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters(optimizer), 1.0)
            scaler.step(optimizer)
            scaler.update(SCALE)
    assert_agrees_with_torch(*pairs)


@every_optimizer
@by_scaler_and_by_step
def test_scaler_leaves_nothing_behind(name, asked):
    """An unscaled step may follow."""
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case, asked)
    for optimizer in pairs:
        train_scaled(case, optimizer, prepared(make_scaler()), range(2), overflows=(1,))
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        train(case, optimizer, range(2, 4))
    assert_agrees_with_torch(*pairs)


@reading_lr
@by_scaler_and_by_step
def test_step_that_raises_leaves_nothing_of_the_scaler_behind(name, asked):
    """torch's own fused step leaves both attributes, and every later step unscales again."""
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt, **asked)
    scaler = prepared(make_scaler())
    train_scaled(case, optimizer, scaler, range(2))

    def refuse(*_):
        raise ZeroDivisionError

    set_scaled_gradients(case, optimizer, 2)
    optimizer.param_groups[0]["lr"], good = "broken", optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="lr"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = good
    handle = optimizer.register_step_pre_hook(refuse)
    with pytest.raises((ZeroDivisionError, RuntimeError)):  # its gradients may be unscaled already
        scaler.step(optimizer)
    handle.remove()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    train(case, optimizer, range(2, 3))
    assert_as_if_never_scaled(case, optimizer, range(3))


@every_optimizer
def test_overflow_in_one_optimizer_leaves_the_other_to_step(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    overflowing, sound, plain = (case.make_optimizer(case.parameters(), fastopt) for _ in range(3))
    scaler = prepared(make_scaler())
    set_scaled_gradients(case, overflowing, 0, overflow=True)
    set_scaled_gradients(case, sound, 0)
    before = snapshot(overflowing)
    scaler.step(overflowing)
    scaler.step(sound)
    train(case, plain, range(1))
    assert_equal(snapshot(overflowing), before)
    assert_equal(snapshot(sound), snapshot(plain))


@fused_in_torch
def test_scaler_steps_an_optimizer_without_gradients(name):
    """With no device seen, GradScaler's found_inf is the int 0."""
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt, fused=True)
    before = snapshot(optimizer)
    prepared(make_scaler()).step(optimizer)
    assert_equal(snapshot(optimizer), before)


@every_optimizer
@by_scaler_and_by_step
def test_autocast_training_goes_as_with_torch(name, asked):
    def losses(module, **engine):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
        optimizer = construct(module, name, model.parameters(), lr=0.01, **engine)
        scaler = make_scaler()
        inputs, targets = torch.randn(32, 8), torch.randn(32, 1)
        history = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(loss.detach())
        return torch.stack(history)

    ours = losses(fastopt, **asked)
    assert ours[-1] < ours[0]
    # A last bit of difference in a weight may round an activation to the next bfloat16.
    torch.testing.assert_close(ours, losses(torch.optim), rtol=2**-8, atol=0)


# grad_scale and found_inf set by hand.


@every_optimizer
@pytest.mark.parametrize(
    "found_inf",
    [torch.tensor(1.0), torch.tensor(2.0), torch.tensor([1.0]), torch.tensor(float("inf")), 1],
    ids=["1.0", "2.0 of two devices", "1-element", "inf", "int 1"],
)
def test_any_found_inf_but_zero_skips(name, found_inf):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    train(case, optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), found_inf
    train_by_hand(case, optimizer, range(2, 3))
    assert_equal(snapshot(optimizer), before)


@every_optimizer
@pytest.mark.parametrize(
    "found_inf", [torch.tensor(0.0), torch.tensor([0.0]), 0, 0.0, None], ids=str
)
def test_found_inf_of_zero_steps(name, found_inf):
    case = Case(name, "everything", FLOAT32, "sizes")
    scaled = case.make_optimizer(case.parameters(), fastopt)
    scaled.grad_scale, scaled.found_inf = torch.tensor(SCALE), found_inf
    train_by_hand(case, scaled, range(2))
    assert_as_if_never_scaled(case, scaled, range(2))


@every_optimizer
@pytest.mark.parametrize("grad_scale", [torch.tensor(4.0), torch.tensor([4.0]), 4.0], ids=str)
@pytest.mark.parametrize("dtypes", [*UNIFORM, *MIXED], ids=str)
def test_grad_scale_set_by_the_user_is_honoured_without_a_scaler(name, grad_scale, dtypes):
    case = Case(name, "everything", dtypes, "sizes")
    scaled = case.make_optimizer(case.parameters(), fastopt)
    scaled.grad_scale = grad_scale
    train_by_hand(case, scaled, range(2), scale=4.0)
    assert_as_if_never_scaled(case, scaled, range(2))


@every_optimizer
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scale_set_by_the_user_is_honoured_with_a_scaler(name, unscale_first):
    case = Case(name, "everything", FLOAT32, "sizes")
    scaled = case.make_optimizer(case.parameters(), fastopt, fused=True)
    scaler = prepared(make_scaler())
    for step in range(2):
        scaled.grad_scale = torch.tensor(4.0)
        set_scaled_gradients(case, scaled, step, scale=4.0 * SCALE)
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
    assert_as_if_never_scaled(case, scaled, range(2))


# What the optimizer tells GradScaler.


@fused_in_torch
@every_hint
def test_step_supports_amp_scaling_where_torchs_would_and_so_do_copies(name, hint):
    case = Case(name, "everything", FLOAT32, "sizes")
    original = case.make_optimizer(case.parameters(), fastopt, **hint)
    loaded = case.make_optimizer(case.parameters(), fastopt)
    loaded.load_state_dict(original.state_dict())
    stock = case.make_optimizer(case.parameters(), torch.optim, **hint)
    expected = getattr(stock, "_step_supports_amp_scaling", False)
    assert expected == hint.get("fused", False)
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    for optimizer in [original, loaded, *copies]:
        case.set_gradients(parameters(optimizer), 0)
        assert optimizer._step_supports_amp_scaling is expected


@every_optimizer
@pytest.mark.parametrize("second", [None, False])
def test_one_group_not_fused_leaves_scaling_to_the_scaler(name, second):
    first, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [first], "fused": True}, {"params": [other], "fused": second}]
    optimizer = getattr(fastopt, name)(groups)
    assert optimizer._step_supports_amp_scaling is False
    optimizer.param_groups[1]["fused"] = True
    assert optimizer._step_supports_amp_scaling is True


@every_optimizer
def test_hooks_see_unscaled_gradients_and_skipped_steps_are_none(name):
    """What Accelerate and users' norms in a hook rely on."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = getattr(fastopt, name)([param])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(param.grad.clone()))
    scaler = prepared(make_scaler())
    for grad in (torch.full((4,), 3.0), torch.full((4,), float("inf"))):
        param.grad = grad * SCALE
        scaler.step(optimizer)
        scaler.update(SCALE)
    assert_equal(seen, [torch.full((4,), 3.0)])


# Fallbacks.


@every_optimizer
@pytest.mark.parametrize(("ours", "stock"), STOCK.values(), ids=STOCK)
def test_scaled_fallback_is_torch_bit_for_bit(name, ours, stock):
    case = Case(name, "everything", FLOAT32, "sizes")
    pairs = pair(case, ours, stock)
    for optimizer in pairs:
        # No overflow at first: torch's fused SGD would leave its buffer uninitialised.
        train_scaled(case, optimizer, prepared(make_scaler()), range(4), overflows=(1, 2))
    assert_equal(*map(snapshot, pairs))


@pytest.mark.parametrize("unscale_first", [False, True])
def test_scaled_sparse_gradients_agree_with_torch(unscale_first):
    def trained(module):
        dense, rows = (torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2))
        optimizer = module.SGD([dense, rows], lr=0.1, momentum=0.9)
        scaler = prepared(make_scaler())
        for step in range(4):
            values = torch.full((2, 2), SCALE * (1 + step))
            if step == 1:
                values[0, 0] = float("inf")
            dense.grad = torch.full((4, 2), SCALE)
            rows.grad = torch.sparse_coo_tensor(
                [[0, 2]], values, (4, 2), is_coalesced=True, check_invariants=True
            )
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(SCALE)
        return [dense.detach(), rows.detach()]

    with pytest.warns(UserWarning, match=FALLBACK):
        ours = trained(fastopt)
    assert_equal(ours, trained(torch.optim))


@every_optimizer
def test_fallback_honours_and_keeps_what_the_user_set(name):
    case = Case(name, "default", FLOAT32, "sizes")
    scaled = case.make_optimizer(case.parameters(), fastopt, backend="torch")
    scaled.grad_scale = torch.tensor(SCALE)
    train_by_hand(case, scaled, range(2))
    assert_as_if_never_scaled(case, scaled, range(2), backend="torch")
    assert scaled.grad_scale == SCALE
    assert not hasattr(scaled, "found_inf")
