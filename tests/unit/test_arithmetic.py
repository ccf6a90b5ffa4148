"""sam.py, coupling.py, anchor.py, nesterov.py, parameters.py and batchnorm.py against closed forms."""

from __future__ import annotations

import io
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lsam.anchor import Anchor
from hf_lsam.batchnorm import frozen_statistics, reestimate, tracking_layers
from hf_lsam.coupling import CPU_BLOCK, add_langevin_noise, blocks, couple_and_accumulate, period_factors
from hf_lsam.nesterov import NesterovAdamW
from hf_lsam.parameters import (
    ParameterLayout,
    about_cast,
    cast_to_float32,
    first_difference,
    in_stored_types,
    trainable_parameters,
)
from hf_lsam.sam import ASAM_OFFSET, perturb, restore, storage_for


def parameters_with_gradients(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return parameters


# --- sam.py ---


def test_perturb_moves_by_rho_along_the_global_gradient_and_restore_is_exact():
    parameters = parameters_with_gradients((3, 4), (5,), dtype=torch.float64)
    before = [p.detach().clone() for p in parameters]
    addresses = [p.data_ptr() for p in parameters]
    gradients = [p.grad.clone() for p in parameters]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    saved = perturb(parameters, rho=0.3, eps=0.5)
    for p, x, g in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), x + 0.3 * g / (norm + 0.5))
        assert p.grad is None
    restore(saved)
    assert all(torch.equal(p, x) for p, x in zip(parameters, before, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses


def test_storage_for_perturbed_parameters_is_used_again_and_changes_no_bit():
    fresh, kept = (parameters_with_gradients((3, 4), (5,), (2,)) for _ in range(2))
    storage = storage_for(kept)
    for step in range(2):
        for parameters in (fresh, kept):
            parameters[0].grad = torch.full((3, 4), 1.0 + step)
            parameters[1].grad = None  # the storage of the others must not move up
            parameters[2].grad = torch.ones(2)
        moved, moved_in_storage = perturb(fresh, rho=0.3), perturb(kept, rho=0.3, storage=storage)
        assert [p.data_ptr() for p, _ in moved_in_storage] == [storage[0].data_ptr(), storage[2].data_ptr()]
        assert all(torch.equal(a, b) for a, b in zip(fresh, kept, strict=True))
        restore([*moved, *moved_in_storage])


def test_adaptive_perturbation_is_asam():
    (p,) = parameters_with_gradients((6,), dtype=torch.float64)
    x, g = p.detach().clone(), p.grad.clone()
    t = x.abs() + ASAM_OFFSET
    perturb([p], rho=0.3, adaptive=True)
    torch.testing.assert_close(p.detach() - x, 0.3 * t**2 * g / (t * g).norm())


def test_the_loss_scale_cancels_in_the_perturbation():
    plain, scaled = (parameters_with_gradients((7,), (2, 2), dtype=torch.float64) for _ in range(2))
    for p in scaled:
        p.grad *= 1024
    perturb(plain, rho=0.1, eps=0.2)
    perturb(scaled, rho=0.1, eps=0.2, loss_scale=torch.tensor(1024.0))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-7)  # eps is scaled in float32


def test_parameters_without_a_gradient_stay_where_they_are():
    with_gradient, without = parameters_with_gradients((2,), (3,))
    without.grad = None
    x = without.detach().clone()
    saved = perturb([without, with_gradient], rho=1.0)
    assert torch.equal(without, x)
    assert [p for p, _ in saved] == [with_gradient]
    assert perturb([without], rho=1.0) == []


def test_an_overflow_in_pass_1_makes_pass_2_not_a_number_and_x_survives():
    (p,) = parameters_with_gradients((4,))
    x = p.detach().clone()
    p.grad[2] = math.inf
    saved = perturb([p], rho=0.1)
    assert p.isnan().any()
    restore(saved)
    assert torch.equal(p, x)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        perturb(embedding.parameters(), rho=0.1)


# --- coupling.py ---


def test_blocks_cover_every_value_once_and_fit_the_cache():
    sizes = [3, CPU_BLOCK + 5, 2 * CPU_BLOCK, 0, 7]
    numbers = list(torch.arange(float(sum(sizes))).split(sizes))
    seen = []
    for (group,) in blocks(numbers):
        assert sum(t.numel() for t in group) < 2 * CPU_BLOCK
        seen += group
    assert torch.equal(torch.cat(seen), torch.cat(numbers))


def test_coupling_and_running_sum():
    x = [torch.tensor([[3.0, 1.0]]), torch.tensor([5.0])]
    y = [torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])]
    total = [torch.tensor([[10.0, 0.0]]), torch.tensor([0.0])]
    couple_and_accumulate(x, y, total, 0.25)
    assert x[0].tolist() == [[2.5, 1.0]]
    assert x[1].tolist() == [4.0]
    assert total[0].tolist() == [[11.5, 0.0]]
    assert total[1].tolist() == [3.0]


