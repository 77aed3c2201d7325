"""`hydra/sweeper=study`, the one that `-m` takes: a grid of settings, or named arms, each over that grid."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from scantling.config.mistakes import Mistake
from scantling.config.suggestions import nearest


@dataclass
class StudyConf:
    """The settings of `hydra/sweeper=study` and their defaults."""

    _target_: str = "hydra_plugins.scantling_sweeper.sweeper.StudySweeper"
    max_batch_size: int | None = None
    params: dict[str, Any] | None = None
    """A grid, as Hydra's basic sweeper has it: setting: values."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """Changes of each arm by its name, as on the command line; the others are compared with the first."""


ConfigStore.instance().store(group="hydra/sweeper", name="study", node=StudyConf, provider="scantling")


class StudySweeper(BasicSweeper):
    """Hydra's basic sweeper, which makes each job once for every arm.

    `arm=a,b` on the command line chooses among the arms.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, Any] | None, arms: dict[str, list[str]]):
        super().__init__(max_batch_size, params)
        self.arms = {name: list(overrides) for name, overrides in arms.items()}

    def sweep(self, arguments: list[str]) -> Any:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        if not self.arms:
            (jobs,) = self.split_arguments(parser.parse_overrides([*self._parse_config(), *arguments]), None)
            return self.run_batches(jobs)
        chosen = [a.partition("=")[2] for a in arguments if a.startswith("arm=")]
        rest = [a for a in arguments if not a.startswith("arm=")]
        names = chosen[-1].split(",") if chosen else list(self.arms)
        for name in names:
            if name not in self.arms:
                raise Mistake(f"arm={name} is unknown{nearest(name, list(self.arms))}")
        grid = parser.parse_overrides([*self._parse_config(), *rest])
        keys = {override.get_key_element() for override in parser.parse_overrides(rest)}
        jobs: list[list[str]] = []
        for name in names:
            changes = parser.parse_overrides([f"arm={name}", *self.arms[name]])
            for change in changes:
                if change.get_key_element() in keys:
                    raise Mistake(
                        f"{change.get_key_element()} is what the arm {name} of this sweep changes: "
                        "leave it out, or choose other arms with arm=NAME,NAME"
                    )
            (batch,) = self.split_arguments([*grid, *changes], None)
            jobs += batch
        return self.run_batches(jobs)

    def run_batches(self, jobs: Sequence[Sequence[str]]) -> Any:
        """Launch the jobs, `max_batch_size` at a time; raises where one of them failed."""
        assert self.launcher is not None
        size = self.max_batch_size or len(jobs)
        returns = []
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            returns.append(self.launcher.launch(batch, initial_job_idx=first))
        for returned in (job for batch in returns for job in batch):
            _ = returned.return_value  # raises where the job failed
        return returns
