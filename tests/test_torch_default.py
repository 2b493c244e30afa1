"""Where torch's default step does right, so do we: what users set by hand, and who watches."""

import collections
import copy
import signal
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from cases import CHUNK, COMPLEX128, FLOAT64, PARALLEL, Case, state_names
from helpers import (
    FALLBACK,
    LAST_DIGITS,
    assert_agrees_with_torch,
    assert_equal,
    assert_same_tensors,
    every_optimizer,
    make,
    native_only,
    on_meta,
    pair,
    parameters,
    snapshot,
    traceable,
    train,
)

pytestmark = native_only

counting = pytest.mark.parametrize("name", ["Adam", "AdamW"])  # SGD counts no steps


def one(module, name="AdamW", values=(1.0, -2.0, 3.0), **options):
    param = Parameter(torch.tensor(values, dtype=torch.float64))
    param.grad = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    return param, make(module, name, [param], **options)


def both(name="AdamW", **options):
    """Ours and torch's loop, each with its one parameter, after a step."""
    made = [one(fastopt, name, **options), one(torch.optim, name, foreach=False, **options)]
    for _, optimizer in made:
        optimizer.step()
    return made


def assert_still_agree(made):
    for _, optimizer in made:
        optimizer.step()
    assert_agrees_with_torch(*(optimizer for _, optimizer in made))


# Pending conjugation and negation.


def negated(values):
    """A real tensor of these values whose negation is pending."""
    memory = torch.complex(torch.zeros_like(values), -values)
    lazy = memory.conj().imag
    assert lazy.is_neg()
    return lazy


def negated_densely(values):
    lazy = torch._neg_view(-values)
    assert lazy.is_neg()
    return lazy


def conjugated(values):
    lazy = values.conj().clone().conj()
    assert lazy.is_conj()
    return lazy


LAZY = {
    "negated": (negated, FLOAT64),
    "negated, dense": (negated_densely, FLOAT64),
    "conjugated": (conjugated, COMPLEX128),
    "negated and complex": (negated_densely, COMPLEX128),
}
every_laziness = pytest.mark.parametrize(("lazily", "dtypes"), LAZY.values(), ids=LAZY)
SHAPES = [(), (1,), (1, 1), (3,), (2, 1), (1, 4), (CHUNK + 1,)]


@every_optimizer
@every_laziness
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 4.0])
def test_pending_gradient_is_stepped_by_its_values_and_stays_the_users(
    name, lazily, dtypes, shape, scale
):
    values = [torch.randn(shape, dtype=dtypes.param) for _ in range(3)]
    lazy, plain = (make(fastopt, name, [Parameter(values[0].clone())]) for _ in range(2))
    for value in values[1:]:
        for optimizer, grad in ((lazy, lazily(value * (scale or 1))), (plain, value)):
            (param,) = parameters(optimizer)
            param.grad, before = grad, grad
            optimizer.grad_scale = scale if optimizer is lazy else None
            optimizer.step()
            assert param.grad is before
            assert_equal(param.grad.resolve_conj().resolve_neg(), value)
        assert lazy.param_groups[0]["params"][0].grad._is_view()
    assert_equal(snapshot(lazy), snapshot(plain))


@every_optimizer
@pytest.mark.parametrize("what", ["param", "state"])
@every_laziness
def test_pending_parameter_or_state_is_torchs_to_step(name, what, lazily, dtypes):
    def made(module, **options):
        torch.manual_seed(0)
        values = torch.randn(3, dtype=dtypes.param)
        param = Parameter(lazily(values) if what == "param" else values)
        optimizer = make(module, name, [param], **options)
        for step in range(3):
            param.grad = torch.randn(3, dtype=dtypes.param)
            if what == "state" and step == 1:
                state = optimizer.state[param]
                for key in state_names(optimizer):
                    state[key] = lazily(state[key])
            optimizer.step()
        return param.detach().resolve_conj().resolve_neg()

    def outcome(module, **options):
        try:
            return made(module, **options)
        except RuntimeError as error:  # torch refuses some itself
            return str(error)

    with pytest.warns(UserWarning, match=f"{FALLBACK}.*conjugate or negative view"):
        ours = outcome(fastopt)
    expected = outcome(torch.optim, foreach=False)
    if isinstance(expected, str):
        assert ours == expected
    else:
        torch.testing.assert_close(ours, expected, **LAST_DIGITS)