def test_weights_in_channels_last_order_are_coupled_too():
    x = torch.randn(4, 3, 2, 2)
    last = x.to(memory_format=torch.channels_last)
    y = torch.randn(4, 3, 2, 2)
    totals = [torch.zeros(4, 3, 2, 2) for _ in range(2)]
    couple_and_accumulate([x, torch.ones(2)], [y, torch.zeros(2)], [totals[0], torch.zeros(2)], 0.25)
    couple_and_accumulate([last, torch.ones(2)], [y, torch.zeros(2)], [totals[1], torch.zeros(2)], 0.25)
    assert torch.equal(last, x)
    assert torch.equal(totals[0], totals[1])


def test_no_coupling_leaves_x_bit_for_bit():
    x = torch.randn(1000)
    kept = x.clone()
    total = torch.zeros(1000)
    y = torch.randn(1000)
    couple_and_accumulate([x], [y], [total], 0.0)
    assert torch.equal(x, kept)
    assert torch.equal(total, x - y)


def test_period_factors_are_what_a_free_offset_does():
    offset, seen = 1.0, []
    for _ in range(16):
        offset -= 0.9 / 16 * offset
        seen.append(offset)
    a, b = period_factors(0.9, 16)
    assert a == pytest.approx(offset)
    assert b == pytest.approx(sum(seen) / 16)


def test_langevin_noise_has_variance_two_eta_t():
    x = torch.zeros(200_000)
    add_langevin_noise(x, learning_rate=0.02, temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert x.var().item() == pytest.approx(2 * 0.02 * 0.5, rel=0.02)
    assert x.mean().item() == pytest.approx(0.0, abs=0.002)


# --- anchor.py ---


def test_the_anchor_becomes_the_mean_of_the_samples_without_correction():
    y = torch.tensor([1.0, 2.0])
    samples = torch.tensor([[3.0, 0.0], [5.0, 8.0]])
    anchor = Anchor(y.clone(), lr=1.0, momentum_correction=0.0)
    anchor.update((samples - y).sum(0), steps=2)
    assert torch.equal(anchor.vector, samples.mean(0))
    assert anchor.version == 1


def test_the_correction_weighs_the_change_between_two_mean_differences():
    beta, lr = 0.4, 0.5
    means = [torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0])]  # mean of x - y
    anchor = Anchor(torch.zeros(1), lr=lr, momentum_correction=beta)
    expected, previous = 0.0, None
    for mean in means:
        anchor.update(mean * 8, steps=8)
        gradient = -mean.item()
        corrected = gradient if previous is None else gradient + beta * (gradient - previous)
        expected -= lr * corrected
        previous = gradient
        assert anchor.vector.item() == pytest.approx(expected)


def test_nesterov_is_the_recurrence_that_the_stability_bound_is_about():
    momentum, lr = 0.9, 0.1
    anchor = Anchor(torch.zeros(1), lr=lr, momentum_correction=0.0, optimizer="nesterov", momentum=momentum)
    expected = velocity = 0.0
    for mean in (1.0, -0.5, 2.0):
        anchor.update(torch.tensor([mean]), steps=1)
        velocity = momentum * velocity - mean
        expected -= lr * (-mean + momentum * velocity)
        assert anchor.vector.item() == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_an_anchor_moves_alike_wherever_its_gradient_may_be_written(optimizer, beta):
    anchors = [Anchor(torch.zeros(300_000), 0.3, beta, optimizer) for _ in range(3)]
    for _ in range(3):
        total = torch.randn(300_000)
        kept = total.clone()
        anchors[0].update(total, 4)
        anchors[1].update(total, 4, gradient=torch.empty_like(total))
        assert torch.equal(total, kept)
        anchors[2].update(total, 4, gradient=total)
    assert torch.equal(anchors[0].vector, anchors[1].vector)
    assert torch.equal(anchors[0].vector, anchors[2].vector)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
