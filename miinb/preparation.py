"""Everything that is checked and chosen before a process of a deployment starts: the model, the hardware, the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miinb import hardware, location, models, planner
from miinb.calibration import calibration_text, is_given
from miinb.config import DeploymentConfig, EngineOptions
from miinb.messages import Plan
from miinb.offloading import check_disk


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a deployment can be started with.

    Attributes:
        config: what was asked for; paths are absolute, as the server outlives this process's working folder.
        resolved: the same with the plan's choices in place of "auto".
        task: what will be served.
        plan: what was chosen, and why.
    """

    config: DeploymentConfig
    resolved: DeploymentConfig
    task: str
    plan: Plan


def prepare(config: DeploymentConfig) -> Preparation:
    """Look at the model and the machine and plan the deployment; starts nothing.

    Raises:
        ConfigError: an option is wrong, or not for this model or machine.
        ModelError: the model cannot be used as asked.
        OutOfMemory: it cannot fit into what is free now.
    """
    path = Path(config.model).expanduser()
    if path.exists():
        config = config.model_copy(update={"model": str(path.resolve())})
    config = config.model_copy(update={"options": _checked_files(config.options)})
    model = models.inspect(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        load_format=config.load_format,
    )
    if config.load_format != "dummy":
        location.check_tokenizer(model.folder)
    machine = hardware.detect()
    plan = planner.plan(config, model, machine)
    return Preparation(config, planner.resolve(config, plan, machine), model.task(config.task), plan)


def _checked_files(options: EngineOptions) -> EngineOptions:
    """The options with absolute paths. Raises InvalidValue where what they name cannot be used."""
    changes = {}
    if is_given(options.calibration):
        calibration_text(options.calibration)
        if isinstance(options.calibration, str):
            changes["calibration"] = str(Path(options.calibration).expanduser().absolute())
    if options.offload_folder is not None:
        folder = Path(options.offload_folder).expanduser().absolute()
        check_disk(str(folder))
        changes["offload_folder"] = str(folder)
    return options.model_copy(update=changes)
