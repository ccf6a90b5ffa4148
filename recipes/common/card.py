"""The model card of a recipe's run, made from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_lsam.card import CardFacts, is_hub_name, megabytes, provenance_line, titled
from hf_lsam.loading import saved_model

METHOD_NAMES = {
    "lsam": "LSAM",
    "ddp_sam": "data-parallel SAM",
    "ddp": "data-parallel training without SAM",
    "easgd": "EASGD",
    "lsgd": "LSGD",
}


def facts_of_results(run_dir: Path, results: dict[str, Any]) -> CardFacts:
    """What the results of a script and the model in `run_dir` say."""
    configuration = results["configuration"]
    if "metric" in results:
        metrics = [(results["metric"], results[f"eval_{results['metric']}"])]
        if results["metric"] != "loss":
            metrics.append(("loss", results["eval_loss"]))
    else:
        metrics = [("accuracy", results["accuracy"]), ("loss", results["eval_loss"])]
    base = configuration.get("base_model_id") or configuration.get("model_name_or_path")
    named = (configuration.get(key) for key in ("dataset_name", "train_file", "data_dir"))
    data = next(filter(None, named), None)
    on_hub = bool(configuration.get("dataset_name")) and is_hub_name(data)
    return CardFacts(
        run_dir.resolve().name,
        results["method"],
        results["num_workers"],
        metrics,
        result_rows(results),
        configuration,
        provenance_line(results),
        against=_against(results),
        base=base,
        data=data if on_hub or data is None else Path(data).name,
        on_hub=on_hub,
        examples=results.get("train_examples", results.get("train_images")),
        curves=(run_dir / "curves.png").exists(),
        seeds=[results["seed"]] if "seed" in results else [],
        method_name=METHOD_NAMES[results["method"]],
        **saved_model(run_dir, results.get("labels")),
    )


def _against(results: dict[str, Any]) -> str:
    alone = "It was compared with no other method."
    before = results.get(f"eval_{results.get('metric')}_before")
    return alone if before is None else "It was compared with the model before training, and with nothing else."


def result_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) rows of the results of a script."""
    if "metric" not in results:
        return _image_rows(results)
    asynchronous = results["method"] == "lsam"
    workers = results["num_workers"]
    steps = ", ".join(map(str, results["steps_per_worker"]))
    seconds = ", ".join(f"{median:.3f}" for median in results["median_step_s"])
    where = "at the anchor" if asynchronous else "after"
    resumed = results.get("resumed_at_step")
    since = f", since it was resumed at step {resumed}" if resumed else ""
    key, name = f"eval_{results['metric']}", titled(results["metric"])
    rows = [
        ("Method", results["method"]),
        ("Workers", f"{workers} on {results['device']}; steps {steps}; median step {seconds} s"),
        ("Training time", f"{results['train_runtime_s']:.0f} s{since}"),
        ("Trained parameters", f"{results['trainable_parameters']:,}"),
        ("Held-out examples", f"{results['eval_examples']:,}"),
        (f"{name} before", f"{results[f'{key}_before']:.4f}"),
        (f"{name} {where}", f"{results[key]:.4f}"),
    ]
    exchanged = megabytes(exchanged_bytes(results))
    if not asynchronous:
        return [*rows, ("Bytes exchanged", f"{exchanged} (computed, ring all-reduce)")]
    return [
        *rows,
        (f"{name} at the workers", ", ".join(f"{value:.4f}" for value in results[f"{key}_workers"])),
        ("Server updates", f"{results['anchor_version']} from {sum(results['pushes_per_worker'])} pushes"),
        ("Staleness", f"mean {results['staleness']['mean']:.2f}, max {results['staleness']['max']} anchor versions"),
        ("Bytes exchanged", exchanged),
        ("  data-parallel SAM", f"{megabytes(results['bytes_data_parallel'])} for the same steps"),
    ]


def _image_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Method", results["method"]),
        ("Workers", f"{results['num_workers']} on {results['device']}; {results['steps_per_worker']} steps each"),
        ("Training time", f"{results['seconds']:.0f} s"),
        ("Held-out images", f"{results['eval_images']:,} of the {results['evaluated_on']}"),
        ("Accuracy", f"{results['accuracy']:.4f}"),
        ("Bytes exchanged", megabytes(results["bytes"])),
    ]


def exchanged_bytes(results: dict[str, Any]) -> int:
    """Bytes that all workers of a run sent and received."""
    if results["bytes_pushed"] is None:
        return results["bytes_data_parallel"]
    return sum(results["bytes_pushed"]) + sum(results["bytes_pulled"])
