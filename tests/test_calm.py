"""What shows the shadow in place of the weights: ``calm()``, and ``eval()`` and ``train()`` as trainers call them."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import CASES, configured, contents, differences, siblings, train, ways, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import emonavi
from emonavi.autonomous import Merger


def wrapped(params, **options):
    inner = torch.optim.AdamW(params, lr=1e-2, foreach=options.pop("foreach", None))
    return emonavi.Emotional(inner, **{"on_missing_loss": "ignore", "capture": False} | options)


MAKERS = [*(case.make for case in CASES), wrapped]
makers = pytest.mark.parametrize("make", MAKERS, ids=[*(case.name for case in CASES), "Emotional"])


def run(make, steps=20, *, dtype=torch.float32, **options):
    params = weights(dtype)
    optimizer = make(params, **options)
    train(optimizer, params, steps)
    return optimizer, params


def copies(params):
    return [p.detach().clone() for p in params]


def same(params, others):
    return all(torch.equal(p, o) for p, o in zip(params, others, strict=True))


def shadows(optimizer, params):
    return [optimizer.state[p]["shadow"].to(p.dtype, copy=True) for p in params]


def write(params, values):
    """As ``load_state_dict()`` does."""
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def load(order, model, optimizer):
    for part in (model, optimizer) if order == "model first" else (optimizer, model):
        part()


def merges(optimizer):
    merger = Merger(torch.nn.Linear(1, 1), optimizer)
    return merger.offer, lambda: merger.accept(torch.zeros(1))


# calm() ---------------------------------------------------------------------------------------------------------------


@configured(lambda c: c.shadow)
@ways
def test_calm_swaps_and_restores(case, config, foreach):
    optimizer, params = run(case.make, foreach=foreach, process_group=None, **config.kwargs)
    before, average = contents(optimizer), shadows(optimizer, params)
    assert not same(params, average)
    places = [p.data_ptr() for p in params]
    with optimizer.calm():
        assert same(params, average)
        assert [p.data_ptr() for p in params] == places
        for what in (optimizer.step, optimizer.reset_emotion, *merges(optimizer)):
            with pytest.raises(RuntimeError, match=r"inside calm\(\): leave the block first; the weights are"):
                what()
        optimizer.train()  # a trainer may call it: the block ends where it ends
        with optimizer.calm():
            assert same(params, average)
        assert same(params, average)
    assert differences(before, contents(optimizer)) == []
    with pytest.raises(KeyError, match="mine"), optimizer.calm():
        raise KeyError("mine")
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 1, start=20)


@makers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_calm_in_other_dtypes(make, dtype):
    optimizer, params = run(make, 10, dtype=dtype, use_shadow=True)
    before = copies(params)
    with optimizer.calm():
        for p in params:
            assert optimizer.state[p]["shadow"].dtype == torch.promote_types(dtype, torch.float32)
            assert p.dtype == dtype
        assert same(params, shadows(optimizer, params))
    assert same(params, before)


@makers
def test_calm_without_a_shadow(make):
    optimizer, params = run(make, 3)
    with pytest.raises(RuntimeError, match=r"no shadow to show: construct with use_shadow=True"), optimizer.calm():
        pass
    train(optimizer, params, 2, start=3)  # the refusal left nothing locked


@makers
def test_before_the_first_step_the_weights_are_shown(make):
    """As a trainer's check of its evaluation does it; without a shadow calm() is refused as ever."""
    params = weights()
    before, optimizer = copies(params), make(params, use_shadow=True)
    with optimizer.calm():
        assert same(params, before)
    optimizer.eval()
    train(optimizer, params, 1)  # nothing was replaced, so nothing has to be put back
    with pytest.raises(RuntimeError, match="use_shadow=True"), make(weights()).calm():
        pass


@makers
def test_calm_gives_back_weights_that_were_moved_inside(make):
    """As by ``model.half()``, for an export, and ``model.float()`` after it."""
    optimizer, params = run(make, 3, use_shadow=True)
    before = copies(params)
    with optimizer.calm():
        for p in params:
            p.data = p.data.half().float()
    assert same(params, before)


# eval() and train() ---------------------------------------------------------------------------------------------------


