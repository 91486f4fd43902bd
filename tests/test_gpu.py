"""On a GPU: what a CPU computes, by the kernels, by whole models, and through a stream of tasks. Without one: nothing.

The tests are defined only where there is a GPU, so that a machine without one has no skipped ones to explain. Beside
them test_cli.py and test_serving.py have their models on the GPU where there is one.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from helpers.tiny import build_pool, labelled, padded, tiny_llama, token_rows
from helpers.training import arguments, own_weights
from helpers.words import MARKS, collate, prompts_of, rows_of, tokenizer
from peft_sapt import ArmCallback, GeneratorSettings, create_optimizer, save_pool
from peft_sapt.arm.checks import isolated_rng
from peft_sapt.ops import dispatch
from peft_sapt.ops.devtools import check, numerics
from peft_sapt.ops.spread import rank_scales

NAMES = ["a", "b", "c"]
ROWS = token_rows([5, 9, 3, 7])
KINDS = {
    "attention": {}, "ridge": {"router": "ridge"}, "prompt": {"block": "prompt", "num_virtual_tokens": 4},
    "triton": {}, "torch": {"kernel": "torch"},
}  # fmt: skip


@contextmanager
def on_kernel(kind: str):
    """Within, a pool of the kind "triton" computes by Triton, however small it is."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "triton":
            patch.setenv(dispatch.VARIABLE, "triton")
        yield


def pool_of(family: str, kind: str):
    fields = KINDS[kind]
    pool = build_pool(family, NAMES, **fields).eval()
    if kind == "ridge":
        for i in range(3):
            pool.base_model.router.fit("default", torch.randn(8, 64, generator=torch.Generator().manual_seed(i)))
    return pool


def on_gpu(batch: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in batch.items()}


