"""A planned model among other people's code: threads, tasks, copies, hooks, changing weights."""

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import pytest
import torch
from families import FAMILIES
from plans import dense_plan, plan_of
from restored import same_state, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.pass_lock import PassLock
from planner.models.running.session import Session
from planner.models.running.skipping import obeying, session_on
from planner.plan import TokenStage

SCATTERED = (0, 3, 5)


@pytest.fixture
def model(qwen3):
    return qwen3[0].model


@pytest.fixture
def session(qwen3):
    return session_on(qwen3[0].model, qwen3[1])


@pytest.fixture
def some(qwen3):
    """Plans that differ in kind."""
    graph = qwen3[1]
    return [
        plan_of(graph, layers_off=(1,)),
        plan_of(graph, heads={0: (1,), 2: ()}),
        plan_of(graph, mlp={1: SCATTERED, 2: ()}),
        dense_plan(graph),
        plan_of(graph, layers_off=(0,), mlp={2: (1, 2, 6)}, heads={1: (0,)}),
    ]


IDS = torch.arange(3, 14)[None]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def expected(model, session, plans):
    """What a single thread answers under each plan."""
    found = []
    for plan in plans:
        with session.under(plan):
            found.append(logits(model))
    assert not any(torch.equal(a, b) for a, b in pairwise(found))
    return found


# -- which plan runs -------------------------------------------------------------------------------


def test_threads_share_a_model_under_plans_of_their_own(model, session, some):
    right = expected(model, session, some)
    session.obey(some[0])
    ready = threading.Barrier(len(some))

    def answer(number):
        with session.under(some[number]):
            ready.wait()
            for _ in range(15):
                assert torch.equal(logits(model), right[number])
                assert session.setting.plan is some[number]
        assert torch.equal(logits(model), right[0])

    with ThreadPoolExecutor(len(some)) as pool:
        for done in [pool.submit(answer, number) for number in range(len(some))]:
            done.result()


def test_tasks_share_a_model_under_plans_of_their_own(model, session, some):
    right = expected(model, session, some)

    async def answer(number):
        with session.under(some[number % len(some)]):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(logits(model), right[number % len(some)])

    async def inside():
        with session.under(some[1]):
            begun = asyncio.create_task(answer_later())
        # What a task has begun with stays, though the block is left.
        assert session.program is None
        await begun

    async def answer_later():
        await asyncio.sleep(0)
        assert torch.equal(logits(model), right[1])

    async def main():
        await asyncio.gather(*(answer(number) for number in range(40)), inside())

    asyncio.run(main())
    assert session.program is None


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_blocks_may_be_left_in_any_order(model, session, some, order):
    right = expected(model, session, some)
    blocks = [session.under(plan) for plan in some[:3]]
    open_ = []
    for number, block in enumerate(blocks):
        block.__enter__()
        open_.append(number)
    for number in order:
        blocks[number].__exit__(None, None, None)
        open_.remove(number)
        now = right[open_[-1]] if open_ else right[3]
        assert torch.equal(logits(model), now)
    assert session.setting is None


def test_what_is_set_without_a_block_holds_until_the_block_around_it_is_left(session, some):
    session.under(some[0])
    with session.under(some[1]) as one:
        assert one is some[1]
        session.under(some[2])
        session.under(some[4])
        assert session.setting.plan is some[4]
    assert session.setting.plan is some[0]
    session.under(some[2])
    assert session.setting.plan is some[2]
    session.obey(some[4])
    assert session.setting.plan is some[4]


def test_suspended_generators(model, session, some):
    right = expected(model, session, some)

    def answers(plan):
        with session.under(plan):
            while True:
                yield logits(model)

    one, other = answers(some[0]), answers(some[1])
    assert torch.equal(next(one), right[0])
    assert torch.equal(next(other), right[1])
    # The one that was resumed last holds: a generator has no context of its own.
    assert torch.equal(logits(model), right[1])
    one.close()
    assert torch.equal(logits(model), right[1])
    other.close()
    assert torch.equal(logits(model), right[3])


