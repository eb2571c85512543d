"""Every planted fault. A fault that no stage here can detect has no place in it."""

from __future__ import annotations

from lockstep.validate.faults.fault import Fault
from lockstep.validate.faults.file_faults import FILE_FAULTS
from lockstep.validate.faults.layout_faults import LAYOUT_FAULTS
from lockstep.validate.faults.model_faults import MODEL_FAULTS
from lockstep.validate.faults.served_faults import SERVED_FAULTS

FAULTS: tuple[Fault, ...] = (*MODEL_FAULTS, *FILE_FAULTS, *LAYOUT_FAULTS, *SERVED_FAULTS)
