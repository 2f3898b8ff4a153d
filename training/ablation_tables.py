"""Tables of an ablation: Markdown from the records that `training/ablate.py` writes to `evidence.json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
FIGURE_NAMES = {"mean_iou_in_labels": "mIoU", "boundary_iou": "boundary IoU", "overall_accuracy": "pixel accuracy"}
TITLES = {
    "hosts": "One ARM on every host",
    "hosts_coarse": "One ARM without scale blocks on every host",
    "layers": "Layers that ARM reads (the paper's Table 4)",
    "blocks": "Number of attention blocks (Table 5)",
    "scale": "Attention and scale blocks (Table 6)",
    "loss": "Form of the loss",
    "training_base": "Features that ARM is trained on (Fig. 3)",
}


def gain(record: Record, figure: str = "mean_iou_in_labels") -> float:
    """What ARM adds, in points.

    Args:
        record: With the figures alone and with ARM.
        figure: One of `FIGURE_NAMES`.
    """
    return record["with_arm"][figure] - record["alone"][figure]


def mean_and_spread(values: Sequence[float], sign: str = "+") -> str:
    """The mean, and the standard deviation where there are several.

    Args:
        values: One per seed.
        sign: "+" shows the sign always, "" only of negative numbers.
    """
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{spread}"


def _mean(records: Sequence[Record], figure: str = "mean_iou_in_labels", **wanted: Any) -> float:
    """Mean gain of the records with these values."""
    chosen = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return statistics.fmean(gain(record, figure) for record in chosen)


def _by_seed(records: Sequence[Record], figure: str = "mean_iou_in_labels") -> list[float]:
    """Mean gain of each seed."""
    return [_mean(records, figure, seed=seed) for seed in sorted({record["seed"] for record in records})]


def _names(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def host_tables(records: Sequence[Record]) -> list[str]:
    """mIoU of every host on every set alone, its gain, the gain in boundary IoU, and the means over sets and hosts.

    Args:
        records: Of one variant, all seeds.
    """
    sets, hosts = _names(records, "set"), _names(records, "host")
    alone = {(record["host"], record["set"]): record["alone"]["mean_iou_in_labels"] for record in records}
    rows = [[host, *(f"{alone[host, each]:.1f}" for each in sets)] for host in hosts]
    means = [f"{statistics.fmean(alone[host, each] for host in hosts):.1f}" for each in sets]
    lines = ["mIoU without ARM", "", *_table(["host", *sets], [*rows, ["mean", *means]])]
    for figure, title in FIGURE_NAMES.items():
        rows = [
            [
                host,
                *(f"{_mean(records, figure, host=host, set=each):+.1f}" for each in sets),
                f"{_mean(records, figure, host=host):+.1f}",
            ]
            for host in hosts
        ]
        means = [f"{_mean(records, figure, set=each):+.1f}" for each in sets]
        rows.append(["mean", *means, f"{_mean(records, figure):+.1f}"])
        lines += [f"What ARM adds, points of {title}", "", *_table(["host", *sets, "mean"], rows)]
    lines.append(f"Mean gain over hosts and sets, over seeds: {mean_and_spread(_by_seed(records))} mIoU.")
    if unseen := [record for record in records if record["unseen"]]:
        names = ", ".join(_names(unseen, "set"))
        lines.append(f"On sets whose label maps ARM has not seen ({names}): {mean_and_spread(_by_seed(unseen))} mIoU.")
    return [*lines, "", *time_lines(records)]


def time_lines(records: Sequence[Record]) -> list[str]:
    """Time of an image with ARM as a multiple of that without: resizing, trunk, method and decision at full size.

    Args:
        records: Of one variant.
    """

    def whole(figures: Mapping[str, float]) -> float:
        return figures["seconds"] + figures["trunk_seconds"]

    ratios = {
        host: statistics.fmean(whole(r["with_arm"]) / whole(r["alone"]) for r in records if r["host"] == host)
        for host in _names(records, "host")
    }
    listed = ", ".join(f"{host} {ratio:.2f}" for host, ratio in ratios.items())
    return [
        f"Time of an image with ARM, as a multiple of that without, up to labels at the photo's size: {listed}.",
        "",
    ]


def variant_table(records: Sequence[Record]) -> list[str]:
    """mIoU of every variant on every set with mean and spread over seeds, averaged over hosts; the mean gains.

    Args:
        records: Of one experiment.
    """
    sets, hosts = _names(records, "set"), _names(records, "host")
    seeds = sorted({record["seed"] for record in records})
    head = ["variant", *sets, "mean gain", *(f"gain of {host}" for host in hosts if len(hosts) > 1)]
    alone = [
        statistics.fmean({r["host"]: r["alone"]["mean_iou_in_labels"] for r in records if r["set"] == each}.values())
        for each in sets
    ]
    rows = [["without ARM", *(f"{value:.1f}" for value in alone), *[""] * (len(head) - len(sets) - 1)]]
    for variant in _names(records, "variant"):
        mine = [record for record in records if record["variant"] == variant]
        cells = []
        for each in sets:
            values = [
                statistics.fmean(
                    r["with_arm"]["mean_iou_in_labels"] for r in mine if r["set"] == each and r["seed"] == seed
                )
                for seed in seeds
            ]
            cells.append(mean_and_spread(values, sign=""))
        gains = [mean_and_spread(_by_seed(mine))]
        gains += [mean_and_spread(_by_seed([r for r in mine if r["host"] == h])) for h in hosts if len(hosts) > 1]
        rows.append([variant, *cells, *gains])
    return _table(head, rows)


def markdown(evidence: Mapping[str, Any], level: int = 1) -> str:
    """All tables of `evidence.json`.

    Args:
        evidence: Its content.
        level: Of the first heading.
    """
    recipe, limit = evidence["recipe"], evidence["photos_per_set"]
    photos = "whole val lists" if limit is None else f"first {limit} photos of each val list"
    steps = recipe["max_steps"] or f"{recipe['epochs']} epochs"
    weight = recipe["refinement_scale"]
    arm = (
        f"that of `{evidence['arm']}`"
        if evidence["arm"]
        else f"{recipe['loss']} on {recipe['coarse_form']}, layers {' and '.join(map(str, recipe['fusion_layers']))}, "
        f"{steps} steps of {recipe['batch_size']}; trained with weight {weight:g}, attached with "
        f"{weight * evidence['weight']:g}"
    )
    lines = [
        f"{'#' * level} What ARM adds to `{evidence['base']}`",
        "",
        f"All figures in percent, mIoU over the classes in the labels, {photos}, photos seen whole. ARM: {arm}.",
        "",
    ]
    if speeds := evidence["images_per_second"]:
        listed = ", ".join(f"{name} {rate:.2f}" for name, rate in speeds.items())
        lines += [f"Training, views of {recipe['crop_size']} pixels, images a second: {listed}.", ""]
    for name in _names(evidence["records"], "experiment"):
        chosen = [record for record in evidence["records"] if record["experiment"] == name]
        seeds = sorted({record["seed"] for record in chosen})
        lines += [f"{'#' * (level + 1)} {TITLES[name]}", ""]
        lines += [] if evidence["arm"] else [f"Seeds {', '.join(map(str, seeds))}.", ""]
        lines += host_tables(chosen) if len(_names(chosen, "variant")) == 1 else variant_table(chosen)
    return "\n".join(lines).rstrip() + "\n"