def test_step_that_raises_has_not_touched_a_pending_gradient():
    lazy, broken = Parameter(torch.zeros(3, dtype=torch.complex64)), Parameter(torch.zeros(3))
    optimizer = fastopt.AdamW([lazy, broken])
    broken.grad = torch.ones(3)
    lazy.grad = kept = torch.ones(3, dtype=torch.complex64).conj()
    optimizer.step()
    optimizer.state[broken]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()
    assert lazy.grad is kept
    assert kept.is_conj()


# Step counts.


@counting
@pytest.mark.parametrize(
    "count", [3.5, 0.25, 1e-3, 12345.678, -0.5, 2.0**60, float("inf"), float("nan")]
)
def test_count_of_any_value_counts_as_in_torchs_loop(name, count):
    made = both(name)
    for param, optimizer in made:
        optimizer.state[param]["step"].fill_(count)
    assert_still_agree(made)


COUNTS = {
    "bfloat16": lambda: torch.tensor(7, dtype=torch.bfloat16),
    "float16": lambda: torch.tensor(7, dtype=torch.float16),
    "int32": lambda: torch.tensor(7, dtype=torch.int32),
    "int64": lambda: torch.tensor(7),
    "uint8, 1 element": lambda: torch.tensor([7], dtype=torch.uint8),
    "int": lambda: 7,
    "float": lambda: 7.0,
    "numpy": lambda: np.float64(7),
}


@counting
@pytest.mark.parametrize("loaded", [False, True], ids=["set by hand", "loaded"])
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_count_of_any_dtype_becomes_float32(name, count, loaded):
    (param, optimizer), (reference, its_optimizer) = both(name)
    its_optimizer.state[reference]["step"].fill_(7.0)
    if loaded:
        checkpoint = copy.deepcopy(optimizer.state_dict())
        checkpoint["state"][0]["step"] = count()
        optimizer.load_state_dict(checkpoint)
    else:
        optimizer.state[param]["step"] = count()
    for each in (optimizer, its_optimizer):
        each.step()
        each.step()
    step = optimizer.state[param]["step"]
    assert (step.dtype, step.item()) == (torch.float32, 9.0)
    assert_equal(param.detach(), param.detach())
    torch.testing.assert_close(param.detach(), reference.detach(), **LAST_DIGITS)


@counting
def test_count_is_not_replaced_by_a_step_that_raises(name):
    param, optimizer = one(fastopt, name)
    optimizer.step()
    optimizer.state[param]["step"] = count = torch.tensor(7)
    optimizer.state[param]["exp_avg_sq"] = torch.zeros(9, dtype=torch.float64)
    with pytest.raises(ValueError, match="exp_avg_sq"):
        optimizer.step()
    assert optimizer.state[param]["step"] is count


# Options.


PAIRS = {
    "list": [0.8, 0.95],
    "UserList": collections.UserList([0.8, 0.95]),
    "array": np.array([0.8, 0.95]),
    "tensor": torch.tensor([0.8, 0.95], dtype=torch.float64),
    "tensors": [torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64)],
    "fractions": (Fraction(4, 5), Fraction(19, 20)),
}


@counting
@pytest.mark.parametrize("betas", PAIRS.values(), ids=PAIRS)
def test_betas_of_a_group_may_be_any_two_numbers(name, betas):
    made = both(name)
    for _, optimizer in made:
        optimizer.param_groups[0]["betas"] = betas
    made[1][1].param_groups[0]["betas"] = (0.8, 0.95)
    assert_still_agree(made)


