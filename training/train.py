"""Train the Attention Refinement Module on a frozen CLIP.

    accelerate launch training/train.py --config training/configs/arm-clip-b16.yaml --data ~/coco_stuff164k
    accelerate launch -m arm_hf.training.train --config arm-clip-b16 --data ~/coco_stuff164k      # installed

Every option is a flag and a key of the YAML file (`--help`); training/README.md tells the rest.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

if importlib.util.find_spec("arm_hf") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arm_hf.commands.common import interrupts, printable, quiet_libraries
from arm_hf.loading import model_errors
from arm_hf.modeling.text import TextEncoder
from arm_hf.training.checkpoints import RunFolder
from arm_hf.training.feature_cache import open_cache
from arm_hf.training.lora import add_lora
from arm_hf.training.model import Trainee, build_model
from arm_hf.training.options import TrainingOptions, parse_options
from arm_hf.training.running import (
    Clock,
    StopRequest,
    let_parent_decide,
    random_state,
    set_random_state,
    to_device,
    together,
)
from arm_hf.training.validation import Validator
from arm_hf.training.views import StepPlan, Views, collate, open_training_sets


def train(options: TrainingOptions) -> dict[str, Any]:
    """Run a training, or what is left of it.

    Returns:
        `step`, the last one; `best`, the best mean mIoU in validation, or None; `stopped`, the signal that ended the
        run early, or None.

    Raises:
        ValueError: An option or the data are wrong, or the loss is not finite; the message says where.
        OSError: Something could not be read or written.
    """
    # 1. Processes and precision
    available = [str(tracker) for tracker in get_available_trackers()]
    absent = [tracker for tracker in options.trackers if tracker not in available]
    if absent:
        raise ValueError(
            f"tracker {absent[0]!r} is unknown or not installed; here are {', '.join(available) or 'none'}"
        )
    run = RunFolder(options)
    run.check()
    accelerator = Accelerator(
        cpu=options.cpu,
        mixed_precision=options.mixed_precision,
        log_with=options.trackers or None,
        project_dir=options.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=options.lora)],
    )
    parts, processes = options.gradient_accumulation_steps, accelerator.num_processes
    if options.batch_size % (parts * processes):
        raise ValueError(
            f"batch_size {options.batch_size} is the whole step's and must be a multiple of {processes} processes x "
            f"{parts} accumulation steps"
        )
    set_seed(options.seed)

    # 2. Data and model; the words of each set are encoded once
    sets, ignore_index = open_training_sets(options)
    with accelerator.main_process_first(), model_errors(options.clip, passed=(OSError, ValueError, ImportError)):
        model, tokenizer, processor = build_model(options, ignore_index)
    if accelerator.is_main_process:
        run.prepare()
        if not model.config.clip_name_or_path:
            run.save_tower(model, tokenizer, processor)
    if not model.config.clip_name_or_path:
        model.config.clip_name_or_path = str((run.root / "clip").resolve())
    model.to(accelerator.device)
    accelerator.print(f"encoding the words of {len(sets) + len(options.val_data)} data sets ...")
    encoder = TextEncoder(model.clip, tokenizer)
    words = [encoder.class_embeddings(chosen.words, options.templates) for chosen in sets]  # E_t, (Q, D) each
    validator = Validator(options, encoder, processor, accelerator) if options.val_data else None
    views: Any = Views(sets, options, processor.image_mean, processor.image_std)
    if options.cache_features:
        views = open_cache(model.eval(), views, options, accelerator)
    adapter = add_lora(model, options) if options.lora else None

    # 3. Optimiser and schedule
    plan = StepPlan(tuple(len(chosen.data) for chosen in sets), options.batch_size, options.seed)
    total = options.max_steps or options.epochs * plan.steps_per_epoch
    val_every = options.val_every or plan.steps_per_epoch
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    adamw = torch.optim.AdamW(learnt.values(), lr=options.learning_rate, weight_decay=options.weight_decay)
    scheduler = get_scheduler(options.schedule, adamw, options.warmup_steps, total)
    lesson = Trainee(model, options.autocast_arm)
    trainee, optimizer = accelerator.prepare(lesson, adamw)
    trainee.train()

    # 4. Where a broken-off run stopped
    step, best, recent = 0, None, []  # recent: losses since the last line in the log
    set_seed(options.seed, device_specific=True)  # dropout differs between processes
    state = run.load_state()
    if state is not None:
        step, best, recent = state["step"], state["best"], state["recent"]
        with torch.no_grad():
            for name, weight in learnt.items():
                weight.copy_(state["weights"][name])
        adamw.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"], accelerator)
    if accelerator.is_main_process:
        run.cut_log(step)
    if options.trackers:
        accelerator.init_trackers("arm", {name: str(value) for name, value in vars(options).items()})
    weights = sum(weight.numel() for weight in learnt.values())
    accelerator.print(f"{weights:,} weights, {sum(plan.sizes)} images, steps {step} to {total}")

    # 5. The loop. The loss of a step is the mean over the pixels of all its images, however they are spread over
    # processes and accumulation steps.
    loader: Any = DataLoader(
        views,
        batch_sampler=plan.parts(step, total, parts, accelerator.process_index, processes),
        num_workers=options.workers,
        collate_fn=collate,
        worker_init_fn=let_parent_decide,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # the default one is dropout's, and part of the checkpoint
    )
    batches, clock, stopping = iter(loader), Clock(), 0
    shown = {"total": total, "initial": step, "unit": "step", "disable": not accelerator.is_main_process}
    with StopRequest() as stop, tqdm(desc="training", mininterval=1, **shown) as bar:
        while step < total and not stopping:
            members = [next(batches) for _ in range(parts)]
            errors = [batch["error"] for batch in members if "error" in batch]
            counts = [] if errors else [lesson.counted_pixels(batch["labels"]) for batch in members]
            pixels, failed, stopping = together(accelerator, sum(counts), len(errors), stop.signal is not None)
            if failed:
                raise ValueError(gather_object(errors)[0])

            mean = torch.zeros((), device=accelerator.device)
            unsound = []  # names of images whose loss is not finite
            for number, (batch, count) in enumerate(zip(members, counts, strict=True)):
                last = number == parts - 1
                with nullcontext() if last else accelerator.no_sync(trainee):
                    of_batch = trainee(to_device(batch, accelerator.device), words[batch["set"]])
                    weight = count / max(pixels, 1)
                    accelerator.backward(of_batch * weight * processes)  # gradients are averaged over processes
                mean += of_batch.detach() * weight
                if not of_batch.isfinite():
                    unsound += batch["names"]
            loss = float(accelerator.reduce(mean, "sum"))
            norm = float(accelerator.clip_grad_norm_(learnt.values(), options.max_grad_norm or math.inf))
            # The scaler of fp16 looks for overflow in gradients itself, and leaves the step out.
            if not (math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None)):
                names = gather_object(unsound if not math.isfinite(loss) else [n for b in members for n in b["names"]])
                raise ValueError(
                    f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite at step {step + 1} (epoch "
                    f"{step // plan.steps_per_epoch + 1}), on {', '.join(names)}; the last checkpoint, of step "
                    f"{run.saved_step}, is as it was. Look at these images, or try a smaller learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            step += 1
            recent.append(loss)
            clock.count(options.batch_size)
            bar.update()

            # 6. Log, validate, save
            if step % options.log_every == 0 or step == total:
                line = {
                    "step": step,
                    "epoch": step / plan.steps_per_epoch,
                    "loss": sum(recent) / len(recent),
                    "lr": rate,
                }
                line |= {"grad_norm": norm, "images_per_second": clock.rate(), "seconds_left": clock.left(total - step)}
                recent = []
                if accelerator.is_main_process:
                    run.write_log(line)
                accelerator.log({f"train/{key}": value for key, value in line.items()}, step=step)
                bar.set_postfix(
                    {"loss": f"{line['loss']:.4f}", "img/s": f"{line['images_per_second']:.1f}"}, refresh=False
                )
            if validator is not None and (step % val_every == 0 or step == total):
                clock.pause()
                scores = validator.measure(model.eval())
                trainee.train()
                if accelerator.is_main_process:
                    run.write_log({"step": step, "mean_iou": scores})
                    bar.write(f"step {step}: mIoU " + ", ".join(f"{name} {100 * v:.2f}" for name, v in scores.items()))
                accelerator.log({f"mean_iou/{name}": value for name, value in scores.items()}, step=step)
                if best is None or scores["mean"] > best:
                    best = scores["mean"]
                    if accelerator.is_main_process:
                        run.save_model(run.best, model, tokenizer, processor, adapter=adapter)
                clock.go_on()
            if step % options.checkpoint_every == 0 or step == total or stopping:
                clock.pause()
                randomness = gather_object([random_state(accelerator)])
                if accelerator.is_main_process:
                    progress = {"step": step, "best": best, "recent": recent, "random": randomness}
                    moments = {"optimizer": adamw.state_dict(), "scheduler": scheduler.state_dict()}
                    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
                    run.save_state({**progress, "weights": learnt, **moments, "scaler": scaler})
                    run.save_model(run.last, model, tokenizer, processor, adapter=adapter)
                clock.go_on()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {"step": step, "best": best, "stopped": stop.signal if step < total else None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 or 2 after an error, 128 + the signal that stopped it."""
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries()
    try:
        with interrupts.watching():
            summary = train(parse_options(arguments))
    except (ValueError, OSError, ImportError) as error:
        who = f" [process {rank}]" if rank else ""
        print(f"train.py{who}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:  # before the first step, or pressed twice
        print("train.py: interrupted; the last checkpoint, if there is one, is intact", file=sys.stderr)
        return int(interrupts.exit_code)
    if summary["stopped"] is not None:
        print(f"stopped by {signal.Signals(summary['stopped']).name} after step {summary['step']}; go on with --resume")
        return 128 + summary["stopped"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