def test_a_generator_closed_by_another_task(model, session, some):
    right = expected(model, session, some)

    async def answers():
        with session.under(some[0]):
            yield logits(model)
            yield logits(model)

    async def main():
        waiting = answers()
        assert torch.equal(await anext(waiting), right[0])
        await asyncio.create_task(waiting.aclose())
        assert torch.equal(logits(model), right[3])

    asyncio.run(main())


def test_plans_in_a_block_that_is_begun_anew(model, session, some):
    right = expected(model, session, some)
    with session.under(some[0]):
        session.obey(some[1])
        assert torch.equal(logits(model), right[1])
    assert torch.equal(logits(model), right[1])
    block = session.under(some[0])
    with block:
        session.close()
        assert torch.equal(logits(model), right[3])
        with pytest.raises(InputError, match="let go of this model"):
            session.under(some[1])
    assert torch.equal(logits(model), right[3])


def test_a_pass_that_is_cut_short_leaves_the_model_to_others(model, session, some):
    right = expected(model, session, some)
    session.obey(some[0])

    def stop(*_):
        raise KeyboardInterrupt

    handle = session.layers[2].module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model).result(timeout=30), right[0])
    assert torch.equal(logits(model), right[0])
    with pytest.raises(KeyboardInterrupt), session.layers[2].module.register_forward_pre_hook(stop):
        logits(model)
    with session.under(some[2]):
        assert torch.equal(logits(model), right[2])


def test_nobody_overtakes():
    lock, order = PassLock(), []
    lock.acquire()
    assert lock.is_mine

    def wait(number):
        lock.acquire()
        order.append(number)
        lock.release()

    threads = []
    for number in range(6):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        while len(lock._waiting) <= number:
            pass
    lock.release()
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    assert not lock.is_mine


def test_what_torch_compile_traced_is_for_those_who_want_its_plan(model, session, some):
    right = expected(model, session, some)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def near(got, want):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    near(logits(compiled), right[3])
    session.obey(some[0])
    near(logits(compiled), right[0])
    with session.under(some[2]):
        near(logits(compiled), right[2])
        near(logits(model), right[2])
        with ThreadPoolExecutor(1) as pool:
            # As it is, the model is everybody's.
            near(pool.submit(logits, model).result(), right[0])
            with pytest.raises(InputError, match="another thread or task has set the plan"):
                pool.submit(logits, compiled).result()
        near(logits(compiled), right[2])
    near(logits(compiled), right[0])
    session.close()
    near(logits(compiled), right[3])
    torch.compiler.reset()


def test_a_graph_compiled_before_there_was_a_plan_is_compiled_again(qwen3, some):
    torch.compiler.reset()
    model = copy.deepcopy(qwen3[0].model)
    compiled = torch.compile(model, backend="eager")
    stock = logits(compiled)
    session_on(model, qwen3[1]).obey(some[0])
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(compiled), stock)
    torch.compiler.reset()


# -- the model between passes ----------------------------------------------------------------------


def test_between_passes_the_model_is_as_it_was(llava):
    family, graph = llava
    inputs = family.inputs()
    family.model.generate(**inputs, max_new_tokens=2)
    before = snapshot(family.model)
    session = session_on(family.model, graph)
    stages = (TokenStage(0, 8, 16, "prumerge"), TokenStage(2, 4, 16, "fastv"))
    session.obey(plan_of(graph, layers_off=(1,), heads={2: (1,)}, mlp={0: (0, 4)}, tokens=stages))
    family.model.generate(**inputs, max_new_tokens=2)
    for path, attributes in list(snapshot(family.model).items())[1:]:
        assert attributes.keys() == before[path].keys(), path
    session.close()
    assert same_state(before, snapshot(family.model))


