"""The hand-written loop: the same trajectory as LSAMTrainer, and right with Accelerate in every order."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launch import PATHS, TESTS, accelerate_launch, write_script
from models import Rows, Stream
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.utils.data import DataLoader
from toy_loop import LSAM_FIELDS, Network, batches, data, network, train

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer


@pytest.mark.parametrize(
    ("optim", "normalised", "accumulation", "clip"),
    [("sgd", False, 1, 0.0), ("adamw_torch", False, 2, 0.5), ("sgd", True, 2, 0.1)],
)
def test_the_loop_and_the_trainer_take_the_same_trajectory(tmp_path, optim, normalised, accumulation, clip):
    """Bit for bit: parameters, anchor and the running statistics of BatchNorm."""
    seen = []
    model = network(normalised)

    class Recorder(LSAMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if not seen:
                torch.manual_seed(5)
            seen.append((inputs["x"].clone(), inputs["labels"].clone()))
            return super().training_step(model, inputs, num_items_in_batch)

    args = LSAMConfig(
        output_dir=tmp_path,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=8,
        max_steps=10 // accumulation,  # within one epoch: a new one would draw a random number more
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim=optim,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        batchnorm_statistics="worker",
        **LSAM_FIELDS,
    )
    x, labels = data().tensors
    rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    trainer = Recorder(model=model, args=args, train_dataset=rows)
    if normalised:
        trainer.session.signatures.batchnorm_not_reestimated()  # known here, and not what this test is about
    trainer.train()
    with trainer.local():
        expected = [tensor.clone() for tensor in model.state_dict().values()]
    anchor = torch.cat([p.detach().flatten() for p in model.parameters()])

    other = network(normalised)
    kind = torch.optim.SGD if optim == "sgd" else torch.optim.AdamW
    decay = {} if optim == "sgd" else {"weight_decay": 0.0}
    optimizer = kind(other.parameters(), lr=0.05, **decay)
    lsam = LSAM(other, optimizer, gradient_accumulation_steps=accumulation, max_grad_norm=clip or None, **LSAM_FIELDS)
    torch.manual_seed(5)
    with lsam:
        for x, labels in seen:
            lsam.step(lambda x=x, labels=labels: other(x, labels)["loss"])
        ours = [tensor.clone() for tensor in other.state_dict().values()]
    assert len(seen) == 10
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(torch.cat([p.detach().flatten() for p in other.parameters()]), anchor)


def test_an_accelerator_made_before_or_after_or_not_at_all_makes_no_difference():
    plain = network()
    _, expected, losses = train(plain, torch.optim.SGD(plain.parameters(), lr=0.05))

    before = network()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(before, torch.optim.SGD(before.parameters(), lr=0.05))
    _, own, prepared_losses = train(prepared, optimizer, accelerator=accelerator)
    assert torch.equal(own, expected)
    assert torch.equal(prepared_losses, losses)

    after = network()
    lsam = LSAM(after, torch.optim.SGD(after.parameters(), lr=0.05), **LSAM_FIELDS)
    Accelerator(cpu=True)
    torch.manual_seed(5)
    with lsam:
        for x, labels in batches(24):
            lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(after(x), labels))
        assert torch.equal(lsam.worker.own_parameters, expected)


def test_bf16_autocast_of_a_prepared_model_reaches_both_passes():
    """Same as an autocast that the caller opens, and not the same as float32."""
    model = network()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    _, own, _ = train(prepared, optimizer, accelerator=accelerator)

    class ByHand(Network):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                logits = super().forward(x)
            return logits.float()

    by_hand = ByHand()
    by_hand.load_state_dict(network().state_dict())
    _, expected, _ = train(by_hand, torch.optim.SGD(by_hand.parameters(), lr=0.05))
    full = network()
    _, in_float32, _ = train(full, torch.optim.SGD(full.parameters(), lr=0.05))
    assert torch.equal(own, expected)
    assert (own - in_float32).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "fused"), [(torch.optim.SGD, False), (torch.optim.SGD, True), (torch.optim.AdamW, True)]
)
def test_a_gradient_scaler_changes_nothing_but_the_steps_it_skips(kind, fused):
    """fp16's scaler on float32 losses: powers of two cancel exactly, and an overflow leaves x and y alone.

    A fused optimizer is called even then, and leaves x alone itself.
    """
    plain = network()
    _, expected, _ = train(plain, kind(plain.parameters(), lr=0.05, fused=fused))

    scaled = network()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    optimizer = kind(scaled.parameters(), lr=0.05, fused=fused)
    with pytest.raises(ValueError, match=r"scales the loss \(fp16\).*Pass accelerator.prepare\(optimizer\)"):
        LSAM(scaled, optimizer, accelerator=accelerator, **LSAM_FIELDS)
    lsam = LSAM(scaled, accelerator.prepare_optimizer(optimizer), accelerator=accelerator, **LSAM_FIELDS)
    torch.manual_seed(5)
    with lsam:
        for number, (x, labels) in enumerate(batches(24)):
            if number == 7:
                kept, steps = lsam.worker.own_parameters, lsam.worker.local_steps
                state = torch.get_rng_state()
                lsam.step(lambda x=x: (scaled(x) * torch.inf).sum())
                torch.set_rng_state(state)
                assert torch.equal(lsam.worker.own_parameters, kept)
                assert lsam.worker.local_steps == steps
            lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(scaled(x), labels))
        torch.testing.assert_close(lsam.worker.own_parameters, expected, rtol=1e-5, atol=1e-6)
    assert accelerator.scaler.get_scale() == 512.0


def test_in_the_score_every_parameter_group_is_coupled_by_the_same_share_whatever_its_learning_rate():
    model = network()
    first, *_, last = model.layers
    groups = [{"params": first.parameters(), "lr": 0.05}, {"params": last.parameters(), "lr": 0.2}]
    lsam = LSAM(model, torch.optim.SGD(groups, lr=0.1), coupling="score", **{**LSAM_FIELDS, "sam_rho": 0.0})
    with lsam:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
        lsam.step(lambda: sum((0.0 * parameter).sum() for parameter in model.parameters()))
        distance = lsam.worker.own_parameters - lsam.worker.anchor
        share = LSAM_FIELDS["coupling_strength"] / LSAM_FIELDS["sync_steps"]
        torch.testing.assert_close(distance, torch.full_like(distance, 1.0 - share))
    with pytest.raises(ValueError, match="AdamW would rescale"):
        LSAM(model, torch.optim.AdamW(model.parameters()), coupling="score", **LSAM_FIELDS)


def test_the_anchor_is_shown_with_statistics_of_its_own():
    model = network(normalised=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, **LSAM_FIELDS)
    estimation = [x for x, _ in batches(6)]
    with lsam:
        for x, labels in batches(10):
            lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
        own = [tensor.clone() for tensor in model.state_dict().values()]
        with lsam.anchor(estimation):
            features = [model.layers[0](x).detach() for x in estimation]
            mean = torch.stack([feature.mean(0) for feature in features]).mean(0)
            torch.testing.assert_close(model.layers[1].running_mean, mean)
            with lsam.anchor(DataLoader(Stream(Rows(estimation)), batch_size=None)):
                torch.testing.assert_close(model.layers[1].running_mean, mean)
            rows = Stream(Rows(list(torch.cat(estimation))))
            with lsam.anchor(DataLoader(rows, batch_size=len(estimation[0]))):
                torch.testing.assert_close(model.layers[1].running_mean, mean)
                assert torch.equal(lsam.worker.own_parameters[:96].view(16, 6), own[0])
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), own, strict=True))


def test_the_worker_keeps_its_statistics_at_the_anchor_if_told_to(caplog):
    model = network(normalised=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with LSAM(model, optimizer, batchnorm_statistics="worker", **LSAM_FIELDS) as lsam:
        for x, labels in batches(10):
            lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
        own = model.layers[1].running_mean.clone()
        with lsam.anchor([x for x, _ in batches(6)]):
            assert torch.equal(model.layers[1].running_mean, own)
    assert "statistics of a worker's own weights" in caplog.text


@pytest.mark.parametrize("habit", ["none", "inside", "around"])
def test_a_schedule_free_optimizer_switches_its_mode_at_x_and_not_at_the_anchor(habit):
    """Whether the loop leaves it alone, or evaluates as its manual says: inside the anchor, or around it."""

    def run(shows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = network()
        optimizer = AdamWScheduleFree(model.parameters(), lr=0.05)
        lsam = LSAM(model, optimizer, **LSAM_FIELDS)
        torch.manual_seed(5)
        optimizer.train()
        with lsam:
            for step, (x, labels) in enumerate(batches(12)):
                lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
                if not shows or step % 3:
                    continue
                if habit == "around":
                    optimizer.eval()
                with lsam.anchor():
                    if habit == "inside":
                        optimizer.eval()
                    shown = torch.cat([p.detach().flatten() for p in model.parameters()])
                    assert torch.equal(shown, lsam.worker.anchor)
                    if habit == "inside":
                        optimizer.train()
                if habit == "around":
                    optimizer.train()
            own = lsam.worker.own_parameters
        final = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.eval()
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), final)
        return own, final

    for ours, undisturbed in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, undisturbed, rtol=0, atol=1e-6)


def test_metrics_are_logged_and_misuse_is_named(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(TypeError, match="no argument 'sam_roh'"):
        LSAM(model, optimizer, sam_roh=0.1)
    with pytest.raises(TypeError, match="no argument 'data_distribution'"):
        LSAM(model, optimizer, data_distribution="sharded")
    with pytest.raises(ValueError, match="outside the stability region"):
        LSAM(model, optimizer, coupling="decoupled", coupling_strength=0.1, anchor_lr=3.0)
    lsam = LSAM(model, optimizer, **LSAM_FIELDS)
    with pytest.raises(RuntimeError, match="inside `with lsam:`"):
        lsam.step(lambda: None)
    for too_early in (lsam.log, lsam.worker_summary, lambda: lsam.save(tmp_path)):
        with pytest.raises(RuntimeError, match="enter `with lsam`"):
            too_early()
    with lsam:
        for x, labels in batches(8):
            lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
        metrics = lsam.log()
    assert metrics["lsam/anchor_version"] == 2
    assert metrics["lsam/sharpness"] > 0
    assert 0 < metrics["lsam/drift"] < 1


def test_sharpness_is_that_of_a_step_whatever_its_micro_batches():
    (x, labels), *_ = batches(1)

    def sharpness(accumulation: int) -> float:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with LSAM(model, optimizer, gradient_accumulation_steps=accumulation, **LSAM_FIELDS) as lsam:
            for _ in range(3 * accumulation):
                lsam.step(lambda: nn.functional.cross_entropy(model(x), labels))
            return lsam.log()["lsam/sharpness"]

    assert sharpness(4) == pytest.approx(sharpness(1), rel=0.1)  # but for the noise that each draws


def test_an_accumulation_that_a_run_left_incomplete_is_not_part_of_the_next():
    (x, labels), (y, others), *_ = batches(2)
    model = network().eval()  # without dropout
    lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.05), gradient_accumulation_steps=2, sam_rho=0.0)
    with lsam:
        lsam.step(lambda: nn.functional.cross_entropy(model(x), labels))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(y), others), list(model.parameters()))
    with lsam:
        for _ in range(2):
            lsam.step(lambda: nn.functional.cross_entropy(model(y), others))
        after = [parameter.detach().clone() for parameter in model.parameters()]
    for old, new, gradient in zip(before, after, expected, strict=True):
        torch.testing.assert_close(new, old - 0.05 * gradient)


def test_steps_of_the_run_are_refused_where_each_worker_makes_its_own():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with LSAM(model, optimizer, **LSAM_FIELDS) as lsam:
        with pytest.raises(ValueError, match=r"`LSAM\.batches` .* would never end.*share_steps=True and max_steps"):
            next(lsam.batches([1, 2]))
        with pytest.raises(ValueError, match=r"`LSAM\.schedule` .* would stand still.*share_steps=True and max_steps"):
            lsam.schedule(torch.optim.lr_scheduler.ConstantLR(optimizer))


def test_the_closure_returns_a_loss_or_an_output_that_holds_one():
    def run(wrap):
        model = network()
        lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.05), **LSAM_FIELDS)
        torch.manual_seed(5)
        with lsam:
            for x, labels in batches(6):
                loss = lsam.step(lambda x=x, labels=labels: wrap(nn.functional.cross_entropy(model(x), labels)))
        assert loss.shape == ()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    expected = run(lambda loss: loss)
    for wrap in (lambda loss: {"loss": loss, "logits": None}, lambda loss: (loss, None)):
        assert torch.equal(run(wrap), expected)


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda loss: loss.mean().item(), "a float"),
        (lambda loss: None, "a NoneType"),
        (lambda loss: loss, r"a loss of shape \[8\], not reduced"),
        (lambda loss: loss.mean().detach(), "a loss that is cut off from the parameters"),
        (lambda loss: {"logits": loss}, "a dict without a loss"),
        (lambda loss: (loss, loss), r"a loss of shape \[8\], not reduced"),
        (lambda loss: [loss.mean()], "a list"),
    ],
)
def test_a_closure_that_returns_no_loss_is_refused(wrap, found):
    model = network()
    lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.05), **LSAM_FIELDS)
    x, labels = next(batches(1))
    with pytest.raises(ValueError, match=f"returned {found}.*Return the batch's mean loss as a 0-d tensor"), lsam:
        lsam.step(lambda: wrap(nn.functional.cross_entropy(model(x), labels, reduction="none")))


@pytest.mark.parametrize("logs", [True, False])
def test_a_layer_that_is_unfrozen_while_training_is_refused(logs):
    model = network()
    model.layers[0].requires_grad_(False)
    lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.05), **LSAM_FIELDS)

    def run():
        with lsam:
            model.layers[0].requires_grad_(True)
            for x, labels in batches(2):
                lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
            if logs:
                lsam.log()

    with pytest.raises(ValueError, match=r"`layers\.0\.weight` has become trainable"):
        run()


SCRIPT = """
    import json, sys, time
    from pathlib import Path
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    sys.path.insert(0, {folder!r})
    from toy_loop import LSAM_FIELDS, data, network
    from hf_lsam import LSAM

    order = sys.argv[1]
    model = network(normalised=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(data(), batch_size=8, shuffle=True)
    accelerator = None
    if order == "before":
        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    lsam = LSAM(model, optimizer, accelerator=accelerator, output_dir={output!r}, num_workers=2, batchnorm_batches=3,
                **LSAM_FIELDS)
    if order == "after":
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(lsam.arguments.identity.rank)
        loader = lsam.shard(loader)
    norm = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm1d)][0]
    rows, groups, means, accuracies = [], [], [], []

    def look():
        with lsam.anchor(loader, lambda batch: model(batch[0])):
            means.append([norm.running_mean.tolist(), norm.running_var.tolist()])
            x, labels = data().tensors
            accuracies.append((model.eval()(x).argmax(1) == labels).double().mean().item())
            model.train()

    with lsam:
        for epoch in range(2):
            for number, (x, labels) in enumerate(loader):
                if epoch == 0 and number == 2 * lsam.arguments.identity.rank:
                    look()  # at the first anchor, and each worker at another time
                    Path({output!r}, f"{{lsam.arguments.identity.rank}} has looked").touch()
                while number == 4 and not Path({output!r}, "1 has looked").exists():
                    time.sleep(0.01)  # or a fast worker would move the anchor before
                rows += x[:, 0].tolist()
                lsam.step(lambda: torch.nn.functional.cross_entropy(model(x), labels))
                groups.append(torch.distributed.is_initialized())
        own = lsam.worker.own_parameters
    look()
    final = torch.cat([p.detach().flatten() for p in model.parameters()])
    report = dict(rank=lsam.arguments.identity.rank, wrapped=type(model).__name__, groups=any(groups),
                  rows=sorted(rows), means=means, accuracies=accuracies,
                  steps=lsam.worker.local_steps, version=lsam.worker.version,
                  own=own.sum().item(), final=final.double().sum().item())
    print("REPORT" + json.dumps(report), flush=True)
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_two_workers_with_an_accelerator_made_before_or_after(tmp_path, order):
    source = SCRIPT.format(folder=str(TESTS), output=str(tmp_path))
    run = accelerate_launch(write_script(tmp_path / "loop.py", source), order, fork=True)
    reports = [json.loads(line.split("REPORT")[1]) for line in run.stdout.splitlines() if "REPORT" in line]
    first, second = sorted(reports, key=lambda report: report["rank"])
    assert first["wrapped"] == ("DistributedDataParallel" if order == "before" else "Network")
    assert not first["groups"]
    assert not second["groups"]
    assert first["steps"] == second["steps"] == 12  # two epochs of 96 rows, shared by two workers of batch 8
    x = data().tensors[0][:, 0].tolist()
    assert sorted(first["rows"] + second["rows"]) == sorted(x + x)
    assert first["own"] != second["own"]
    assert first["final"] == second["final"]
    assert first["version"] == second["version"] >= 3
    assert first["means"] == second["means"]  # of BatchNorm at an anchor, from the same batches everywhere
    assert first["means"][0] != first["means"][1]
    assert first["accuracies"] == second["accuracies"]