def test_an_anchor_goes_on_from_its_state_bit_for_bit(optimizer):
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randn(50, generator=generator) for _ in range(6)]
    whole = Anchor(torch.zeros(50), lr=0.3, optimizer=optimizer)
    first = Anchor(torch.zeros(50), lr=0.3, optimizer=optimizer)
    for total in sums:
        whole.update(total.clone(), 4)
    for total in sums[:3]:
        first.update(total.clone(), 4)
    second = Anchor(torch.zeros(50), lr=0.3, optimizer=optimizer)
    second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    for total in sums[3:]:
        second.update(total.clone(), 4)
    assert torch.equal(second.vector, whole.vector)
    assert second.version == whole.version == 6


# --- nesterov.py ---


def test_nesterov_adamw_is_nesterovs_rule_on_the_steps_of_adamw_without_beta1_also_when_it_goes_on_from_its_state():
    rate, momentum, beta2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.5
    shapes = ((2, 3, 4, 4), (5,))
    drawn = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(shape, generator=drawn, dtype=torch.float64) for shape in shapes] for _ in range(6)]

    def optimizer_of(parameters):
        first, second = parameters
        groups = [{"params": [first]}, {"params": [second], "betas": (momentum, beta2)}]
        return NesterovAdamW(groups, rate, (momentum, beta2), eps=eps, weight_decay=decay)

    parameters = parameters_with_gradients(*shapes, dtype=torch.float64)
    parameters[0].data = parameters[0].data.contiguous(memory_format=torch.channels_last)
    expected = [p.detach().clone() for p in parameters]
    squares, buffers = ([torch.zeros_like(x) for x in expected] for _ in range(2))
    optimizer = optimizer_of(parameters)
    for number, each in enumerate(gradients, start=1):
        if number == 4:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = optimizer_of(parameters)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for p, g in zip(parameters, each, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for x, v, b, g in zip(expected, squares, buffers, each, strict=True):
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            u = rate * (decay * x + g / ((v / (1 - beta2**number)).sqrt() + eps))
            b.mul_(momentum).add_(u)
            x.sub_((1 - momentum) * (u + momentum * b))
    for p, x, b, g in zip(parameters, expected, buffers, gradients[-1], strict=True):
        torch.testing.assert_close(p.detach(), x)
        assert torch.equal(p.grad, g)
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}  # no more than AdamW keeps
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], b)


def test_nesterov_adamw_takes_a_closure_and_leaves_alone_what_has_no_gradient():
    moved, left = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = NesterovAdamW([moved, left], 0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        value = moved.square().sum()
        value.backward()
        return value

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == 3.0
    assert torch.equal(left, torch.ones(3))
    assert left not in optimizer.state


def test_nesterov_adamw_refuses_a_schedule_of_betas():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = NesterovAdamW([parameter], 0.1)
    parameter.grad = torch.ones(3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    other = NesterovAdamW([parameter], 0.1)
    torch.optim.lr_scheduler.OneCycleLR(other, 0.1, total_steps=10, cycle_momentum=False)
    other.step()
    assert not torch.equal(parameter, torch.ones(3))


# --- parameters.py ---


def test_a_layout_reads_and_writes_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    named = trainable_parameters(model)
    layout = ParameterLayout(named)
    assert layout.numel == 3 * 2 + 2 + 2 + 2
    flat = layout.read([p for _, p in named], torch.empty(layout.numel))
    assert torch.equal(flat, nn.utils.parameters_to_vector(model.parameters()))
    layout.write(flat * 2, [p for _, p in named])
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), flat * 2)


def test_tied_weights_count_once_and_frozen_ones_not_at_all():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    assert [name for name, _ in trainable_parameters(model)] == ["a.weight"]