@makers
@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_changes_nothing(make, foreach, dtype):
    plain, alone = run(make, 12, dtype=dtype, foreach=foreach, use_shadow=True, process_group=None)
    params = weights(dtype)
    optimizer = make(params, foreach=foreach, use_shadow=True, process_group=None)
    for t in range(12):
        optimizer.train()  # as trainers do before each step
        train(optimizer, params, 1, start=t)
        if t % 4 == 3:
            before, average = copies(params), shadows(optimizer, params)
            assert not same(before, average)
            for _ in range(2):
                optimizer.eval()
                assert same(params, average)
                with optimizer.calm():
                    assert same(params, average)
            for what in merges(optimizer):
                with pytest.raises(RuntimeError, match=r"a merge after eval\(\): call train\(\) first"):
                    what()
            assert same(params, average)
    optimizer.train()
    assert "shown" not in repr(optimizer)  # of the state, not an option
    assert same(params, alone)
    assert differences(contents(plain), contents(optimizer)) == []


@makers
def test_without_a_shadow_there_is_nothing_to_show(make):
    optimizer, params = run(make, 3)
    before = contents(optimizer)
    optimizer.eval()
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 1, start=3)


@makers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_run_saved_after_eval_resumes_exactly(make, dtype, order, tmp_path):
    optimizer, params = run(make, 10, dtype=dtype, use_shadow=True)
    optimizer.eval()
    torch.save({"model": copies(params), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    shown = copies(params)
    optimizer.train()
    train(optimizer, params, 5, start=10)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = weights(dtype)
    resumed = make(again, use_shadow=True)
    load(order, lambda: write(again, saved["model"]), lambda: resumed.load_state_dict(saved["optimizer"]))
    assert same(again, shown)
    resumed.eval()  # it is there already
    assert same(again, shown)
    resumed.train()
    train(resumed, again, 5, start=10)
    assert differences(contents(optimizer), contents(resumed)) == []


@makers
def test_a_step_after_eval_moves_the_weights_that_train(make):
    """Of a loop that forgets train() one gradient is the shadow's, and the run goes on."""
    (optimizer, params), (other, others) = (run(make, 5, use_shadow=True) for _ in range(2))
    optimizer.eval()
    shown = copies(params)
    grads = [torch.full_like(p, 0.1) for p in params]
    for some in (params, others):
        for p, g in zip(some, grads, strict=True):
            p.grad = g.clone()
    with pytest.warns(UserWarning, match=r"step\(\) after eval\(\).*call train\(\) before the forward pass"):
        optimizer.step(loss=1.0)
    other.step(loss=1.0)
    assert differences(contents(optimizer), contents(other)) == []
    assert not same(params, shown)

    def closure():
        assert same(params, others)  # of which the gradient is: nothing to warn of
        return 1.0

    optimizer.eval()
    optimizer.step(closure)
    other.step(lambda: 1.0)
    assert differences(contents(optimizer), contents(other)) == []


@makers
def test_a_new_stage_after_eval(make):
    (optimizer, params), (other, _) = (run(make, 5, use_shadow=True) for _ in range(2))
    optimizer.eval()
    optimizer.reset_emotion()
    other.reset_emotion()
    assert differences(contents(optimizer), contents(other)) == []
    assert same(params, shadows(optimizer, params))


@makers
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_the_checkpoint_of_training_is_loaded_after_eval(make, order):
    """As in a notebook: train, evaluate, and go on from an older checkpoint."""
    optimizer, params = run(make, 5, use_shadow=True)
    saved, weights_then = copy.deepcopy(optimizer.state_dict()), copies(params)
    before = contents(optimizer)
    train(optimizer, params, 5, start=5)
    optimizer.eval()
    load(order, lambda: write(params, weights_then), lambda: optimizer.load_state_dict(saved))
    optimizer.train()
    assert differences(before, contents(optimizer)) == []


@makers
def test_weights_from_elsewhere_are_not_replaced_by_the_shadow(make):
    """A trainer loads the best ones at the end, and evaluates."""
    optimizer, params = run(make, 5, use_shadow=True)
    best = copies(params)
    train(optimizer, params, 5, start=5)
    write(params, best)
    with pytest.warns(UserWarning, match=r"written to since the last step: eval\(\) leaves them as they are"):
        optimizer.eval()
    assert same(params, best)
    with optimizer.calm():  # who asks for the shadow gets it
        assert same(params, shadows(optimizer, params))
    train(optimizer, params, 1, start=10)
    optimizer.eval()
    assert same(params, shadows(optimizer, params))


@makers
@pytest.mark.parametrize("far", [1.0, 1e-5])
def test_weights_that_are_loaded_after_eval_stay(make, far):
    """A trainer loads its best ones at the end, however near, and is asked to evaluate, and to train on."""
    for asks in ("eval", "train"):
        optimizer, params = run(make, 10, use_shadow=True)
        optimizer.eval()
        best = [p * (1 + far) for p in copies(params)]
        write(params, best)
        if asks == "eval":
            optimizer.eval()  # an ordinary run: nothing to warn of
        else:
            with pytest.warns(UserWarning, match=r"since eval\(\): train\(\) leaves them as they are, and drops what"):
                optimizer.train()
        assert same(params, best)
        assert not any("raw" in state for state in optimizer.state.values())
        for change in (optimizer.train, optimizer.eval, optimizer.train):
            change()
            assert same(params, best)
        with optimizer.calm():
            assert same(params, shadows(optimizer, params))
        assert same(params, best)
        train(optimizer, params, 1, start=10)
        optimizer.eval()
        assert same(params, shadows(optimizer, params))


@makers
def test_calm_after_weights_were_loaded_shows_the_shadow(make):
    optimizer, params = run(make, 5, use_shadow=True)
    optimizer.eval()
    with torch.no_grad():
        params[0].mul_(2)
    held = copies(params)
    with optimizer.calm():
        assert same(params, shadows(optimizer, params))
    assert torch.equal(params[0], held[0])


@makers
def test_only_what_was_written_to_stays(make):
    """As by a layer that renormalises its weights in each forward pass."""
    optimizer, params = run(make, 5, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    with torch.no_grad():
        params[1].mul_(0.5)
    held = params[1].detach().clone()
    with pytest.warns(UserWarning, match="weights were written to since"):
        optimizer.train()
    assert torch.equal(params[1], held)
    assert same(params[:1] + params[2:], before[:1] + before[2:])


@makers
def test_weights_that_were_put_aside_and_back_are_no_others(make):
    """As by an evaluation that swaps in weights of its own."""
    optimizer, params = run(make, 5, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    shown = copies(params)
    write(params, [torch.zeros_like(s) for s in shown])
    write(params, shown)
    optimizer.train()
    assert same(params, before)


@makers
def test_a_step_after_weights_were_loaded_is_their_own(make):
    optimizer, params = run(make, 5, use_shadow=True)
    optimizer.eval()
    with torch.no_grad():
        for p in params:
            p.mul_(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, params, 1, start=5)
    assert [str(w.message)[:30] for w in caught] == ["weights were written to since "]
    assert caught[0].filename.endswith("cases.py")  # where step() is called


@makers
def test_a_load_that_is_refused_changes_nothing_after_eval(make):
    optimizer, _ = run(make, 5, use_shadow=True)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["params"].append(99)
    optimizer.eval()
    before = contents(optimizer)
    with pytest.raises(ValueError, match="size of optimizer"):
        optimizer.load_state_dict(saved)
    assert differences(before, contents(optimizer)) == []
    with optimizer.calm():
        optimizer.load_state_dict(copy.deepcopy(run(make, 5, use_shadow=True)[0].state_dict()))
        for what in (optimizer.step, optimizer.reset_emotion):
            with pytest.raises(RuntimeError, match=r"inside calm\(\)"):
                what()


@makers
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_what_was_saved_after_eval_is_loaded_after_eval(make, order):
    optimizer, params = run(make, 5, use_shadow=True)
    raw = copies(params)
    optimizer.eval()
    saved, shown = copy.deepcopy(optimizer.state_dict()), copies(params)
    optimizer.train()
    train(optimizer, params, 3, start=5)
    for _ in range(2):  # the second time into itself
        optimizer.eval()
        load(order, lambda: write(params, shown), lambda: optimizer.load_state_dict(saved))
        assert same(params, shown)
        optimizer.train()
        assert same(params, raw)


def test_the_memories_of_adam_are_taken_over_after_eval():
    adam = torch.optim.AdamW(weights())
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    adam.step()
    optimizer, params = run(CASES[0].make, 5, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    with pytest.warns(UserWarning, match="without an emotion"):
        optimizer.load_state_dict(adam.state_dict())
    assert same(params, before)
    assert optimizer.state_dict()["param_groups"][0]["shown"] == "raw"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 1)


@makers
def test_a_parameter_that_grows_after_eval(make):
    optimizer, params = run(make, 5, use_shadow=True)
    optimizer.eval()
    params[0].grad, params[0].data = None, torch.cat([params[0].data] * 2)
    with pytest.warns(UserWarning, match="weights were written to"):
        optimizer.train()
    assert "raw" not in optimizer.state[params[0]]


@makers
@pytest.mark.parametrize("edit", ["pop", "reverse"])
def test_the_weights_of_groups_that_are_edited_after_eval_return(make, edit):
    params = weights()
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], use_shadow=True)
    train(optimizer, params, 5)
    before = copies(params)
    optimizer.eval()
    getattr(optimizer.param_groups, edit)()
    optimizer.train()
    assert same(params, before)


def test_a_group_added_to_the_wrapped_optimizer_was_not_written_to():
    optimizer, params = run(wrapped, 5, use_shadow=True)
    added = torch.nn.Parameter(torch.zeros(3))
    torch.nn.init.ones_(added)
    optimizer.inner.add_param_group({"params": [added]})
    optimizer.eval()
    assert same(params, shadows(optimizer, params))


@makers
def test_a_layer_that_has_no_shape_yet(make):
    params = weights()
    optimizer = make([*params, torch.nn.parameter.UninitializedParameter()], use_shadow=True)
    with optimizer.calm():
        pass
    train(optimizer, params, 3)
    optimizer.reset_emotion()
    train(optimizer, params, 3)
    optimizer.eval()
    assert same(params, shadows(optimizer, params))


def test_a_forgotten_train_with_gradients_released():
    """Backward cannot put the weights back that it is reading; the gradient that was refused is not kept."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = emonavi.EmoNavi([weight], use_shadow=True)
    emonavi.gradient_release(optimizer)
    for _ in range(3):
        weight.square().sum().backward()
        optimizer.step()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"after eval\(\): call train\(\) first"):
        weight.square().sum().backward()
    assert weight.grad is None
    optimizer.train()
    weight.square().sum().backward()
    optimizer.step()


@makers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_saved_in_fewer_bits_is_taken_for_the_shadow(make, dtype):
    optimizer, params = run(make, 5, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    with torch.no_grad():
        for p in params:
            p.copy_(p.to(dtype))
    optimizer.train()
    assert same(params, before)


@makers
def test_weights_that_are_loaded_after_a_step_at_lr_0_stay(make):
    """As a distributed checkpoint makes the state."""
    params = weights()
    optimizer = make(params, use_shadow=True)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params, 1)
    with torch.no_grad():
        params[0].mul_(2)
    with pytest.warns(UserWarning, match="written to since the last step"):
        optimizer.eval()


@makers
def test_a_block_does_not_make_weights_from_elsewhere_the_optimizers_own(make):
    optimizer, params = run(make, 5, use_shadow=True)
    with torch.no_grad():
        params[0].mul_(2)
    with optimizer.calm():
        pass
    with pytest.warns(UserWarning, match="written to since the last step"):
        optimizer.eval()


@makers
def test_a_group_that_is_added_was_not_written_to(make):
    optimizer, params = run(make, 5, use_shadow=True)
    added = torch.nn.Parameter(torch.zeros(3))
    torch.nn.init.ones_(added)
    optimizer.add_param_group({"params": [added]})
    optimizer.eval()
    assert same(params, shadows(optimizer, params))
    assert added.tolist() == [1, 1, 1]


@makers
def test_frozen_weights_made_in_inference_mode(make):
    with torch.inference_mode():
        frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    params = weights()
    optimizer = make([*params, frozen], use_shadow=True)
    train(optimizer, params, 3)
    optimizer.eval()
    assert same(params, shadows(optimizer, params))


def test_a_second_wrapper_finds_the_weights_that_train():
    optimizer, params = run(wrapped, 5, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    emonavi.Emotional(optimizer.inner, use_shadow=True)
    assert same(params, before)


@makers
def test_a_checkpoint_without_a_shadow_is_said_to_be_one(make):
    (saved, _), (with_shadow, _) = run(make, 3), run(make, 3, use_shadow=True)
    with pytest.warns(UserWarning, match=r"use_shadow=False is taken: set param_groups\[0\]\['use_shadow'\] = True"):
        with_shadow.load_state_dict(saved.state_dict())
    saved.load_state_dict(with_shadow.state_dict())


def test_a_wrapped_optimizer_with_modes_keeps_them():
    class Modes(torch.optim.SGD):
        said = ()

        def eval(self):
            self.said += ("eval",)

        def train(self):
            self.said += ("train",)

    optimizer, params = run(lambda p, **options: emonavi.Emotional(Modes(p, lr=1e-2), **options), 3, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    assert same(params, before)
    optimizer.train()
    assert optimizer.inner.said == ("eval", "train")


@siblings
def test_sharded_weights_are_left_to_calm(case):
    optimizer, params = run(case.make, 5, use_shadow=True)
    before = copies(params)
    for p in params:
        p._fsdp_flattened = True  # as FSDP1 marks them
    with pytest.warns(UserWarning, match=r"weights are sharded: eval\(\) leaves them.*inside calm\(model\)"):
        optimizer.eval()
    assert same(params, before)
    optimizer.train()


@makers
def test_a_copy_made_after_eval_trains_on_by_itself(make):
    optimizer, params = run(make, 5, use_shadow=True)
    before = copies(params)
    optimizer.eval()
    twin = copy.deepcopy(optimizer)
    own = [p for g in twin.param_groups for p in g["params"]]
    twin.train()
    assert same(own, before)
    train(twin, own, 3, start=5)
    optimizer.train()
    train(optimizer, params, 3, start=5)
    assert differences(contents(optimizer), contents(twin)) == []


def test_memory_that_runs_out_leaves_the_weights(monkeypatch):
    optimizer, _ = run(CASES[0].make, 5, use_shadow=True)
    before, count = contents(optimizer), 0
    clone = torch.Tensor.clone

    def scarce(tensor, **options):
        nonlocal count
        count += 1
        if count > 2:
            raise MemoryError("no more")
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", scarce)
    with pytest.raises(MemoryError):
        optimizer.eval()
    monkeypatch.undo()
    assert differences(before, contents(optimizer)) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("make", [CASES[0].make, wrapped], ids=["sibling", "wrapped"])
def test_a_distributed_checkpoint_after_eval(make, flat, tmp_path):
    """It is loaded into what is there: without the raw weights in the state, it would go on from the shadow."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def made():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, make(list(model.parameters()), use_shadow=True)

    (model, optimizer), (other, fresh) = made(), made()
    train(optimizer, list(model.parameters()), 5)
    optimizer.eval()
    dcp.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(model.state_dict())

    def distributed():
        held = {"o": get_optimizer_state_dict(other, fresh, options=options)}
        dcp.load(held, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other, fresh, held["o"], options=options)

    with pytest.raises(ValueError, match=r"after eval\(\), and the weights that train are not there.*calm\(\):`"):
        distributed()
    with fresh.calm():
        distributed()
    optimizer.train()
    for net, one in ((model, optimizer), (other, fresh)):
        train(one, list(net.parameters()), 3, start=5)
    assert differences(contents(optimizer), contents(fresh)) == []


@makers
def test_what_the_optimizer_itself_writes_is_not_from_elsewhere(make):
    optimizer, params = run(make, 5, use_shadow=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the wrapped optimizer steps all the same
    train(optimizer, params, 1, start=5)
    optimizer.eval()
    assert same(params, shadows(optimizer, params))
    optimizer.train()
    with torch.no_grad():
        params[0].add_(1.0)
    optimizer.reset_emotion()  # the shadow begins anew, at these weights
    optimizer.eval()
    assert same(params, shadows(optimizer, params))