SHARED_MOMENTUM = """
    import json, logging
    import torch
    from hf_lsam import LSAM

    logging.basicConfig(format="SAID %(message)s")
    for kind, momentum in ((torch.optim.SGD, {{"momentum": 0.9}}), (torch.optim.AdamW, {{"weight_decay": 0.0}})):
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = kind(model.parameters(), lr=0.01, **momentum)
        lsam = LSAM(model, optimizer, output_dir={output!r}, sam_rho=0.0, sync_steps=2, momentum_at="anchor")
        with lsam:
            for _ in range(100):
                lsam.step(lambda: model.weight.sum())  # whose gradient is 1
        group, state = optimizer.param_groups[0], optimizer.state.get(model.weight, {{}})
        kept = state.get("momentum_buffer") if kind is torch.optim.SGD else (state["exp_avg"] - 1).abs().max()
        report = dict(rank=lsam.arguments.identity.rank, rate=group["lr"], kept=None if kept is None else kept.item(),
                      squares=None if kept is None else state["exp_avg_sq"].mean().item(),
                      momentum=group["momentum"] if "momentum" in group else group["betas"][0],
                      way=-model.weight.mean().item())
        print("REPORT" + json.dumps(report), flush=True)
"""


def test_momentum_at_the_anchor_goes_as_far_as_the_workers_own_would_and_leaves_them_none(tmp_path):
    script = write_script(tmp_path / "loop.py", SHARED_MOMENTUM.format(output=str(tmp_path)))
    run = accelerate_launch(script, fork=True, PYTHONPATH=PATHS)
    reports = [json.loads(line.split("REPORT")[1]) for line in run.stdout.splitlines() if "REPORT" in line]
    sgd, adam = ([r for r in reports if r["momentum"] == 0.9 and r["kept"] == kept] for kept in (None, 0.0))
    assert [sorted(report["rank"] for report in each) for each in (sgd, adam)] == [[0, 1]] * 2
    assert all(report["rate"] == 0.01 for report in reports)
    assert sgd[0]["way"] == sgd[1]["way"]
    # A steady gradient moves SGD by 0.01 / (1 - 0.9) a step, AdamW of two workers by 0.01 times the root of 2; up to
    # twice as far where each is alone for a while. Momentum at both, or at neither, would be five times off or more.
    assert 0.7 * 100 * 0.1 < sgd[0]["way"] < 2 * 100 * 0.1
    assert 0.7 * 100 * 0.01 * 2**0.5 < adam[0]["way"] < 2 * 100 * 0.01 * 2**0.5
    # Adam without momentum forgets faster how large gradients were; its betas are as they were.
    assert [report["squares"] for report in adam] == [pytest.approx(1 - 0.99**100)] * 2
    assert run.stderr.count("momentum of 0.9 a step is the anchor's: workers step without, the anchor with 0.81") == 2