def close(found, expected, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(found.float().cpu(), expected.float(), rtol=tolerance, atol=tolerance)


if torch.cuda.is_available():
    torch.set_float32_matmul_precision("highest")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_kernels(dtype: torch.dtype) -> None:
        bad = []
        for case in (*numerics.SMALL, *numerics.LARGE):
            errors = numerics.errors(case, dtype, "cuda", "triton")
            bad += [(case, errors)] if max(errors.values()) > numerics.limit(case, dtype) else []
        assert bad == []
        assert max(numerics.tile_errors(dtype, "cuda").values()) <= numerics.limit(None, dtype)

    def test_a_cuda_graph() -> None:
        assert check.in_a_graph()

    def test_gates_are_made_without_a_copy_from_the_host() -> None:
        weights = torch.rand(2, 8, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            scales = rank_scales(weights, [2.0] * 4 + [1.0] * 4, [4] * 6 + [8] * 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(scales, rank_scales(weights.cpu(), [2.0] * 4 + [1.0] * 4, [4] * 6 + [8] * 2))

    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_and_gradients(family: str, kind: str) -> None:
        pool, batch = pool_of(family, kind), labelled(family, ROWS)
        other = copy.deepcopy(pool).cuda()
        with torch.no_grad():
            expected = pool(**batch).logits
            with on_kernel(kind):
                close(other(**on_gpu(batch)).logits, expected)
        if kind == "ridge":
            return
        pool.train()(**batch).loss.backward()
        with on_kernel(kind):
            other.train()(**on_gpu(batch)).loss.backward()
        theirs = dict(other.named_parameters())
        compared = [n for n, p in pool.named_parameters() if p.grad is not None]
        assert any("sapt_key" in n for n in compared) and len(compared) > 3
        for name in compared:
            close(theirs[name].grad, pool.get_parameter(name).grad, 1e-3)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
    def test_generation(family: str, kind: str, settings: dict) -> None:
        pool, batch = pool_of(family, kind), padded(ROWS)
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        expected = pool.generate(**batch, **settings)
        with on_kernel(kind):
            assert torch.equal(copy.deepcopy(pool).cuda().generate(**on_gpu(batch), **settings).cpu(), expected)

    def test_a_static_cache_gives_the_same_tokens() -> None:
        pool, batch = pool_of("llama", "attention").cuda(), on_gpu(padded(ROWS))
        settings = {"max_new_tokens": 6, "do_sample": False}
        expected = pool.generate(**batch, **settings)
        assert torch.equal(pool.generate(**batch, **settings, cache_implementation="static"), expected)

    @pytest.mark.parametrize("kind", ["triton", "torch"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_bases_keep_float32_blocks(dtype: torch.dtype, kind: str) -> None:
        torch.manual_seed(0)
        pool, batch = pool_of("llama", kind), labelled("llama", ROWS)
        with torch.no_grad():
            expected = pool(**batch).logits
        half = copy.deepcopy(pool).cuda()
        for name, parameter in half.named_parameters():
            if ".sapt_" not in name:
                parameter.data = parameter.data.to(dtype)
        with torch.no_grad(), on_kernel(kind):
            found = half(**on_gpu(batch)).logits
        assert found.dtype == dtype
        assert float((found.float().cpu() - expected).norm() / expected.norm()) < 0.05
        with torch.autocast("cuda", dtype), on_kernel(kind):
            half.train()(**on_gpu(batch)).loss.backward()
        grads = [p.grad for n, p in half.named_parameters() if p.grad is not None]
        assert grads and all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)

    @pytest.mark.parametrize("replay", ["rows", "generated"])
    @pytest.mark.parametrize("router", ["attention", "ridge"])
    @pytest.mark.parametrize("bf16", [False, True])
    def test_a_stream_through_the_trainer(tmp_path, replay: str, router: str, bf16: bool) -> None:
        torch.manual_seed(0)
        model = build_pool("llama", ["a"], task_ranks=[4], r=4, router=router, init_weights=True)
        generator = GeneratorSettings(epochs=20, learning_rate=2e-2, lora_dropout=0.0)
        arm = ArmCallback(tokenizer(), replay=replay, generator=generator)
        for task in list(MARKS)[:2]:
            if task not in model.tasks:
                model.add_task(task)
            args = arguments(tmp_path, use_cpu=False, bf16=bf16, max_steps=24)
            run = Trainer(
                model=model, args=args, train_dataset=rows_of(task), data_collator=collate, callbacks=[arm],
                optimizers=create_optimizer(model, args, attention_lr=1e-3),
            )  # fmt: skip
            with on_kernel("triton" if bf16 else "torch"):
                run.train()
            losses = [h["loss"] for h in run.state.log_history if "loss" in h]
            assert losses[-1] < losses[0]
        assert next(model.parameters()).is_cuda and model.committed_tasks == ["a", "b"]
        if replay == "rows":
            assert all(leads > 0.9 for leads, _ in own_weights(model.eval()).values())
        save_pool(model, tmp_path / "pool", arm)
        batch = prompts_of("a", seed=3)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload().cpu(), tmp_path / "pool").eval()
        with torch.no_grad():
            found, expected = (m.eval()(**b).logits for m, b in ((model, on_gpu(batch)), (loaded.cpu(), batch)))
        real = batch["attention_mask"].bool()
        difference = (found.float().cpu() - expected)[real].norm() / expected[real].norm()
        assert float(difference) < (2e-2 if bf16 else 1e-3), "under bf16=True the Trainer leaves autocast on"

    @pytest.mark.parametrize("kind", ["attention", "prompt"])
    def test_light_loading_goes_to_where_the_base_is(tmp_path, kind: str) -> None:
        pool = pool_of("llama", kind)
        pool.save_pretrained(tmp_path)
        for device in ("cpu", "cuda"):
            base = copy.deepcopy(pool).unload().to(device)
            light = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
            assert {p.device.type for p in light.parameters()} == {device}
            batch = padded(ROWS) if device == "cpu" else on_gpu(padded(ROWS))
            with torch.no_grad():
                close(light(**batch).logits, pool(**padded(ROWS)).logits)

    def test_seeding_apart_leaves_the_gpus_generator_alone() -> None:
        model = tiny_llama().cuda()
        for given in (None, model):
            torch.cuda.manual_seed(5)
            expected = torch.rand(4, device="cuda")
            torch.cuda.manual_seed(5)
            with isolated_rng(0, given):
                torch.rand(3, device="cpu" if given is None else "cuda")
            assert torch.equal(torch.rand(4, device="cuda"), expected)
        with isolated_rng(7, model):
            first = torch.rand(4, device="cuda")
        with isolated_rng(7, model):
            assert torch.equal(torch.rand(4, device="cuda"), first)

    @pytest.mark.parametrize("kernel", ["auto", "torch"])
    def test_layers_on_another_device(kernel: str) -> None:
        """As a device map would place them; here the second device is the CPU."""
        batch, settings = padded(ROWS), {"max_new_tokens": 5, "do_sample": False}
        spread = build_pool("llama", NAMES, kernel=kernel, target_modules=["q_proj", "down_proj"]).eval()
        with torch.no_grad():
            expected, tokens = spread(**batch).logits, spread.generate(**batch, **settings)
        spread.cuda()
        layer = spread.get_base_model().model.layers[1].mlp.down_proj
        layer.cpu()
        layer.register_forward_pre_hook(lambda module, args: tuple(a.cpu() for a in args))
        layer.register_forward_hook(lambda module, args, output: output.cuda())
        with torch.no_grad():
            close(spread(**on_gpu(batch)).logits, expected)
        assert torch.equal(spread.generate(**on_gpu(batch), **settings).cpu(), tokens)

    def test_a_compiled_model() -> None:
        torch._dynamo.reset()
        pool, batch = pool_of("llama", "attention").cuda(), on_gpu(padded(ROWS))
        with torch.no_grad():
            expected = pool(**batch).logits
            close(torch.compile(pool)(**batch).logits, expected.cpu())

    def test_triton_is_what_auto_means_here() -> None:
        assert dispatch.choose("auto", torch.device("cuda", 0), torch.bfloat16) == "triton"
