"""A worker that is ready to start."""

import logging
import threading

from batchclf.errors import ConfigError
from batchclf.labelling import Labelling
from batchclf.messages import AllowedSources
from batchclf.metrics import Metrics
from batchclf.sqs import Depth, Queue
from batchclf.work.run import Run
from batchclf.work.settings import Settings
from batchclf.work.summary import Summary

log = logging.getLogger(__name__)


class WorkJob:
    """A worker that is ready to start. Making it reads the model and asks the queue; no writes.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together, or there is no queue.
        QueueError: the queue kept failing.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        asked = settings.queue
        self._allowed = AllowedSources(asked.allowed_sources)
        if self._allowed.covers_folder(settings.output):
            raise ConfigError(
                f"the output {settings.output} lies inside an --allow-source, so the worker could "
                "be told to label its own output; choose an output beside it"
            )
        self.labelling = Labelling(
            settings.model,
            settings.read,
            settings.predict,
            settings.cut,
            settings.output,
            settings.endpoint_url,
        )
        self.labelling.sign_log()
        self.labelling.folder.sizes(self.labelling.sink.prefix + "_")  # may it be read at all?
        self.queue = Queue(asked.url, settings.endpoint_url, visibility_s=asked.visibility_s)
        self.redrives = "RedrivePolicy" in self.queue.attributes()

    def depth(self) -> Depth:
        """About how many messages the queue has."""
        return self.queue.depth()

    def run(
        self, interrupt: threading.Event, metrics: Metrics, *, show_health: bool = True
    ) -> Summary:
        """Work until told to stop, or until the settings say that it is enough.

        Raises:
            Interrupted: after SIGTERM or SIGINT; everything held was given back.
            QueueError, StoreError, ConfigError: likewise, for what fails all messages alike.
        """
        if not self.redrives:
            log.warning(
                "%s has no redrive policy: a message that cannot be labelled comes back until its "
                "retention ends; give the queue a dead-letter queue",
                self.queue.name,
            )
        run = Run(
            self.settings,
            self.labelling,
            self.queue,
            self._allowed,
            metrics,
            interrupt,
            show_health=show_health,
        )
        return run.run()