def test_a_loader_is_shared_by_the_workers_and_whole_for_one():
    model = network()
    lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), **LSAM_FIELDS)
    loader = lsam.shard(DataLoader(data(), batch_size=8, shuffle=True))
    seen = torch.cat([x for x, _ in loader])
    assert sorted(seen[:, 0].tolist()) == sorted(data().tensors[0][:, 0].tolist())


def test_the_order_of_a_shared_loader_follows_the_seed():
    model = network()
    lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), **LSAM_FIELDS)

    def order(seed_of_torch: int, **keywords) -> list[float]:
        torch.manual_seed(seed_of_torch)
        loader = lsam.shard(DataLoader(data(), batch_size=8, shuffle=True), **keywords)
        torch.manual_seed(99)
        return [row for _ in range(2) for x, _ in loader for row in x[:, 0].tolist()]

    assert order(1) == order(1) != order(2)
    assert order(1, seed=5) == order(2, seed=5) != order(1)


def test_showing_the_anchor_does_not_move_the_loader_on():
    def run(shows: bool) -> list[float]:
        model = network(normalised=True)
        lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), batchnorm_batches=100, **LSAM_FIELDS)
        loader = lsam.shard(DataLoader(data(), batch_size=8, shuffle=True), seed=3)
        rows = []
        with lsam:
            for _ in range(3):
                for number, (x, _) in enumerate(loader):
                    rows += x[:, 0].tolist()
                    if shows and number == 4:
                        with lsam.anchor(loader, lambda batch: model(batch[0])):
                            pass
        return rows

    assert run(True) == run(False)