FLAGS = [("Adam", "amsgrad"), ("AdamW", "maximize"), ("SGD", "nesterov"), ("SGD", "maximize")]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
@pytest.mark.parametrize(
    "value", [None, 0, 1, "", "yes", [], [0], np.bool_(True), torch.tensor(True)], ids=repr
)
def test_flag_may_be_any_object_with_a_truth(name, flag, value):
    def made(module, **options):
        param = Parameter(torch.ones(3, dtype=torch.float64))
        base = {"lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
        optimizer = getattr(module, name)([param], **base, **{flag: value}, **options)
        for step in range(3):
            param.grad = torch.full((3,), 1.0 + step, dtype=torch.float64)
            optimizer.step()
        return optimizer

    assert_agrees_with_torch(made(fastopt), made(torch.optim, foreach=False))


BAD = [
    ("lr", "fast", "lr"),
    ("lr", None, "lr"),
    ("lr", [0.1], "lr"),
    ("lr", torch.ones(2), "lr"),
    ("weight_decay", torch.ones((), dtype=torch.complex64), "weight_decay"),
]
BAD_PAIRS = [("betas", value, "betas") for value in (0.9, (0.9,), (0.9, 0.99, 0.999), ("a", 0.9))]


@pytest.mark.parametrize(
    ("name", "key", "value", "named"),
    [(name, *bad) for name in ("AdamW", "SGD") for bad in BAD]
    + [("AdamW", *bad) for bad in BAD_PAIRS],
)
def test_option_that_cannot_be_used_is_named_with_its_group(name, key, value, named):
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = getattr(fastopt, name)([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(2)
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError, match=rf"option '{named}' of group 1 .*; give (a|two) number"):
        optimizer.step()
    assert_equal([param.detach() for param in params], [torch.ones(2)] * 2)
    assert not optimizer.state


# Containers.


class Plain(collections.abc.MutableMapping):
    """A mapping that is no dict."""

    def __init__(self, *items):
        self.items_by_id = {}
        self.update(*items)

    def __getitem__(self, key):
        return self.items_by_id[id(key) if isinstance(key, torch.Tensor) else key][1]

    def __setitem__(self, key, value):
        self.items_by_id[id(key) if isinstance(key, torch.Tensor) else key] = key, value

    def __delitem__(self, key):
        del self.items_by_id[id(key) if isinstance(key, torch.Tensor) else key]

    def __iter__(self):
        return iter([key for key, _ in self.items_by_id.values()])

    def __len__(self):
        return len(self.items_by_id)


def _groups_a_tuple(optimizer):
    optimizer.param_groups = tuple(optimizer.param_groups)


def _params_a_tuple(optimizer):
    optimizer.param_groups[0]["params"] = tuple(parameters(optimizer))


def _params_a_dict(optimizer):
    optimizer.param_groups[0]["params"] = dict.fromkeys(parameters(optimizer))


def _params_a_deque(optimizer):
    optimizer.param_groups[0]["params"] = collections.deque(parameters(optimizer))


def _params_a_parameter_list(optimizer):
    optimizer.param_groups[0]["params"] = torch.nn.ParameterList(parameters(optimizer))


def _group_a_mapping(optimizer):
    optimizer.param_groups = [collections.UserDict(group) for group in optimizer.param_groups]


def _state_a_mapping(optimizer):
    optimizer.state = Plain(optimizer.state)


def _state_ordered(optimizer):
    optimizer.state = collections.OrderedDict(optimizer.state)


def _entries_mappings(optimizer):
    for param, entry in list(optimizer.state.items()):
        optimizer.state[param] = collections.UserDict(entry)


@every_optimizer
@pytest.mark.parametrize(
    "change",
    [
        _groups_a_tuple,
        _params_a_tuple,
        _params_a_dict,
        _params_a_deque,
        _params_a_parameter_list,
        _group_a_mapping,
        _state_a_mapping,
        _state_ordered,
        _entries_mappings,
    ],
)
def test_containers_may_be_what_torchs_loop_takes(name, change):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        train(case, optimizer, range(2))
        change(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for step in range(2, 4):
            case.set_gradients(params, step)
            optimizer.step()
    for mine, theirs in zip(*map(parameters, pairs), strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), **LAST_DIGITS)


def test_state_mapping_takes_new_states():
    param, optimizer = one(fastopt)
    optimizer.state = Plain()
    optimizer.step()
    assert sorted(optimizer.state[param]) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]


@every_optimizer
def test_groups_may_grow_in_another_thread(name):
    """Reading a tensor's number lets go of the GIL."""
    before = sys.getswitchinterval()

    def group():
        param = Parameter(torch.zeros(4))
        param.grad = torch.ones(4)
        return {"params": [param], "lr": torch.tensor(0.1)}

    optimizer = getattr(fastopt, name)([group() for _ in range(40)])
    base = optimizer.param_groups[0]
    extra = [{**base, **group()} for _ in range(400)]
    stop = threading.Event()

    def mutate():
        while not stop.is_set():
            optimizer.param_groups.extend(extra)
            del optimizer.param_groups[40:]

    thread = threading.Thread(target=mutate)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(200):
            optimizer.step()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


@every_optimizer
def test_list_of_parameters_may_be_emptied_while_it_is_read(name):
    emptied = []

    class Emptying(Parameter):
        @property
        def grad(self):
            emptied.clear()
            return torch.ones(3)

    optimizer = make(fastopt, name, [Emptying(torch.zeros(3)) for _ in range(2)])
    emptied = optimizer.param_groups[0]["params"]
    optimizer.step()
    assert emptied == []


# Dtypes that changed in mid-run.


@every_optimizer
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_model_cast_to_double_in_mid_run_goes_on(name, before):
    """torch's SGD goes on, too; its Adam refuses."""
    after = torch.complex128 if before.is_complex else torch.float64

    def made(module, **options):
        torch.manual_seed(0)
        layer = torch.nn.Module()
        layer.weight = Parameter(torch.randn(5, 3).to(before))
        optimizer = make(module, name, [layer.weight], **options)
        for step in range(4):
            if step == 2:
                layer.weight.data = layer.weight.data.to(after)
                layer.weight.grad = None
            layer.weight.grad = torch.randn(5, 3).to(layer.weight.dtype)
            optimizer.step()
        return optimizer, layer.weight.detach()

    ours, weight = made(fastopt)
    assert weight.dtype == after
    if name == "SGD":
        # torch keeps the buffer as it is, and rounds to it.
        tolerance = 4 * torch.finfo(before).eps
        stock = made(torch.optim, foreach=False)[1]
        torch.testing.assert_close(weight, stock, rtol=tolerance, atol=tolerance)
    state = ours.state[parameters(ours)[0]]
    assert all(state[key].dtype == after for key in state_names(ours))


@every_optimizer
def test_model_cast_from_double_in_mid_run_goes_on(name):
    def made(module, **options):
        torch.manual_seed(0)
        param = Parameter(torch.randn(5, dtype=torch.float64))
        optimizer = make(module, name, [param], **options)
        for step in range(4):
            if step == 2:
                param.data, param.grad = param.data.float(), None
            param.grad = torch.randn(5, dtype=torch.float64).to(param.dtype)
            optimizer.step()
        return param.detach()

    ours = made(fastopt)
    assert ours.dtype == torch.float32
    if name == "SGD":
        torch.testing.assert_close(ours, made(torch.optim, foreach=False))


@every_optimizer
def test_gradient_in_double_is_rounded_to_its_parameter(name):
    params = [Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [make(fastopt, name, [param]) for param in params]
    grad = torch.randn(5, dtype=torch.float64)
    params[0].grad_dtype = None
    params[0].grad, params[1].grad = grad, grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert_equal(*map(snapshot, optimizers))
    assert params[0].grad is grad


# Subclasses.


@every_optimizer
def test_subclass_with_a_wait_of_its_own_is_stepped(name):
    class Waiting(Parameter):
        def wait(self):
            raise ZeroDivisionError

    param = Waiting(torch.ones(3))
    param.grad = torch.ones(3)
    make(fastopt, name, [param]).step()
    assert (param < 1).all()


@every_optimizer
def test_init_group_of_a_subclass_or_instance_is_asked(name):
    asked = []

    class Frozen(getattr(fastopt, name)):
        def _init_group(self, group, *lists):
            asked.append(name)
            return super()._init_group(group, *lists)

    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.warns(UserWarning, match=f"{FALLBACK}: Frozen has an _init_group of its own"):
        Frozen([param]).step()
    assert asked == [name]

    optimizer = getattr(fastopt, name)([param])
    stock = optimizer._init_group
    optimizer._init_group = lambda *args: asked.append("instance") or stock(*args)
    with pytest.warns(UserWarning, match="_init_group of its own"):
        optimizer.step()
    assert asked == [name, "instance"]

    class Quiet(getattr(fastopt, name)):
        """Overrides nothing of the step."""

    Quiet([param]).step()


@on_meta
def test_fallback_is_told_until_it_has_been_heard(name):
    """Where warnings are errors, a step that was not made may not be made in silence later."""
    param = Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones_like(param)
    optimizer = getattr(fastopt, name)([param])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match=FALLBACK):
                optimizer.step()
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as heard:
            optimizer.step()
            optimizer.step()
    assert len(heard) == 1


# Who watches.


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.__name__]
        return func(*args, **(kwargs or {}))


