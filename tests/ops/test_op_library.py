"""The op as torch sees it: opcheck, gradcheck, tracing, autocast, checkpointing, what it saves and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from helpers.upstream import fsdp2_on_cpu
from peft_sapt.ops import library, weighted_lora


def leaf(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


OP = torch.ops.peft_sapt.scaled_lora.default
FORMS = {
    "frozen and new": lambda: (leaf(12, 7), leaf(12, 5), leaf(6, 7, grad=False), leaf(6, 5, grad=False), leaf(2, 7),
                               leaf(2, 5), leaf(3, 8)),
    "new, a scale per token": lambda: (leaf(12, 7), leaf(12, 5), None, None, leaf(2, 7), leaf(2, 5), leaf(12, 2)),
    "frozen alone": lambda: (leaf(12, 7), leaf(12, 5), leaf(6, 7), leaf(6, 5), None, None, leaf(3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("old_gradient", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, old_gradient: bool) -> None:
    passed = torch.library.opcheck(OP, (*FORMS[form](), old_gradient, "torch"))
    assert set(passed.values()) == {"SUCCESS"} and len(passed) >= 4


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_value_alone(form: str) -> None:
    arguments = [None if t is None else t.detach() for t in FORMS[form]()]
    op = torch.ops.peft_sapt.scaled_lora_value.default
    assert set(torch.library.opcheck(op, (*arguments, "torch")).values()) == {"SUCCESS"}


@pytest.mark.parametrize("call", [library.scaled_lora, lambda *given: OP(*given)[0]], ids=["eager", "dispatched"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, call) -> None:
    given = FORMS[form]()
    tensors = [t for t in given if t is not None]

    def op(*inputs: torch.Tensor) -> torch.Tensor:
        rest = iter(inputs)
        return call(*(None if t is None else next(rest) for t in given), True, "torch")

    assert torch.autograd.gradcheck(op, tensors)


@pytest.mark.parametrize("old_gradient", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_eager_way_is_the_op(form: str, old_gradient: bool) -> None:
    given = FORMS[form]()
    tensors = [t for t in given if t is not None and t.requires_grad]
    mine, op = library.scaled_lora(*given, old_gradient, "torch"), OP(*given, old_gradient, "torch")[0]
    assert torch.equal(mine, op) and type(mine.grad_fn).__name__ == "ScaledLoraBackward"
    for dy in (torch.ones_like(op), torch.rand_like(op)):
        found, expected = (torch.autograd.grad(y, tensors, dy, retain_graph=True) for y in (mine, op))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_whoever_watches_sees_the_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    given = FORMS["frozen and new"]()
    with Watch():
        library.scaled_lora(*given, True, "torch").sum().backward()
        library.scaled_lora_value(*(t.detach() for t in given), "torch")
    assert {f"peft_sapt.scaled_lora{name}.default" for name in ("", "_backward", "_value")} <= seen
    assert not library.is_plain(fake())


def test_tracers_below_the_dispatcher_see_the_op_too(tmp_path) -> None:
    given = FORMS["frozen and new"]()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return library.scaled_lora(*tensors, False, "torch")

    traced = torch.jit.trace(call, given, check_trace=False)
    traced.save(str(tmp_path / "traced.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "traced.pt"))(*given), call(*given))
    graph = make_fx(call, pre_dispatch=True)(*given)
    assert "peft_sapt.scaled_lora.default" in graph.code
    dy = torch.rand_like(given[1])
    found, expected = (torch.autograd.grad(f(*given), given[0], dy)[0] for f in (graph, call))
    torch.testing.assert_close(found, expected)


def fake() -> torch.Tensor:
    with torch._subclasses.FakeTensorMode():
        return torch.empty(2, 2)


def layer(dtype: torch.dtype = torch.float32, batch: int = 3, length: int = 4) -> dict[str, torch.Tensor]:
    return {
        "x": leaf(batch, length, 16, dtype=dtype), "base": leaf(batch, length, 12, dtype=dtype),
        "old_a": leaf(6, 16, grad=False, dtype=dtype), "old_b": leaf(6, 12, grad=False, dtype=dtype),
        "new_a": leaf(2, 16, dtype=dtype), "new_b": leaf(2, 12, dtype=dtype), "weights": leaf(batch, 3),
    }  # fmt: skip


def value(tensors: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    return weighted_lora(**tensors, scaling=[1.0, 2.0, 0.5], old_ranks=[2, 4], **kwargs)


def gradients(y: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.float().square().sum(), [t for t in tensors.values() if t.requires_grad]))


@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph_for_all_lengths(autocast: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(value, fullgraph=True, dynamic=True, backend=counter)
    for length in (4, 7, 9):
        tensors = layer(length=length)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            eager, traced = value(tensors), compiled(tensors)
        assert eager.dtype == traced.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(eager, traced)
        for mine, theirs in zip(gradients(traced, tensors), gradients(eager, tensors), strict=True):
            assert torch.equal(mine, theirs)
    assert counter.frame_count <= 2  # one graph, at most one more when the length turns out to vary


def test_autocast_lowers_the_factors_and_not_the_weights() -> None:
    tensors = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = value(tensors)
    low = {name: t.detach().bfloat16() for name, t in tensors.items() if name != "weights"}
    with torch.no_grad():
        expected = value({**low, "weights": tensors["weights"]})
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in tensors.values() if t.requires_grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    tensors = layer()
    plain = gradients(value(tensors), tensors)
    names = list(tensors)
    y = checkpoint(lambda *t: value(dict(zip(names, t, strict=True))), *tensors.values(), use_reentrant=reentrant)
    y.square().sum().backward()
    for mine, theirs in zip((t.grad for t in tensors.values() if t.requires_grad), plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_only_x_and_h_are_saved(kernel: str) -> None:
    batch, length, width, out, ranks = 4, 32, 64, 48, [4] * 15
    tensors = {"x": leaf(batch, length, width), "base": leaf(batch, length, out), "new_a": leaf(4, width),
               "new_b": leaf(4, out), "old_a": leaf(60, width, grad=False), "old_b": leaf(60, out, grad=False),
               "weights": leaf(batch, 16)}  # fmt: skip
    saved: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = weighted_lora(**tensors, scaling=[1.0] * 16, old_ranks=ranks, kernel=kernel)
    extra = {pointer: size for pointer, size in saved.items() if pointer not in own}
    h, scales = batch * length * 64 * 8, batch * 64 * 8
    assert tensors["x"].untyped_storage().data_ptr() in saved
    assert tensors["base"].untyped_storage().data_ptr() not in saved
    assert sum(extra.values()) <= h + 4 * scales
    assert max(extra.values()) == h
    y.sum().backward()
    assert tensors["old_a"].grad is None and tensors["old_b"].grad is None and tensors["new_b"].grad is not None


def test_a_second_gradient_is_refused_rather_than_wrong() -> None:
    tensors = layer(torch.float64)
    (dx,) = torch.autograd.grad(value(tensors).square().sum(), [tensors["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_base_and_result_may_have_another_dtype_than_the_factors() -> None:
    tensors = layer()
    wide = {**tensors, "base": tensors["base"].detach().double().requires_grad_()}
    y = value(wide)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), value(tensors))


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_factors_are_refused(mesh) -> None:
    tensors = layer()
    sharded = {**tensors, "new_a": distribute_tensor(tensors["new_a"].detach(), mesh)}
    with pytest.raises(ValueError, match=r"new_a is a DTensor.*full_tensor"):
        value(sharded)


@fsdp2_on_cpu
def test_wrapped_modules_are_served(mesh) -> None:
    tensors = layer()

    class Block(torch.nn.Module):
        """Holds the factors; its forward is where FSDP makes them whole."""

        def __init__(self) -> None:
            super().__init__()
            names = ("old_a", "old_b", "new_a", "new_b")
            self.factors = torch.nn.ParameterDict({n: torch.nn.Parameter(tensors[n].detach().clone()) for n in names})

        def forward(self, x: torch.Tensor, base: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return value({"x": x, "base": base, "weights": weights, **self.factors})

    block = Block()
    sharded_block = copy.deepcopy(block)
    torch.distributed.fsdp.fully_shard(sharded_block, mesh=mesh)
    inputs = [tensors[n].detach() for n in ("x", "base", "weights")]
    expected, y = block(*inputs), sharded_block(*inputs)
    assert torch.equal(y, expected)
    expected.square().sum().backward(), y.square().sum().backward()
    for name, parameter in sharded_block.factors.items():
        assert torch.equal(parameter.grad.full_tensor(), block.factors[name].grad)


def test_shapes_that_do_not_fit_are_named() -> None:
    tensors = layer()
    with pytest.raises(ValueError, match=r"old_b has shape \[12, 6\], expected \[rank, 12\].*transposed"):
        value({**tensors, "old_b": tensors["old_b"].mT})
    with pytest.raises(ValueError, match=r"add up to 5, but old_a has 6 rows"):
        weighted_lora(**tensors, scaling=[1.0] * 3, old_ranks=[2, 3])