NO_LOG = """
import sys
import torch
from hf_lsam.loop import LSAM

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with LSAM(model, optimizer, sync_steps=4, shared_memory_dir=sys.argv[1], output_dir=sys.argv[2]):
    pass
"""


def test_a_server_whose_log_cannot_be_written_is_an_error_that_leaves_nothing_behind(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "file").touch()
    script = write_script(tmp_path / "script.py", NO_LOG)
    words = (str(tmp_path / "shared"), str(tmp_path / "file" / "out"))
    run = accelerate_launch(script, *words, check=False, PYTHONPATH=PATHS)
    assert run.returncode != 0
    assert "file/out/server.log cannot be written (Not a directory)" in run.stderr
    assert "Set output_dir to a folder that can be written to." in run.stderr
    assert list((tmp_path / "shared").iterdir()) == []


def train_until(stop: int, signal_at: int, folder: Path, heeds: bool = True, resume_from: Path | None = None):
    """From step `resume_from` says to `stop`, with a signal on the way; what a caller saves is saved."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    lsam = LSAM(model, optimizer, resume_from=resume_from, **LSAM_FIELDS)
    begin = 0
    torch.manual_seed(5)
    with lsam:
        if resume_from is not None:
            kept = torch.load(resume_from / "own.pt", weights_only=True)
            begin = kept["step"]
            optimizer.load_state_dict(kept["optimizer"])
            torch.set_rng_state(kept["generator"])
        for step, (x, labels) in enumerate(batches(stop)):
            if step < begin:
                continue
            lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
            if step == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if heeds and lsam.stop_requested:
                lsam.save(folder)
                own = {"step": step + 1, "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
                torch.save(own, folder / "own.pt")
                break
    return lsam, model


def test_a_signal_lets_the_loop_save_and_what_was_saved_goes_on_with_the_same_bits(tmp_path):
    handlers = signal.getsignal(signal.SIGTERM)
    _, straight = train_until(30, -1, tmp_path / "never")
    with pytest.raises(SystemExit) as ended:
        train_until(30, 13, tmp_path / "stopped")
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handlers
    lsam, resumed = train_until(30, -1, tmp_path / "never", resume_from=tmp_path / "stopped")
    assert lsam.worker.local_steps == 30
    for a, b in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loop_that_does_not_heed_a_signal_is_ended_by_its_next_steps(tmp_path):
    with pytest.raises(SystemExit):
        train_until(30, 13, tmp_path, heeds=False)


def test_a_model_in_half_precision_is_trained_in_float32(caplog):
    model, same = network().bfloat16(), network().bfloat16().float()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, same)]
    losses, expected = (train(m, optimizer)[1] for m, optimizer in zip((model, same), optimizers, strict=True))
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected]
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    told = [record.getMessage() for record in caplog.records if "cast to float32" in record.getMessage()]
    assert len(told) == 1
    assert f"takes {2 * sum(p.numel() for p in model.parameters()):,} bytes more" in told[0]


def test_an_optimizer_with_a_state_in_half_precision_is_refused():
    model = network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"state for half-precision parameters.*load its state afterwards"):
        LSAM(model, optimizer, **LSAM_FIELDS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


COUPLED = {"coupling": "decoupled", "coupling_strength": 0.1}
RESUMED_WITH = [
    ({"anchor_optimizer": "nesterov"}, {"anchor_optimizer": "adam"}),
    ({"anchor_optimizer": "adam"}, {"anchor_optimizer": "nesterov"}),
    ({"algorithm": "easgd", "coupling_strength": 0.5}, {}),
    ({}, {"algorithm": "lsgd", "coupling_strength": 0.5}),
    ({"algorithm": "lsgd", "coupling_strength": 0.5}, {}),
    ({}, COUPLED),
    ({**COUPLED, "anchor_momentum_correction": 0.2}, {}),
]


@pytest.mark.parametrize(("before", "after"), RESUMED_WITH)
def test_a_run_goes_on_with_other_settings_from_its_anchor_and_parameters(tmp_path, before, after):
    """What another algorithm or optimizer has kept is begun anew; nothing of it is taken for something else."""

    def run(learning_rate: float, steps: int, **fields):
        model = network()
        lsam = LSAM(model, torch.optim.SGD(model.parameters(), learning_rate), sync_steps=4, sam_rho=0.0, **fields)
        with lsam:
            begun = lsam.worker.own_parameters, lsam.worker.anchor.clone()
            pushes, push = [], lsam.worker.link.push
            lsam.worker.link.push = lambda total, *more: (pushes.append(total.clone()), push(total, *more))
            for x, labels in batches(steps):
                lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels))
            ended = lsam.worker.own_parameters, lsam.worker.anchor.clone()
            lsam.save(tmp_path)
        return begun, ended, pushes

    _, ended, _ = run(0.1, 6, **before)
    begun, (x, y), pushes = run(0.0, 6, resume_from=tmp_path, **after)
    assert torch.equal(begun[0], ended[0])
    assert torch.equal(begun[1], ended[1])
    assert all(value.isfinite().all() for value in (x, y, *pushes))
    if after == COUPLED:  # the learning rate is 0: of the two steps to the next push, and of no more before
        assert pushes[0].norm() <= 2 * (ended[0] - ended[1]).norm()


def test_a_checkpoint_of_other_trainable_parameters_is_refused(tmp_path):
    def lsam(frozen: str, **fields) -> LSAM:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.get_submodule(frozen).requires_grad_(False)
        return LSAM(model, torch.optim.SGD(model.parameters(), 0.1), sam_rho=0.0, **fields)

    with lsam(frozen="1") as first:
        first.step(lambda: first._model(torch.ones(2, 4)).square().mean())
        first.save(tmp_path)
    refused = (
        r"lsam_server.safetensors was saved with other trainable parameters: `1.weight` .* here, `0.weight` .* there"
    )
    with pytest.raises(ValueError, match=refused), lsam(frozen="0", resume_from=tmp_path):
        pass


def test_what_cannot_be_gone_on_from_is_an_error(tmp_path):
    model = network()
    with pytest.raises(FileNotFoundError, match=r"holds no lsam_server\.safetensors.*written by `LSAM\.save`"):
        LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), resume_from=tmp_path, **LSAM_FIELDS)


RESUMED = """
import json, sys
from pathlib import Path