def test_a_copy_has_a_session_of_its_own(model, session, some):
    right = expected(model, session, some)
    session.obey(some[0])
    with session.under(some[1]):
        twin = copy.deepcopy(model)
    own = Session.of(twin)
    assert own is not session
    assert own.model is twin
    assert torch.equal(logits(twin), right[1])
    assert torch.equal(logits(model), right[0])
    with own.under(some[2]):
        assert torch.equal(logits(twin), right[2])
        assert torch.equal(logits(model), right[0])
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(logits(twin), right[1])
    assert torch.equal(logits(model), right[0])
    own.close()
    assert torch.equal(logits(model), right[0])
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_a_model_in_a_file_takes_its_plan_along(llava, tmp_path):
    # Once it has run, no model of transformers goes into a file: it has got hooks that don't.
    family, graph = FAMILIES["llava"](), llava[1]
    inputs = family.inputs()
    session = session_on(family.model, graph)
    tokens = (TokenStage(0, 8, 16, "prumerge"), TokenStage(2, 4, 16, "fastv"))
    session.obey(plan_of(graph, layers_off=(1,), mlp={0: (0, 4)}, tokens=tokens))
    torch.save(family.model, tmp_path / "model.pt")
    pickled = pickle.dumps(family.model)
    with torch.no_grad():
        right = family.model(**inputs).logits
    for read in (
        torch.load(tmp_path / "model.pt", weights_only=False),
        pickle.loads(pickled),
    ):
        with torch.no_grad():
            assert torch.equal(read(**inputs).logits, right)
        Session.of(read).close()
        with torch.no_grad():
            stock = read(**inputs).logits
            with session.under(dense_plan(graph)):
                assert torch.equal(family.model(**inputs).logits, stock)


def test_a_planned_model_is_freed_with_its_last_name():
    family = FAMILIES["qwen3"]()
    model = family.model
    graph = lower_model(model, "qwen3")
    session_on(model, graph).obey(plan_of(graph, layers_off=(1,), mlp={0: SCATTERED}))
    session_on(model, graph).under(plan_of(graph, heads={0: (1,)}))
    logits(model)
    seen = weakref.ref(model)
    del model, family
    gc.collect()
    assert seen() is None


def test_others_may_wrap_and_unwrap_what_forward_is(model, session, some):
    """As accelerate's hooks do: whoever comes and goes, whenever."""
    right = expected(model, session, some)
    modules = [model, model.model, session.layers[0].module, session.layers[1].mlp.module]
    modules.append(session.layers[1].mlp.linears[0].module)
    calls = []

    def wrap():
        for module in modules:
            stock = module.forward

            def forward(*args, stock=stock, **kwargs):
                calls.append(stock)
                return stock(*args, **kwargs)

            module._old_forward, module.forward = stock, forward

    def unwrap():
        for module in modules:
            module.forward = module._old_forward
            del module._old_forward

    wrap()
    session.obey(some[2])
    assert torch.equal(logits(model), right[2])
    assert calls
    unwrap()
    assert torch.equal(logits(model), right[2])
    wrap()
    session.close()
    unwrap()
    assert torch.equal(logits(model), right[3])
    for module in modules:
        module.__dict__.pop("forward")


def test_hooks_of_accelerate_come_and_go(model, session, some):
    hooks = pytest.importorskip("accelerate.hooks")
    right = expected(model, session, some)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    hooks.add_hook_to_module(session.layers[0].module, hooks.ModelHook())
    session.obey(some[0])
    assert torch.equal(logits(model), right[0])
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), right[0])
    hooks.add_hook_to_module(model, hooks.ModelHook())
    session.close()
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), right[3])
    model.__dict__.pop("forward", None)
    session_layer = model.model.layers[0]
    session_layer.__dict__.pop("forward", None)


def test_replicas_of_dataparallel_are_refused(model, session, some):
    session.obey(some[0])
    replica = model._replicate_for_data_parallel()
    with pytest.raises(InputError, match="use DistributedDataParallel"):
        replica(IDS)


# -- weights that change ---------------------------------------------------------------------------


def in_place(linear, new):
    with torch.no_grad():
        linear.weight.copy_(new)


def loaded(linear, new):
    linear.load_state_dict({"weight": new})


def assigned(linear, new):
    linear.load_state_dict({"weight": new}, assign=True)


def data_exchanged(linear, new):
    linear.weight.data = new


def data_written(linear, new):
    linear.weight.data.copy_(new)


def by_numpy(linear, new):
    linear.weight.detach().numpy()[...] = new.numpy()


