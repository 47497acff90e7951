"""The checkpoints of `train_lm.py`: a state that has a `step`, and the record of what it was trained with."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not asynchronous: the state is donated to the next step, which overwrites it.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def check_folder(folder: Path, record: dict[str, Any], resume: bool) -> None:
    """Raises if a new run would overwrite a checkpoint, or a resumed run has other settings."""
    with open_checkpoints(folder) as manager:
        if resume:
            saved_step(manager, record)
        elif manager.latest_step() is not None:
            raise FileExistsError(
                f"A new run never overwrites a checkpoint: {folder} holds step={manager.latest_step()}. "
                "Continue it with --resume, or choose another --out."
            )


def save(manager: ocp.CheckpointManager, state: Any, record: dict[str, Any]) -> None:
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(record))
    manager.save(int(state.step), args=items)


def saved_step(manager: ocp.CheckpointManager, record: dict[str, Any]) -> int | None:
    """The last saved step, if any; raises if its run had other settings."""
    step = manager.latest_step()
    if step is None:
        return None
    saved = manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))["settings"]
    names = dict.fromkeys([*record, *saved])
    pairs = {name: (record.get(name), saved.get(name)) for name in names}
    differences = [f"{name}={now} (was {before})" for name, (now, before) in pairs.items() if now != before]
    if differences:
        raise ValueError(
            f"A run is resumed with the settings it was started with: {', '.join(differences)}, step={step} in "
            f"{manager.directory}. Use those, or another --out."
        )
    return step


def restore(manager: ocp.CheckpointManager, like: Any, record: dict[str, Any]) -> Any:
    """The last saved state, if any, else `like`."""
    step = saved_step(manager, record)
    if step is None:
        return like
    items = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))
    return manager.restore(step, args=items)["state"]
