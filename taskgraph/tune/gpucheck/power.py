"""The energy counter and the SM clock of a GPU, from NVML (libnvidia-ml.so.1), which comes with NVIDIA's driver.

Names and units are those of NVML's manual: nvmlDeviceGetTotalEnergyConsumption gives mJ since the driver was loaded,
nvmlDeviceGetClockInfo MHz.
"""

import ctypes
import statistics
import time
from collections.abc import Callable

_SM_CLOCK = 1
_TICK_S = 0.3
"""The counter is renewed some ten times a second: one that stands still for longer is not there."""


class Meter:
    """The counter of one device."""

    def __init__(self, library: ctypes.CDLL, device: ctypes.c_void_p) -> None:
        self._library, self._device = library, device

    @staticmethod
    def find(pci_bus_id: str) -> "Meter | None":
        """The meter of the device with that PCI address ("0000:01:00.0"); None where there is no NVML, or it has no
        counter for it."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        device = ctypes.c_void_p()
        if library.nvmlInit_v2():
            return None
        found = library.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), ctypes.byref(device)) == 0
        if not found and library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return None
        meter = Meter(library, device)
        return meter if meter.millijoules() is not None else None

    def millijoules(self) -> int | None:
        """The counter as it stands."""
        value = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
        return None if failed else int(value.value)

    def sm_mhz(self) -> int | None:
        """The SM clock now."""
        value = ctypes.c_uint()
        failed = self._library.nvmlDeviceGetClockInfo(self._device, _SM_CLOCK, ctypes.byref(value))
        return None if failed else int(value.value)

    def watch(
        self,
        seconds: float,
        keep_busy: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[float | None, float | None]:
        """(watts, median MHz) over at least `seconds`, from one renewal of the counter to another, while `keep_busy` is
        called again and again; None for what cannot be read."""
        begin, clocks = self._tick(keep_busy, clock, 0.0), list[int]()
        end = None if begin is None else self._tick(keep_busy, clock, seconds, clocks)
        watts = None
        if begin is not None and end is not None and end[0] > begin[0]:
            watts = (end[1] - begin[1]) * 1e-3 / (end[0] - begin[0])
        return watts, statistics.median(clocks) if clocks else None

    def _tick(
        self,
        keep_busy: Callable[[], object],
        clock: Callable[[], float],
        seconds: float,
        clocks: list[int] | None = None,
    ) -> tuple[float, int] | None:
        """When the counter first changes after `seconds`, and what it says then; None when it does not."""
        begin = clock()
        seen = self.millijoules()
        while True:
            keep_busy()
            now, value = clock(), self.millijoules()
            if clocks is not None and (mhz := self.sm_mhz()) is not None:
                clocks.append(mhz)
            if value is None or now - begin > seconds + _TICK_S:
                return None
            if now - begin < seconds:
                seen = value
            elif value != seen:
                return now, value
