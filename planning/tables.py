"""A plan as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nextflow.planning.plan import Plan, Step

MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "ema": "weights of the moving average",
    "gradient_buckets": "gradient buckets of DDP",
    "gathered_weights": "weights that FSDP2 has gathered",
    "gathered_gradients": "gradients that FSDP2 has yet to split",
    "autocast_copies": "16-bit copies of weights that autocast keeps",
    "activations": "activations of the largest batch",
}


def show(plan: Plan) -> None:
    """Print everything."""
    console = Console(highlight=False)
    run = plan.run
    split = f", parameters over {run.shards}" if run.shards > 1 else ""
    checkpointing = ", activation checkpointing" if run.activation_checkpointing else ""
    console.print(
        f"[bold]{plan.model}[/bold]: {run.devices} device(s), {run.strategy}{split}, {run.precision}{checkpointing}"
    )
    for table in (_parameters(plan), _memory(plan), _steps(plan), _images(plan), _scales(plan), _ratios(plan)):
        if table.row_count:
            console.print(table)
    for note in plan.notes:
        console.print(f"- {note}")


def number(value: float, unit: str = "") -> str:
    """Four digits and a decimal prefix: number(7.6e9) is "7.600 G"."""
    for factor, prefix in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".strip()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("Parameters", "part", "parameters", "trained")
    for part in plan.parameters:
        table.add_row(part.name, f"{part.total:,}", f"{part.trained:,}")
    table.add_section()
    table.add_row("all", f"{plan.num_parameters:,}", f"{plan.num_trained:,}")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Bytes on each device", "what", "bytes")
    for name, size in plan.memory.items():
        table.add_row(MEMORY[name], number(size, "B"))
    table.add_section()
    table.add_row("all", number(sum(plan.memory.values()), "B"))
    if plan.steps:
        table.add_row("never made: float32 logits", number(max(step.logits for step in plan.steps), "B"))
    return table


def _steps(plan: Plan) -> Table:
    """A column for each stage, as names are longer than numbers."""
    table = _table("A training batch of one device", "level", *(str(step.level) for step in plan.steps))

    def add(name: str, *cells: str) -> None:
        if any(cells):
            table.add_row(name, *cells)

    def of_stage(value: float, step: Step) -> str:
        return "" if step.num_batches is None else number(value * plan.run.devices * step.num_batches)

    steps, together = plan.steps, plan.run.devices * plan.run.accumulate
    if steps:
        add("documents", *(f"{step.documents:.4g}" for step in steps))
        add("positions", *(f"{step.positions:,.0f}" for step in steps))
        add("FLOPs, as computed", *(number(step.flops) for step in steps))
        add("FLOPs of the model", *(number(step.model_flops) for step in steps))
        add("FLOPs of an optimiser step, all devices", *(number(step.flops * together) for step in steps))
        add("batches of the stage", *("" if step.num_batches is None else f"{step.num_batches:,}" for step in steps))
        add("positions of the stage, all devices", *(of_stage(step.positions, step) for step in steps))
        add("FLOPs of the stage, all devices", *(of_stage(step.flops, step) for step in steps))
    return table


def _images(plan: Plan) -> Table:
    generates = any(image.flops for image in plan.images)
    extra = ("FLOPs", "guided", "cache", "guided") if generates else ()
    table = _table("One generated image" if generates else "Images", "level", "pixels", "codes", "scales", *extra)
    for image in plan.images:
        height, width = image.pixels
        sizes = (
            number(image.flops),
            number(image.flops_guided),
            number(image.cache, "B"),
            number(image.cache_guided, "B"),
        )
        table.add_row(
            str(image.level), f"{height} x {width}", f"{image.codes:,}", str(image.steps), *(sizes if generates else ())
        )
    return table


def _scales(plan: Plan) -> Table:
    table = _table("Scales of a square image", "scale", "grid", "codes", "so far", "level")
    for scale in plan.scales:
        height, width = scale.grid
        level = "" if scale.level is None else str(scale.level)
        table.add_row(str(scale.scale), f"{height} x {width}", f"{scale.codes:,}", f"{scale.codes_so_far:,}", level)
    return table


def _ratios(plan: Plan) -> Table:
    levels = list(plan.ratios[0].codes) if plan.ratios else []
    table = _table("Codes (and pixels) by aspect ratio, height / width", "ratio", "base grid", *map(str, levels))
    for ratio in plan.ratios:
        height, width = ratio.base_grid
        cells = [f"{ratio.codes[level]:,} ({ratio.pixels[level][0]} x {ratio.pixels[level][1]})" for level in levels]
        table.add_row(f"{ratio.ratio:.3f}", f"{height} x {width}", *cells)
    return table
