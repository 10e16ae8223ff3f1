"""The job of `batchclf work`: label what a queue's messages hold, delete each when that is durable.

    receive -> gather -> run_shards -> delete

A message is deleted only after the output with its rows was committed, so a worker that dies in
between leaves it to another: nothing is lost. What the other finds done it only deletes; a set of
articles is gathered anew, so an article may be labelled twice, as the queue may deliver it twice,
and its message id tells.

A worker stops in order: it receives no more, the heart beats on until the work has stopped, what
was committed is deleted, and the rest is given back.
"""

from batchclf.work.job import WorkJob
from batchclf.work.settings import QueueSettings, Settings
from batchclf.work.side_by_side import work_side_by_side
from batchclf.work.summary import Summary

__all__ = ["QueueSettings", "Settings", "Summary", "WorkJob", "work_side_by_side"]