@every_optimizer
@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_update_is_seen_by_modes(name, mode):
    def seen(module, **options):
        param, optimizer = one(module, name, **options)
        with mode() as watcher:
            optimizer.step()
        return watcher.names, param.detach()

    with pytest.warns(UserWarning, match=f"{FALLBACK}: {mode.__name__} watches"):
        names, param = seen(fastopt)
    expected_names, expected = seen(torch.optim)
    # torch's own step also sees what only GradScaler's attributes and the like make of it.
    assert [each for each in names if "add" in each] == [
        each for each in expected_names if "add" in each
    ]
    assert_equal(param, expected)


@every_optimizer
def test_default_device_is_no_watcher(name):
    param, optimizer = one(fastopt, name)
    with torch.device("cpu"):
        optimizer.step()
    torch.set_default_device("cpu")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert (param != torch.tensor([1.0, -2.0, 3.0])).all()


@traceable
def test_traced_graph_holds_the_update(name):
    def graph(module):
        param, optimizer = one(module, name)

        def step(grad):
            param.grad = grad
            optimizer.step()
            return grad * 1

        traced = make_fx(step)(torch.ones(3, dtype=torch.float64))
        return [str(node.target) for node in traced.graph.nodes]

    with pytest.warns(UserWarning, match=FALLBACK):
        ours = graph(fastopt)
    assert ours == graph(torch.optim)
    assert any("add" in target for target in ours)