import torch
from torch import nn
from toy_loop import LSAM_FIELDS, batches, network

from hf_lsam import LSAM

out, again = Path(sys.argv[1]), sys.argv[2] == "again"
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
lsam = LSAM(model, optimizer, resume_from=out if again else None, output_dir=out, **LSAM_FIELDS)
with lsam:
    begin = lsam.worker.own_parameters.tolist() + torch.get_rng_state().tolist()
    version = lsam.worker.version
    for x, labels in batches(20):
        lsam.step(lambda: nn.functional.cross_entropy(model(x), labels))
    lsam.save(out)
    end = lsam.worker.own_parameters.tolist() + torch.get_rng_state().tolist()
rank = lsam.arguments.identity.rank
report = dict(begin=begin, end=end, version=version, steps=lsam.worker.local_steps)
(out / f"report{rank}.json").write_text(json.dumps(report))
"""


def test_two_workers_go_on_each_from_its_own_state_and_the_server_from_its(tmp_path):
    script = write_script(tmp_path / "loop.py", RESUMED)
    runs = []
    for word in ("first", "again"):
        accelerate_launch(script, str(tmp_path), word, fork=True, PYTHONPATH=PATHS)
        runs.append([json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in (0, 1)])
    for first, again in zip(*runs, strict=True):
        assert again["begin"] == first["end"]
        assert again["version"] > 0
        assert (first["steps"], again["steps"]) == (20, 40)
    for part in (slice(0, -5056), slice(-5056, None)):  # parameters; random state
        assert runs[1][0]["begin"][part] != runs[1][1]["begin"][part]