def test_lora_exchanges_the_adapter_alone():
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    layout = ParameterLayout(trainable_parameters(model))
    assert all("lora_" in name for name, _, _ in layout.manifest)
    assert layout.numel == 2 * (8 + 8) + 2 * (8 + 2)


def test_fingerprints_differ_when_a_name_a_shape_or_a_dtype_does():
    manifests = [
        [("w", torch.zeros(2, 3))],
        [("v", torch.zeros(2, 3))],
        [("w", torch.zeros(3, 2))],
        [("w", torch.zeros(2, 3, dtype=torch.float64))],
    ]
    assert len({ParameterLayout(named).fingerprint for named in manifests}) == len(manifests)


def test_the_first_difference_is_named():
    ours, theirs = [("a", [2], "f"), ("b", [3], "f")], [["a", [2], "f"], ["b", [4], "f"]]
    assert first_difference(ours, theirs) == "`b` [3] f here, `b` [4] f there"
    assert first_difference(ours, theirs[:1]) == "2 trainable parameters here, 1 there"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2).requires_grad_(False), r"no trainable parameter.*Unfreeze"),
        (nn.Linear(2, 2).to(torch.bfloat16), r"torch.bfloat16.*dtype=torch.float32"),
        (nn.Linear(2, 2).to(torch.float16), r"torch.float16.*float32 LoRA adapter"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        trainable_parameters(model)


def test_half_precision_is_cast_where_it_trains_and_tied_parameters_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}).bfloat16()
    model["b"].weight = model["a"].weight
    model["norm"].requires_grad_(False)
    model.register_buffer("wide", torch.ones(2, dtype=torch.float64))
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model["a"].bias.grad = torch.ones(4, dtype=torch.bfloat16)
    parameters = list(model.parameters())
    cast = cast_to_float32(model)
    # 3 tensors of the linear layers, one of them tied; 2 weights and 2 statistics of the norm.
    assert [dtype for _, dtype in cast] == [torch.bfloat16] * 7
    assert "7 tensors stored in bfloat16" in about_cast(cast)
    assert f"takes {2 * (16 + 4 + 4 + 4 * 4)} bytes more" in about_cast(cast)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model["b"].weight is model["a"].weight
    assert model["a"].bias.grad.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.to(stored[name].dtype), stored[name])
        assert tensor.dtype != torch.bfloat16
    assert model.wide.dtype == torch.float64
    with torch.no_grad():
        model["a"].weight += 1e-5
    exact, at = model["a"].weight.clone(), model["a"].weight.data_ptr()
    with in_stored_types(cast), in_stored_types(cast):
        assert model["a"].weight.dtype == model["norm"].running_var.dtype == torch.bfloat16
    assert torch.equal(model["a"].weight, exact)
    assert model["a"].weight.data_ptr() == at
    assert cast_to_float32(model) == []


def test_a_frozen_base_in_half_precision_stays_when_float32_layers_train_on_it():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16().requires_grad_(False), nn.Linear(4, 2))
    assert cast_to_float32(model) == []
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


# --- batchnorm.py ---


def test_frozen_layers_normalise_by_the_batch_and_keep_their_statistics():
    layer = nn.BatchNorm1d(3)
    batch = torch.randn(16, 3) * 4 + 2
    expected = nn.BatchNorm1d(3)(batch)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with frozen_statistics([layer]):
        torch.testing.assert_close(layer(batch), expected)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    layer(batch)
    assert layer.num_batches_tracked.item() == 1


def test_reestimated_statistics_are_the_average_over_the_batches():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.1), nn.Dropout(0.5))
    model.eval()
    batches = [torch.randn(32, 4) for _ in range(5)]
    assert reestimate(model, batches, model)
    features = [model[0](batch).detach() for batch in batches]
    layer = model[1]
    torch.testing.assert_close(layer.running_mean, torch.stack([f.mean(0) for f in features]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([f.var(0) for f in features]).mean(0))
    assert layer.momentum == 0.1
    assert not any(module.training for module in model.modules())
    kept = layer.running_mean.clone()
    assert not reestimate(model, iter([]), model)  # of a stream that has ended
    assert torch.equal(layer.running_mean, kept)
    assert layer.momentum == 0.1


def test_layers_without_running_statistics_are_left_out():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    assert tracking_layers(model) == [model[0]]