def stepped(linear, new):
    linear.weight.grad = linear.weight.detach() - new
    torch.optim.SGD([linear.weight], lr=1.0).step()
    linear.weight.grad = None


def exchanged(linear, new):
    linear.weight = nn.Parameter(new)


CHANGES = [in_place, loaded, assigned, data_exchanged, data_written, by_numpy, stepped, exchanged]


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_follows_the_weights(qwen3, some, change):
    graph = qwen3[1]
    model = copy.deepcopy(qwen3[0].model)
    session = session_on(model, graph)
    plan = plan_of(graph, heads={1: (1,)}, mlp={1: SCATTERED})
    session.obey(plan)
    for path in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"):
        linear = model.model.layers[1].get_submodule(path)
        before = logits(model)
        change(linear, torch.randn_like(linear.weight) / 4)
        after = logits(model)
        assert not torch.allclose(after, before)
        session.obey(dense_plan(graph))
        with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
            masked = logits(model)
        session.obey(plan)
        torch.testing.assert_close(after, masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.double()])
def test_a_plan_follows_the_type_of_the_model(qwen3, move, frozen):
    graph = qwen3[1]
    model = copy.deepcopy(qwen3[0].model)
    session = session_on(model, graph, freeze=frozen)
    plan = plan_of(graph, heads={1: (1,)}, mlp={1: SCATTERED}, layers_off=(0,))
    session.obey(plan)
    before = [logits(model) for _ in range(3)][-1]
    after = logits(move(model))
    assert after.dtype == model.dtype
    assert (after.float() - before).norm() < 0.1 * before.norm()


def test_modules_may_be_exchanged(qwen3, some):
    graph = qwen3[1]
    model = copy.deepcopy(qwen3[0].model)
    session = session_on(model, graph)
    session.obey(some[4])
    before = logits(model)
    layer = model.model.layers[2]
    layer.mlp = copy.deepcopy(layer.mlp)
    assert torch.equal(logits(model), before)
    in_place(layer.mlp.up_proj, torch.randn_like(layer.mlp.up_proj.weight))
    assert not torch.equal(logits(model), before)


# -- training --------------------------------------------------------------------------------------


def gradients(model, run=IDS):
    model.zero_grad()
    model(run, labels=run).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_masked_model(qwen3, some, frozen):
    graph = qwen3[1]
    model = copy.deepcopy(qwen3[0].model)
    plan = plan_of(graph, layers_off=(0,), heads={1: (1,), 2: ()}, mlp={1: SCATTERED, 2: (2,)})
    with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
        right = gradients(model)
    with obeying(model, graph, plan, freeze=frozen):
        logits(model)
        found = gradients(model)
    off = [name for name in right if name not in found]
    assert off
    assert not any(right[name].any() for name in off)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_plan_again(qwen3, reentrant):
    graph = qwen3[1]
    model = copy.deepcopy(qwen3[0].model).train()
    plan = plan_of(graph, layers_off=(0,), heads={1: (1,)}, mlp={2: SCATTERED})
    session = session_on(model, graph)
    session.obey(plan)
    right = gradients(model)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == right.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_trainer_trains_what_the_plan_keeps(qwen3, tmp_path):
    graph = qwen3[1]
    model = copy.deepcopy(qwen3[0].model)
    plan = plan_of(graph, layers_off=(0,), mlp={1: SCATTERED})
    session_on(model, graph).obey(plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = {"input_ids": IDS[0], "labels": IDS[0]}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[row] * 4).train()
    after = dict(model.named_parameters())
    up = "model.layers.1.mlp.up_proj.weight"
    changed = (after[up] != before[up]).any(1)
    site = graph.sites_by_name["mlp.1"]
    kept = plan.kept(site).lanes
    rows = torch.zeros(len(changed), dtype=torch.bool)
    for start, stop in kept:
        rows[start:stop] = True
    assert changed[rows].all()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], before[name])


def test_contexts_may_be_stacked(session, some):
    with ExitStack() as stack:
        for plan in some:
            assert stack.enter_context(session.under(plan)) is plan
    assert session.setting is None