@every_optimizer
def test_fake_mode_gets_torchs_answer_for_real_parameters(name):
    def answer(module):
        param, optimizer = one(module, name)
        with FakeTensorMode(), pytest.raises(Exception) as error:  # noqa: PT011
            optimizer.step()
        return type(error.value), str(error.value)[:60], param.tolist()

    with pytest.warns(UserWarning, match=f"{FALLBACK}: FakeTensorMode watches"):
        ours = answer(fastopt)
    assert ours == answer(torch.optim)


@every_optimizer
def test_hooks_that_the_closure_registers_fire(name):
    def fired(module):
        _, optimizer = one(module, name)
        events, handles = [], []

        def closure():
            handles.append(optimizer.register_step_post_hook(lambda *_: events.append("local")))
            handles.append(
                register_optimizer_step_post_hook(lambda *_: events.append("global")),
            )
            return 3.0

        assert optimizer.step(closure) == 3.0
        for handle in handles:
            handle.remove()
        return events

    assert fired(fastopt) == fired(torch.optim) == ["local", "global"]


def test_profiler_of_another_thread_sees_the_step():
    _, optimizer = one(fastopt)
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=config) as profile:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    assert "Optimizer.step#AdamW.step" in [event.key for event in profile.key_averages()]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_interrupted_step_has_counted_the_versions():
    """Else a backward pass through the old weights would use the new ones, in silence."""
    before = signal.getsignal(signal.SIGALRM)

    def interrupt(*_):
        raise KeyboardInterrupt

    weight = Parameter(torch.ones(1 << 22))
    inputs = torch.ones(1 << 22, requires_grad=True)
    optimizer = fastopt.AdamW([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (2e-4, 1e-3, 2e-3, 4e-3):
            loss = (weight * inputs).sum()
            old = weight.detach().clone()
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                optimizer.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            if not torch.equal(old, weight.detach()):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Two devices at once.


@counting
@pytest.mark.parametrize("devices", [("cuda:0",) * 2, ("cuda:0", "cuda:1"), ("cpu", "cuda:0")])
@pytest.mark.parametrize("shapes", [((), ()), ((), (1,))], ids=str)
def test_state_dict_of_counts_on_any_devices(name, devices, shapes):
    """Without a GPU: FakeTensorMode checks devices as CUDA does."""
    with FakeTensorMode():
        params = [Parameter(torch.zeros(4, device=device)) for device in devices]
        optimizer = getattr(fastopt, name)(params)
        for param, shape in zip(params, shapes, strict=True):
            optimizer.state[param] = {"step": torch.zeros(shape, device=param.device)}
        steps = [entry["step"] for entry in optimizer.state_dict()["state"].values()]
    assert [step.shape for step in steps] == list(shapes)
    assert all(step.device.type == "cpu" for step in steps)


def test_fallback_unscales_on_every_device():
    with FakeTensorMode():
        params = [Parameter(torch.zeros(4, device=device)) for device in ("cuda:0", "cuda:1")]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = fastopt.AdamW(params, backend="torch")
        optimizer.grad_scale = torch.ones((), device="cuda:0")
        optimizer.step()


# State-dict hooks.


@every_optimizer
@pytest.mark.parametrize(
    "hook",
    [
        lambda _, state_dict: {"state": state_dict["state"]},
        lambda _, state_dict: [state_dict],
        lambda _, state_dict: state_dict.pop("param_groups") and None,
        lambda _, state_dict: {"state": {0: "gone"}, "param_groups": 3},
    ],
)
def test_state_dict_hook_may_return_anything(name, hook):
    def made(module):
        _, optimizer = one(module, name)
        optimizer.step()
        optimizer.register_state_dict_post_hook(hook)
        return optimizer.state_dict()

    assert str(made(fastopt)) == str(made(torch.optim))


def test_state_dict_hook_sees_what_is_saved():
    """On an accelerator the counts have come back to the CPU by then."""
    seen = []
    with FakeTensorMode():
        param = Parameter(torch.zeros(4, device="cuda"))
        optimizer = fastopt.AdamW([param])
        optimizer.state[param] = {"step": torch.zeros((), device="cuda")}
        optimizer.register_state_dict_post_hook(
            lambda _, state_dict: seen.append(state_dict["state"][0]["step"].device.type)
        )
        optimizer.state_dict()
        assert len(optimizer._optimizer_state_dict_post_hooks) == 1
    assert seen == ["cpu"]


@every_optimizer
def test_large_and_small_new_states_are_zero_and_their_own(name):
    params = [Parameter(torch.randn(size)) for size in (0, 1, 3, CHUNK + 1, PARALLEL + 1)]
    optimizer = make(fastopt, name, params, lr=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    storages = set()
    for param in params:
        assert all(
            (value == 0).all()
            for key, value in optimizer.state[param].items()
            if key in ("exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer", "grad_avg", "prev")
        )
        for key in state_names(optimizer):
            value = optimizer.state[param][key]
            if value.numel():
                assert value.untyped_storage().nbytes() == value.nbytes
                storages.add(value.untyped_storage().data_ptr())
    assert len(storages) == len(state_names(optimizer)) * (len(params) - 1)
    assert_same_tensors(optimizer, copy.deepcopy(optimizer), rtol=0, atol=0)


PRIVATE_USE = """
import ctypes, warnings
import torch

class DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32)]

class API(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "version older new from to read stream".split()]

get, new = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
NAME = ctypes.create_string_buffer(b"dlpack_exchange_api")
capsule = torch.Tensor.__dlpack_c_exchange_api__
api = API.from_buffer_copy(API.from_address(get(capsule, NAME.value)))
READ = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(DLTensor))
original = READ(api.read)

@READ
def read(tensor, out):
    code = original(tensor, out)
    if code == 0:
        out.contents.device_type = 12  # kDLExtDev: NPUs, HPUs
    return code

api.read = ctypes.cast(read, ctypes.c_void_p)
torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(api), ctypes.addressof(NAME), None)
import fastopt

param = torch.nn.Parameter(torch.zeros(3))
param.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    fastopt.AdamW([param], lr=1.0).step()
assert len(told) == 1 and "cuda tensors" not in str(told[0].message), told
assert (param < -0.9).all(), param

optimizer = fastopt.AdamW([param], backend="cpu")
try:
    optimizer.step()
except RuntimeError as error:
    assert "cannot make this step" in str(error), error
else:
    raise AssertionError("stepped on memory that is no CPU's")
assert not optimizer.state
"""


def test_device_of_no_backend_is_called_by_its_name_and_stepped_by_torch():
    """DLPack calls every device that it has no name for an extension's."""
    subprocess.run([sys.executable, "-c", PRIVATE_USE], check=True, timeout=120)


def test_states_of_a_step_that_a_device_refuses_are_not_kept(monkeypatch):
    """Those of the tables before it are: their parameters have been stepped."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = fastopt.AdamW(params, backend="triton")
    for param in params:
        param.grad = torch.ones_like(param)

    def refuse(_, kernels, *table):
        if fastopt.triton.Table(*table).place == ("update", 1):
            raise ZeroDivisionError

    monkeypatch.setattr(fastopt.triton, "launch", refuse)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert list(optimizer.state) == params[:1]
