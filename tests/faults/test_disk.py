"""Fault 28: no space left."""

import subprocess
from pathlib import Path

import pytest
import servers
from conftest import COMMAND_TIMEOUT_S
from faults.commands import Classify
from faults.inputs import articles, as_csv, as_parquet, with_blob
from faults.places import LocalPlace, S3Place, temporary
from servers import Endpoint, fresh_bucket
